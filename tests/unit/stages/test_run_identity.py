"""What tells one training run from another."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from nemo_aligner.config.peft import LoraTuning, PeftConfig
from nemo_aligner.config.schema import OptimConfig
from nemo_aligner.errors import CheckpointError
from nemo_aligner.stages.run_identity import (
    adapter_settings,
    check_same_run,
    optimizer_settings,
    tell_end_of_data,
    tokens_hash,
)


def test_rows_are_told_apart_by_tokens_order_and_where_they_end() -> None:
    rows = [[1, 2], [3], [], [300, 70000]]
    others = [
        [[1], [2, 3], [], [300, 70000]],
        [[1, 2], [3], [300, 70000]],
        [[3], [1, 2], [], [300, 70000]],
        [[1, 2], [3], [], [300, 70001]],
        [[1, 2], [3], [], [70000, 300]],
    ]
    assert tokens_hash(rows) == tokens_hash(tuple(map(tuple, rows)))
    assert len({tokens_hash(other) for other in (rows, *others)}) == 1 + len(others)


@pytest.mark.parametrize(
    "change", [{"name": "adam"}, {"lr": 1.0}, {"weight_decay": 0.5}, {"betas": [0.1, 0.2]}, {"eps": 1e-3}]
)
def test_every_setting_of_a_step_counts(change: dict[str, Any]) -> None:
    before, after = optimizer_settings(OptimConfig(), 1.0), optimizer_settings(OptimConfig(**change), 1.0)
    [name] = change
    assert {key for key in before if before[key] != after[key]} == {f"model.optim.{name}"}
    assert optimizer_settings(OptimConfig(), 2.0) == {**before, "gradient_clip_val": 2.0}


def test_a_schedule_counts_but_for_its_length() -> None:
    def of(**sched: Any) -> dict[str, Any]:
        return optimizer_settings(OptimConfig(sched=sched or None), 1.0)

    assert of(name="CosineAnnealing", max_steps=3) == of(name="CosineAnnealing")
    assert of(name="CosineAnnealing", min_lr=1.0) != of(name="CosineAnnealing")
    assert of() == of(max_steps=3)


def test_the_adapter_that_is_trained_counts_and_the_one_it_begins_with(tmp_path: Path) -> None:
    begun = tmp_path / "adapter.nemo"
    begun.write_bytes(b"1")
    runs = [
        PeftConfig(),
        PeftConfig("lora"),
        *(PeftConfig("lora", lora_tuning=LoraTuning(**own)) for own in ({"adapter_dim": 4}, {"alpha": 4.0})),
        *(
            PeftConfig("lora", lora_tuning=LoraTuning(**own))
            for own in ({"variant": "canonical"}, {"adapter_dropout": 0.1})
        ),
        PeftConfig("lora", lora_tuning=LoraTuning(target_modules=["all"])),
        PeftConfig("lora", restore_from_path=str(begun)),
    ]
    found = [json.dumps(adapter_settings(run)) for run in runs]
    assert len({*found}) == len(runs)
    assert adapter_settings(PeftConfig(lora_tuning=LoraTuning(4))) == {"model.peft": None}
    assert adapter_settings(PeftConfig("lora", merge=True)) == adapter_settings(PeftConfig("lora"))
    begun.write_bytes(b"2")
    assert json.dumps(adapter_settings(runs[-1])) != found[-1]


def test_what_changed_is_named_with_both_values() -> None:
    check_same_run(Path("c"), {"seed": 1, "more": 2}, {"seed": 1})
    with pytest.raises(CheckpointError, match=r"^c was made with seed = 1, this run has 2; choose another exp_manager"):
        check_same_run(Path("c"), {"seed": 1}, {"seed": 2})
    with pytest.raises(CheckpointError, match="was made with seed = None, this run has 2"):
        check_same_run(Path("c"), {}, {"seed": 2})


@pytest.mark.parametrize(("steps", "max_steps", "told"), [(3, 10, True), (3, 3, False), (3, -1, False)])
def test_a_run_that_ends_with_its_data_says_so(
    steps: int, max_steps: int, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        tell_end_of_data(steps, max_steps, "trainer.sft")
    said = "trainer.sft.max_steps=10: the data ends after 3 steps; more come with max_epochs"
    assert caplog.messages == ([said] if told else [])
