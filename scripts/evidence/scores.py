"""The held-out samples of all runs, judged by the same three rewards in the same way."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from nemo_aligner.data.jsonl import dump_row, load_rows
from nemo_aligner.files import write_atomically
from scripts.evidence.cells import VADER, Cell, Inputs, Row, Start
from scripts.evidence.commands import run

REWARDS = {
    "reward": "reward of the model that was trained against",
    "gold": "reward of a model of other data, never trained against",
    "vader": "VADER's sentiment, never trained against",
}
"""The rewards of a sample by their fields; those of models in standard deviations of what they give held-out pairs."""


def judge(inputs: Inputs, runs: Sequence[Cell | Start]) -> list[Row]:
    """The samples of all runs, each with every reward of `REWARDS`. Raises CommandError, StoppedEarly."""
    folder = inputs.folder / "scores"
    pieces = [f"{dump_row(row)}\n" for own in runs for row in load_rows(own.samples, required={})]
    samples = folder / "samples.jsonl"
    if not samples.exists() or samples.read_text(encoding="utf-8") != "".join(pieces):
        shutil.rmtree(folder, ignore_errors=True)
        write_atomically(samples, pieces)
    standard = "reward_standardization.enable=True"
    models = {"reward": inputs.reward_model, "gold": inputs.folder / "gold_model.nemo"}
    sources = {name: [f"gpt_model_file={path}", standard] for name, path in models.items()}
    sources["vader"] = [f"reward_function={VADER}"]
    given = samples
    for name, source in sources.items():
        scored = folder / f"{name}.jsonl"
        if not scored.exists():
            run(
                folder, name, "label", *source, f"data.file_names=[{given}]", f"data.reward_key={name}",
                "processor=null", "data.micro_batch_size=64", f"trainer.precision={inputs.scale.precision}",
                f"output_file={scored}",
            )  # fmt: skip
        given = scored
    return list(load_rows(given, required={}))
