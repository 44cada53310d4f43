"""What an iteration of an online loop did, kept when its samples go.

    <result>/iterations/<i>.jsonl    the first of its samples, each with its raw reward and whether it was trained on
    <result>/iterations/<i>/         provenance of its samples and labels, configuration and metrics of its training;
                                     of further trainings on the same samples in improve_<k>/
    <result>/iterations.jsonl        one line an iteration: rewards, share kept, lengths, seconds of each stage
    <result>/tensorboard             the same, to look at

All are written whole, from what is on the disk, so that an iteration may be recorded twice and stands there once.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from nemo_aligner.algorithms.statistics import known_by_prompt, mean_and_std
from nemo_aligner.config.entry import one_line_errors
from nemo_aligner.config.offline import OfflineDataConfig
from nemo_aligner.data.jsonl import Rows, load_rows, write_jsonl
from nemo_aligner.data.provenance import META, RUN_RECORD
from nemo_aligner.event_file import EventFile
from nemo_aligner.files import write_atomically, writing
from nemo_aligner.records import Keys, Sample
from nemo_aligner.stages.offline.data import RowCheck

log = logging.getLogger(__name__)

Row = dict[str, Any]


def rewards_of(labeled: Path) -> dict[int, float]:
    """Raw reward of each row of the labeler's input, from its journal; a NaN is none."""
    found: dict[int, float] = {}
    for path in Path(f"{labeled}_temp").glob("rank_*.json"):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            if entry["row"]["reward"] is not None:
                found[entry["index"]] = entry["row"]["reward"]
    return found


def drawn_and_trained_on(generated: Path, labeled: Path, keys: Keys) -> tuple[Rows, Rows]:
    """What the sampler and what the labeler wrote."""
    required = {keys.input: "data.input_key", keys.output: "data.output_key"}
    check = RowCheck(OfflineDataConfig(input_key=keys.input, output_key=keys.output), required)
    samples, trained_on = (load_rows(path, required={}, check=check) for path in (generated, labeled))
    return samples, trained_on


def marked(samples: Rows, trained_on: Rows, rewards: dict[int, float], processor: str | None, keys: Keys) -> list[Row]:
    """The samples in their order, with their reward and `kept`."""
    kept = {_pair(row, keys) for row in trained_on}
    # also of dt, which writes other prompts; of rs there may be as many of earlier iterations
    every = len(trained_on) == len(samples) and processor != "rs"
    return [
        {**row, keys.reward: rewards.get(index), "kept": every or _pair(row, keys) in kept}
        for index, row in enumerate(samples)
    ]


def _pair(row: Row, keys: Keys) -> tuple[str, str]:
    """The prompt, the same for samples of the same prompt alone, and the response."""
    sample = Sample.of(row, keys)
    return sample.prompt_id, sample.output


def config_of(labeled: Path) -> dict[str, Any]:
    """The labeler's config; empty where a kill kept it from saying."""
    meta = Path(f"{labeled}{META}")
    config: dict[str, Any] = json.loads(meta.read_text(encoding="utf-8"))["config"] if meta.is_file() else {}
    return config


def from_before(samples: list[Row], trained_on: Rows, processor: str | None, keys: Keys) -> int:
    """How many of the rows that were trained on are samples of earlier iterations, which rs alone has."""
    own = {_pair(row, keys) for row in samples}
    return sum(_pair(row, keys) not in own for row in trained_on) if processor == "rs" else 0


def summary(samples: list[Row], trained_on: int, before: int, keys: Keys) -> dict[str, float]:
    """Figures of one iteration; `trained_on` rows came out of the labeler, `before` of them from earlier iterations."""
    rewards = [sample[keys.reward] for sample in samples]
    prompts, responses = zip(*(_pair(sample, keys) for sample in samples), strict=True)
    of_prompt = known_by_prompt(rewards, prompts)
    mean, std = mean_and_std(rewards)
    best, _ = mean_and_std([max(rewards[i] for i in places) for places in of_prompt.values()])
    return {
        "samples": len(samples),
        "prompts": len(of_prompt),
        "reward_mean": mean,
        "reward_std": std,
        "best_of_n_mean": best,
        "kept": (trained_on - before) / len(samples),
        "kept_from_before": before,
        "response_characters": sum(map(len, responses)) / len(samples),
        "empty": responses.count("") / len(samples),
    }


def seconds_of(path: Path, iteration: int) -> dict[str, float]:
    """Seconds of each stage, from the loop's lines `<iteration> <stage> <seconds>`; a stage run twice counts twice."""
    found: dict[str, float] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        number, stage, spent = line.split()
        if int(number) == iteration:
            found[f"seconds/{stage}"] = found.get(f"seconds/{stage}", 0.0) + float(spent)
    return found


def record(result: Path, iteration: int, generated: Path, labeled: Path, keep: int) -> None:
    """Record one iteration whose samples are still there."""
    config = config_of(labeled)
    processor, keys = config.get("processor"), Keys.of(config.get("data", {}))
    drawn, trained_on = drawn_and_trained_on(generated, labeled, keys)
    samples = marked(drawn, trained_on, rewards_of(labeled), processor, keys)
    forget_after(result / "iterations", iteration)
    if keep:
        write_jsonl(result / "iterations" / f"{iteration}.jsonl", samples[:keep])
    keep_records(result, iteration, generated, labeled)
    lines = result / "iterations.jsonl"
    before = load_rows(lines, required={}) if lines.exists() else []
    figures = summary(samples, len(trained_on), from_before(samples, trained_on, processor, keys), keys)
    row = {"iteration": iteration, **figures, **seconds_of(result / "seconds.log", iteration)}
    rows = [*(earlier for earlier in before if earlier["iteration"] < iteration), row]
    write_jsonl(lines, rows)
    to_tensorboard(result / "tensorboard", rows)
    print(
        f"iteration {iteration}: " + ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name in figures)
    )


def forget_after(folder: Path, iteration: int) -> None:
    """Remove what a loop that was in this place before has left of later iterations."""
    for path in folder.iterdir() if folder.is_dir() else ():
        number = path.name.removesuffix(".jsonl")
        if number.isdigit() and int(number) > iteration:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def keep_records(result: Path, iteration: int, generated: Path, labeled: Path) -> None:
    """Copy what says how an iteration was made, before the loop removes it with what it was made of."""
    first, kept = result / f"iter_{iteration}", result / "iterations" / str(iteration)
    sources = {f"sample{META}": Path(f"{generated}{META}"), f"label{META}": Path(f"{labeled}{META}")}
    for training in (first, *first.glob("improve_*")):
        for name in (RUN_RECORD, "metrics.jsonl"):
            sources[str((training / name).relative_to(first))] = training / name
    for folder in kept.glob("improve_*"):  # of one that is begun anew, perhaps with fewer trainings
        shutil.rmtree(folder)
    for name, source in sources.items():
        if source.is_file():
            write_atomically(kept / name, [source.read_text(encoding="utf-8")])


def to_tensorboard(folder: Path, rows: list[Row]) -> None:
    """In place of what is there. Raises OutputError."""
    shutil.rmtree(folder, ignore_errors=True)
    with writing(folder):
        folder.mkdir()
        events = EventFile(folder)
        for row in rows:
            events.add(row["iteration"], {k: v for k, v in row.items() if k != "iteration" and v is not None})
        events.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, required=True, help="the loop's RESULT_PATH")
    parser.add_argument("--iteration", type=int, required=True)
    parser.add_argument("--generated", type=Path, required=True, help="what the sampler wrote")
    parser.add_argument("--labeled", type=Path, required=True, help="what the labeler wrote, its journal beside it")
    parser.add_argument("--keep", type=int, default=256, help="samples to keep of the iteration")
    given = parser.parse_args()
    if os.environ.get("SLURM_PROCID", "0") == "0":  # srun starts one of us for each device
        record(given.result, given.iteration, given.generated, given.labeled, given.keep)


if __name__ == "__main__":
    with one_line_errors():
        main()
