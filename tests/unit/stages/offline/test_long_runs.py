"""A run of many rows takes the memory of a few, and one that goes on reads no more than what is left to do."""

from __future__ import annotations

import gc
import json
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest

from nemo_aligner.algorithms.sampling import SamplingParams
from nemo_aligner.config.offline import LabelerConfig, SamplerConfig
from nemo_aligner.data.jsonl import load_rows
from nemo_aligner.data.supervised import Pairs
from nemo_aligner.engine.interfaces import GenerationRequest, Response
from nemo_aligner.stages.offline import random_sampler
from nemo_aligner.stages.offline.data import open_rows
from nemo_aligner.stages.offline.random_sampler import sample
from nemo_aligner.stages.offline.reward_labeler import label
from tests.fakes import ByteTokenizer, OneProcess

LONG = "word " * 200


class Wide(ByteTokenizer):
    """Counts what it is asked; no token is a number that Python keeps anyway."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, text: str) -> list[int]:
        self.asked.append(text[:12])
        return [1000 + byte for byte in text.encode()]


class OneByOne:
    """A policy that draws a request when it comes, and stops after `count`."""

    max_sequence_length = 4096

    def __init__(self, count: int | None = None) -> None:
        self.tokenizer, self._count = Wide(), count

    def archive_hash(self) -> str:
        return "a" * 64

    def generate(
        self, requests: Iterable[GenerationRequest], sampling: SamplingParams, max_slots: int
    ) -> Iterator[Response]:
        for number, request in enumerate(requests):
            if number == self._count:
                raise KeyboardInterrupt
            yield Response(request.prompt_index, request.sample_index, [1, 2], LONG, [-1.0] * 2, [-1.0] * 2, "stop")


class Length:
    """A reward model: the length of a text in tokens, less for odd ones."""

    max_sequence_length, append_eod, stored_standardization = 4096, False, None

    def __init__(self) -> None:
        self.tokenizer = Wide()

    def archive_hash(self) -> str:
        return "a" * 64

    def score(self, rows: Sequence[list[int]], micro_batch_size: int) -> list[list[float]]:
        return [[len(row) % 7 - sum(row) % 3] for row in rows]


def lines(folder: Path, count: int, **more: str) -> str:
    path = folder / f"{count}.jsonl"
    path.write_text("".join(json.dumps({"input": f"{i} {LONG}", **more}) + "\n" for i in range(count)))
    return str(path)


def sampler(folder: Path, count: int) -> SamplerConfig:
    cfg = SamplerConfig(gpt_model_file="m.nemo", output_file=str(folder / f"{count}.out.jsonl"), checkpoint_interval=8)
    cfg.data.file_names, cfg.data.n = [lines(folder, count)], 2
    return cfg


def run_sampler(cfg: SamplerConfig, policy: OneByOne) -> None:
    sample(cfg, open_rows(cfg.data, {"input": "data.input_key"}), policy, OneProcess())  # type: ignore[arg-type]


def labeler(folder: Path, count: int, processor: str | None) -> LabelerConfig:
    output = folder / f"{count}.out.jsonl"
    cfg = LabelerConfig(gpt_model_file="m.nemo", output_file=str(output), processor=processor, checkpoint_interval=8)
    cfg.data.file_names, cfg.threshold = [lines(folder, count, output=LONG)], -1
    return cfg


def run_labeler(cfg: LabelerConfig) -> None:
    rows = open_rows(cfg.data, {"input": "data.input_key", "output": "data.output_key"})
    label(cfg, rows, Length(), OneProcess())  # type: ignore[arg-type]


def prepared(name: str, folder: Path, count: int) -> Callable[[], object]:
    """Work whose files are there."""
    folder.mkdir()
    if name == "sampler":
        cfg = sampler(folder, count)
        return lambda: run_sampler(cfg, OneByOne())
    if name == "pairs":
        path = lines(folder, count, text=LONG)
        return lambda: Pairs(load_rows(path, required={"text": "key"}))
    labeled = labeler(folder, count, None if name == "labeler" else name)
    return lambda: run_labeler(labeled)


def most_memory(work: Callable[[], object]) -> int:
    """Bytes of Python's that `work` takes at once."""
    gc.collect()
    tracemalloc.start()
    try:
        kept = work()
        del kept
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.processes
@pytest.mark.parametrize("name", ["sampler", "labeler", "rs", "rest", "dt", "pairs"])
def test_a_row_more_adds_no_row_to_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(random_sampler, "_NEWEST", 4)
    few, many = 40, 200
    prepared(name, tmp_path / "first", few)()  # what is loaded and kept at the first time
    peaks = [most_memory(prepared(name, tmp_path / str(count), count)) for count in (few, many)]
    assert (peaks[1] - peaks[0]) / (many - few) < 400 < len(LONG) / 2


def test_a_run_that_goes_on_tokenizes_the_prompts_that_are_left_alone(tmp_path: Path) -> None:
    cfg = sampler(tmp_path, 40)
    with pytest.raises(KeyboardInterrupt):
        run_sampler(cfg, OneByOne(73))
    rest = OneByOne()
    run_sampler(cfg, rest)
    assert [text.split()[0] for text in rest.tokenizer.asked] == [str(i) for i in range(32, 40)], "64 rows were flushed"
    assert [json.loads(line)["output"] for line in Path(cfg.output_file).read_text().splitlines()] == [LONG] * 80
