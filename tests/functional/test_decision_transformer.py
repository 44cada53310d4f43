"""A policy that was told rewards with its training texts writes, when asked for a reward, texts that have it."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from scipy.stats import spearmanr

from nemo_aligner.algorithms.processors import apply_processor
from nemo_aligner.records import Keys, ScoredSample
from tests.functional.conftest import Workshop, run

LENGTH, LEVELS = 4, (0, 1, 2, 3, 4)
TEMPLATE = "{input} <rm_score>: {reward} "


def reward(text: str) -> float:
    """Of the game that is learnt: how many of the letters are x."""
    return float(text.count("x"))


def samples(*, told_the_truth: bool) -> list[dict[str, object]]:
    draw, outputs = random.Random(7), []
    for _ in range(512):
        level = draw.choice(LEVELS)
        outputs.append("".join(draw.sample("x" * level + "y" * (LENGTH - level), LENGTH)))
    rewards = [reward(output) for output in outputs]
    if not told_the_truth:
        draw.shuffle(rewards)
    scored = [ScoredSample("play", output, {}, r) for output, r in zip(outputs, rewards, strict=True)]
    conditioned = apply_processor("dt", scored, threshold=0.0, reward_template=TEMPLATE, keys=Keys())
    return [row.to_row(Keys(), export_reward=False) for row in conditioned]


def realised(workshop: Workshop, folder: Path, *, told_the_truth: bool) -> tuple[list[float], list[float]]:
    """Requested and found reward of each sample of a policy that was trained on such rows."""
    folder.mkdir()
    rows = samples(told_the_truth=told_the_truth)
    for name, part in (("train", rows), ("val", rows[:16])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    run(
        "python", "examples/nlp/gpt/train_gpt_sft.py",
        f"model.restore_from_path={workshop.path('sft_model.nemo')}",
        f"model.data.train_ds.file_path={folder}/train.jsonl",
        f"model.data.validation_ds.file_path={folder}/val.jsonl",
        "model.data.train_ds.global_batch_size=32", "model.data.train_ds.micro_batch_size=32",
        "trainer.sft.max_epochs=8",
        "trainer.sft.val_check_interval=1000", "model.optim.lr=5e-3", "~model.optim.sched", "trainer.precision=32",
        f"exp_manager.explicit_log_dir={folder / 'run'}",
    )  # fmt: skip
    asked = [f"play <rm_score>: {level:.1f} " for level in LEVELS]
    (folder / "asked.jsonl").write_text("".join(json.dumps({"input": text}) + "\n" for text in asked))
    run(
        "python", "examples/nlp/gpt/offline/launch_random_sampler.py", "data.n=32", "trainer.precision=32",
        f"gpt_model_file={folder}/run/checkpoints/megatron_gpt_sft.nemo", f"data.file_names=[{folder}/asked.jsonl]",
        "data.hf_dataset=False", "data.micro_batch_size=5", f"inference.tokens_to_generate={LENGTH}",
        f"output_file={folder}/played.jsonl",
    )  # fmt: skip
    requested, found = [], []
    for line in (folder / "played.jsonl").read_text().splitlines():
        row = json.loads(line)
        [level] = re.findall(r"<rm_score>: (\S+)", row["input"])
        requested.append(float(level))
        found.append(reward(row["output"]))
    return requested, found


def test_a_higher_requested_reward_gives_a_higher_one_unless_training_was_told_others(
    workshop: Workshop, tmp_path: Path
) -> None:
    told = spearmanr(*realised(workshop, tmp_path / "told", told_the_truth=True)).statistic
    misled = spearmanr(*realised(workshop, tmp_path / "misled", told_the_truth=False)).statistic
    assert told > 0.8
    assert abs(misled) < 0.3
