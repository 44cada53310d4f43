"""Every command block of the guide, taken from the document, with only paths and sizes replaced."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.functional.conftest import ROOT, Workshop, run

DOCUMENT = ROOT / "tests" / "data" / "mission" / "offline_methods.rst"
SIZES = {
    r"trainer\.devices=8": "trainer.devices=1",
    r"inference\.tokens_to_generate=2048": "inference.tokens_to_generate=6",
    r"data\.max_seq_length=\d+": "data.max_seq_length=128",
    r"data\.micro_batch_size=\d+": "data.micro_batch_size=4",
    r"data\.n=16": "data.n=3",
    r"global_batch_size=128": "global_batch_size=4",
    r"train_ds\.max_seq_length=4096": "train_ds.max_seq_length=128",
    r"TRAINING_ITERS=20": "TRAINING_ITERS=2",
    r"ROLLOUT_BATCH_SIZE=2048": "ROLLOUT_BATCH_SIZE=2",
    r"\{mean_of_your_reward_model\}": "0.1",
    r"\{std_of_your_reward_model\}": "0.7",
}


def blocks() -> list[str]:
    """The bash blocks of the document, in order, as printed."""
    found = re.findall(r"\.\. code-block:: bash *\n\n((?:(?: {3}.*)?\n)+)", DOCUMENT.read_text())
    return [re.sub(r"(?m)^ {3}", "", block) for block in found]


SAMPLER, RS, SFT, REST, DT, LOOP = range(6)


def command(index: int, folder: Path, *, results: str = "results") -> str:
    """A block with the paths of `folder` and small sizes."""
    text = blocks()[index]
    text = re.sub(r"(?:/path/to|path/to)/your/", f"{folder}/", text).replace("=/results", f"={folder}/{results}")
    for pattern, small in SIZES.items():
        text = re.sub(pattern, small, text)
    return text


def shell(text: str) -> str:
    return run("bash", "-e", "-c", text).stdout


def test_the_copy_is_the_users_document() -> None:
    original = ROOT.parent / "shared" / "mission" / "offline_methods.rst"
    if not original.exists():
        pytest.skip("the users' document is not beside this checkout")
    assert DOCUMENT.read_text() == original.read_text()
    assert len(blocks()) == 6


def test_sampler_writes_n_adjacent_responses_of_every_prompt(workshop: Workshop, tmp_path: Path) -> None:
    link(workshop, tmp_path, "sft_model.nemo", "prompts_dataset.jsonl")
    shell(command(SAMPLER, tmp_path))
    rows = Workshop(tmp_path).rows("generated_samples.jsonl")
    assert [(row["input"], row["id"]) for row in rows] == [(f"prompt {i % 5}", i) for i in range(6) for _ in range(3)]
    assert all(isinstance(row["output"], str) for row in rows)
    assert (tmp_path / "generated_samples.jsonl_temp" / "rank_0.json").exists()
    meta = json.loads((tmp_path / "generated_samples.jsonl.meta.json").read_text())
    assert meta["counts"] == {"prompts": 6, "samples": 18}


def test_labeler_keeps_the_best_of_each_prompt_and_every_other_processor_costs_no_scoring(
    workshop: Workshop, tmp_path: Path
) -> None:
    link(workshop, tmp_path, "reward_model.nemo", "generated_samples.jsonl")
    shell(command(RS, tmp_path).replace("processor=rs", "processor=null"))
    labeled = Workshop(tmp_path).rows("filtered_samples.jsonl")
    assert [row["id"] for row in labeled] == list(range(9))
    journal = (tmp_path / "filtered_samples.jsonl_temp" / "rank_0.json").stat()
    shell(command(RS, tmp_path))
    kept = Workshop(tmp_path).rows("filtered_samples.jsonl")
    assert [row["input"] for row in kept] == ["p0", "p1", "p2"]
    for row in kept:
        group = [r for r in labeled if r["input"] == row["input"]]
        assert row["id"] == max(group, key=lambda r: r["reward"])["id"]
        assert "reward" not in row
    shell(command(RS, tmp_path).replace("export_reward=False", "export_reward=True"))
    assert all("reward" in row for row in Workshop(tmp_path).rows("filtered_samples.jsonl"))
    # the guide's threshold 0 with its standardisation by mean and std, against the rewards labelled above
    mean = sorted(row["reward"] for row in labeled)[4]
    shell(command(REST, tmp_path).replace("standardization.mean=0.1", f"standardization.mean={mean}"))
    above = [row["id"] for row in labeled if (row["reward"] - mean) / 0.7 > 0]
    assert len(above) == 4
    assert [row["id"] for row in Workshop(tmp_path).rows("filtered_samples.jsonl")] == above
    assert (tmp_path / "filtered_samples.jsonl_temp" / "rank_0.json").stat().st_mtime == journal.st_mtime


def test_decision_transformer_blends_and_writes_rewards_into_prompts(workshop: Workshop, tmp_path: Path) -> None:
    names = ("generated_samples.jsonl", "sft_samples.jsonl", "preference_samples.jsonl")
    link(workshop, tmp_path, "reward_model.nemo", *names)
    # the printed block lacks the backslash that continues the line with the weights
    shell(command(DT, tmp_path).replace("[0.33,0.33,0.34]\n", "[0.33,0.33,0.34] \\\n"))
    rows = Workshop(tmp_path).rows("filtered_samples.jsonl")
    assert len(rows) == 27
    assert all(re.fullmatch(r"p\d <rm_score>: -?\d+\.\d ", row["input"]) for row in rows)


def test_sft_trains_on_fewer_rows_than_a_batch_and_writes_the_archive(workshop: Workshop, tmp_path: Path) -> None:
    link(workshop, tmp_path, "sft_model.nemo")
    Workshop(tmp_path).write("filtered_samples.jsonl", workshop.rows("generated_samples.jsonl")[:3])
    shell(command(SFT, tmp_path).replace("global_batch_size=4", "global_batch_size=128"))
    assert (tmp_path / "results/checkpoints/megatron_gpt_sft.nemo").stat().st_size > 10_000
    [checkpoint] = (tmp_path / "results/checkpoints").glob("megatron_gpt_sft--global_step=1.000-step=1-*-last")
    assert json.loads((checkpoint / "state.json").read_text())["consumed_samples"] == 3
    metrics = [json.loads(line) for line in (tmp_path / "results/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1]
    assert list((tmp_path / "results").glob("events.out.tfevents.*"))


@pytest.mark.parametrize("processor", ["rs", "rest"])
def test_the_online_loop_ends_with_a_policy_of_its_own(workshop: Workshop, tmp_path: Path, processor: str) -> None:
    link(workshop, tmp_path, "sft_model.nemo", "reward_model.nemo", "prompts_dataset.jsonl")
    text = command(LOOP, tmp_path)
    if processor == "rest":
        text = text.replace("processor=rs", "processor=rest threshold=-5 reward_standardization.enable=True")
        text = text.replace("TRAINING_ITERS=2", "TRAINING_ITERS=1")
    shell(text)
    trained = tmp_path / "sft_results/checkpoints/megatron_gpt_sft.nemo"
    assert trained.read_bytes() != workshop.path("sft_model.nemo").read_bytes()
    assert not list(tmp_path.glob("*_samples.jsonl*")), "the loop clears what the next iteration must not find"


def link(workshop: Workshop, folder: Path, *names: str) -> None:
    for name in names:
        shutil.copy(workshop.path(name), folder / name)
