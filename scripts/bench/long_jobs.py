"""Long offline jobs: memory while they run, how soon they go on after a kill, and how long big files take to open.

    .venv/bin/python scripts/bench/long_jobs.py --json long_jobs.json

runs sampler and labeler, all but their models, on --prompts prompts with --samples responses each, and on a tenth of
them: a model that answers at once stands in for theirs. Each job is killed (SIGKILL) at its middle and right before its
merge, and started again. Then every reader of JSONL opens a file of --megabytes.

Memory is the resident set of a process, which torch and Megatron begin. Seconds are of the clock on the wall, and those
that the process computes, which hold on a busy machine: of jobs from the first look at the data to the first row that
is made and to the end, of readers with the check of every row.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from workload import forget_loading, memory_kb

from nemo_aligner.config.offline import LabelerConfig, OfflineConfig, SamplerConfig
from nemo_aligner.config.supervised import RMConfig, SFTConfig
from nemo_aligner.data.jsonl import write_jsonl
from nemo_aligner.data.prompts import open_prompts
from nemo_aligner.engine.interfaces import GenerationRequest, Response
from nemo_aligner.stages.offline import random_sampler, reward_labeler
from nemo_aligner.stages.offline.data import open_rows, start_cluster
from nemo_aligner.stages.supervised import reward_training, sft

WORDS = " ".join(f"word{i * i % 9973}" for i in range(2000))
INPUT, OUTPUT = "data.input_key", "data.output_key"


def text(number: int, characters: int) -> str:
    """Some words, others for another number."""
    start = number * 7919 % (len(WORDS) - characters)
    return f"{number} {WORDS[start : start + characters]}"


def clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def since(begun: tuple[float, float]) -> dict[str, float]:
    wall, cpu = (now - before for now, before in zip(clocks(), begun, strict=True))
    return {"seconds": wall, "cpu_seconds": cpu}


class Watch:
    """Memory and time while rows are made; `die_at` rows are the end of this process, if not None."""

    def __init__(self, total: int, die_at: int | None) -> None:
        self._marks = {round(total * part): part for part in (0.05, 0.25, 0.5, 0.75, 0.95)}
        self._die_at, self._begun = die_at, clocks()
        self.made = 0
        self.first_row: dict[str, float] = {}
        self.resident_mb: dict[str, float] = {}

    def row(self) -> None:
        if not self.first_row:
            self.first_row = since(self._begun)
        if self.made in self._marks:
            self.resident_mb[f"{self._marks[self.made]:.0%}"] = memory_kb("VmRSS") / 1024
        self.made += 1
        if self.made == self._die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def figures(self) -> dict[str, Any]:
        found = {"rows": self.made, "first_row": self.first_row, **since(self._begun)}
        return {**found, "resident_mb": self.resident_mb, "peak_mb": memory_kb("VmHWM") / 1024}


class Tokenizer:
    """A token for each byte, none of them a number that Python keeps anyway."""

    bos_id, eos_id, chat_template = None, 300, None

    def encode(self, words: str) -> list[int]:
        return [1000 + byte for byte in words.encode()]


class Policy:
    """Stands in for interfaces.Policy: each response is a function of its place."""

    tokenizer, max_sequence_length = Tokenizer(), 2048

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def archive_hash(self) -> str:
        return "0" * 64

    def generate(self, requests: Iterable[GenerationRequest], sampling: Any, max_slots: int) -> Iterator[Response]:
        for request in requests:
            answer = text(request.prompt_index * 31 + request.sample_index, 400)
            tokens = [1000 + i for i in range(100)]
            scores = [-0.5] * len(tokens)
            self._watch.row()
            yield Response(request.prompt_index, request.sample_index, tokens, answer, scores, scores, "stop")


class RewardModel:
    """Stands in for interfaces.RewardModel: the reward is a function of the text."""

    tokenizer, max_sequence_length, append_eod, stored_standardization = Tokenizer(), 2048, False, None

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def archive_hash(self) -> str:
        return "0" * 64

    def score(self, rows: Sequence[Sequence[int]], micro_batch_size: int) -> list[list[float]]:
        for _ in rows:
            self._watch.row()
        return [[sum(row) % 1009 / 1009] for row in rows]


def begun(cfg: OfflineConfig, file: str) -> None:
    """What both jobs read and write."""
    cfg.data.file_names = [file]  # type: ignore[attr-defined]
    cfg.output_file, cfg.checkpoint_interval = f"{file}.out.jsonl", 100
    cfg.trainer.precision = "32"


def run_sampler(given: argparse.Namespace) -> dict[str, Any]:
    cfg = SamplerConfig(gpt_model_file="model.nemo")
    begun(cfg, given.file)
    cfg.data.n, cfg.data.micro_batch_size = given.samples, 8
    with start_cluster(cfg, None) as cluster:
        forget_loading()
        watch = Watch(given.rows * given.samples, given.die_at)
        random_sampler.sample(cfg, open_rows(cfg.data, {"input": INPUT}), Policy(watch), cluster)  # type: ignore[arg-type]
    return watch.figures()


def run_labeler(given: argparse.Namespace) -> dict[str, Any]:
    cfg = LabelerConfig(gpt_model_file="model.nemo", processor="rs")
    begun(cfg, given.file)
    cfg.data.micro_batch_size = 8
    with start_cluster(cfg, None) as cluster:
        forget_loading()
        watch = Watch(given.rows, given.die_at)
        rows = open_rows(cfg.data, {"input": INPUT, "output": OUTPUT})
        reward_labeler.label(cfg, rows, RewardModel(watch), cluster)  # type: ignore[arg-type]
    return watch.figures()


def timed(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """One reader on the big file."""
    file = given.file
    cfg, training, ranking = LabelerConfig(gpt_model_file="model.nemo"), SFTConfig(), RMConfig()
    cfg.data.file_names, cfg.data.hf_dataset = [file], name == "responses_arrow"
    cfg.data.index_mapping_dir = f"{file}.cache"
    training.model.data.train_ds.file_path = file
    training.model.data.train_ds.hf_dataset = False
    ranking.model.data.data_prefix = {"train": [file]}
    readers: dict[str, Callable[[], Any]] = {
        "responses": lambda: open_rows(cfg.data, {"input": INPUT, "output": OUTPUT}),
        "responses_arrow": lambda: open_rows(cfg.data, {"input": INPUT, "output": OUTPUT}),
        "prompts": lambda: open_prompts([file], "train", "model.data.data_prefix"),
        "sft": lambda: sft.open_rows(training, training.model.data.train_ds, "model.data.train_ds"),
        "pairs": lambda: reward_training.open_pairs(ranking, "train"),
    }
    forget_loading()
    before, start = memory_kb("VmRSS"), clocks()
    rows = readers[name]()
    return {**since(start), "rows": len(rows), "added_mb": (memory_kb("VmHWM") - before) / 1024}


READERS = ("responses", "responses_arrow", "prompts", "sft", "pairs")
JOBS = {"sampler": run_sampler, "labeler": run_labeler}


def child(work: str, file: Path, rows: int, samples: int, die_at: int | None = None) -> dict[str, Any] | None:
    """What one process found; None where it was killed, as it was to be."""
    command = [sys.executable, __file__, "--work", work, "--file", str(file), "--rows", str(rows)]
    command += ["--samples", str(samples)] + ([] if die_at is None else ["--die-at", str(die_at)])
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False, text=True)
    if die_at is not None and done.returncode == -signal.SIGKILL:
        return None
    if done.returncode:
        sys.exit(f"error: {work} ended with status {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def job(name: str, file: Path, rows: int, samples: int) -> dict[str, Any]:
    """A whole run; one that is killed at its middle and goes on; one that is killed before its merge and goes on."""
    total, output = rows * (samples if name == "sampler" else 1), Path(f"{file}.out.jsonl")
    found: dict[str, Any] = {}
    results = set()
    for way, die_at in (("whole", None), ("from_middle", total // 2), ("from_end", total - 1)):
        if die_at is not None:
            child(name, file, rows, samples, die_at)
        found[way] = child(name, file, rows, samples)
        results.add(output.read_bytes())
        subprocess.run(["rm", "-r", f"{output}_temp", output, f"{output}.meta.json"], check=True)
    if len(results) > 1:
        sys.exit(f"error: {name}: a kill changed the result")
    return found


def prompts(count: int) -> Iterator[dict[str, Any]]:
    return ({"input": text(i, 200), "id": i} for i in range(count))


def responses(count: int, samples: int) -> Iterator[dict[str, Any]]:
    return (
        {"input": text(i, 200), "output": text(i * 31 + s, 400), "id": i} for i in range(count) for s in range(samples)
    )


def jobs(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in JOBS:
        for count in (given.prompts // 10, given.prompts):
            file = folder / f"{name}_{count}.jsonl"
            rows = count if name == "sampler" else count * given.samples
            write_jsonl(file, prompts(count) if name == "sampler" else responses(count, given.samples))
            found[f"{name}_{count}"] = job(name, file, rows, given.samples)
            print(f"{name}, {count} prompts: {json.dumps(found[f'{name}_{count}'])}", flush=True)
            file.unlink()
    return found


def big_file(path: Path, megabytes: int) -> None:
    """Rows that every reader takes, of 830 bytes or so."""
    with path.open("w") as stream:
        number = 0
        while stream.tell() < megabytes * 1_000_000:
            rows = [
                {"text": text(i, 200), "input": text(i, 200), "output": text(i * 31, 350), "id": i}
                for i in range(number, number + 1000)
            ]
            stream.writelines(f"{json.dumps(row)}\n" for row in rows)
            number += 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=4, help="responses to each prompt")
    parser.add_argument("--megabytes", type=int, default=1000, help="of the file that is opened")
    parser.add_argument("--only", choices=["jobs", "files"], help="not both")
    parser.add_argument("--json", type=Path, help="where the figures go")
    for name in ("--work", "--file", "--rows", "--die-at"):
        parser.add_argument(name, type=str if name in ("--work", "--file") else int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work = JOBS.get(given.work)
        print(json.dumps(work(given) if work else timed(given.work, given)))
        return
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="nemo_aligner_long_") as folder:
        if given.only != "files":
            found |= jobs(given, Path(folder))
        if given.only != "jobs":
            path = Path(folder) / "big.jsonl"
            big_file(path, given.megabytes)
            for name in READERS:
                found[name] = child(name, path, 0, 0)
                print(f"{name}: {json.dumps(found[name])}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
