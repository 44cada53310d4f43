"""`aligner loop` starts the shell loops with settings of the command line, and refuses those that they do not know."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from nemo_aligner.commands.loop import LOOPS, environment_of, script_of, settings_of, usage
from nemo_aligner.errors import ConfigError

STAGE = """#!/usr/bin/env bash
# plays every stage: notes its arguments, and makes the file that the loop looks for
[[ $2 == nemo_aligner.owner ]] && exit
printf '%s\\n' "${*:2}" >>"$NOTES"
for word in "$@"; do
  case $word in
    output_file=*) touch "${word#*=}" ;;
    exp_manager.explicit_log_dir=*)
      mkdir -p "${word#*=}/checkpoints"
      touch "${word#*=}/checkpoints/megatron_gpt_sft.nemo"
      ;;
  esac
done
"""


def test_settings_are_those_that_the_scripts_read() -> None:
    common = {"TRAINING_ITERS", "PROMPTS_PATH", "RESULT_PATH", "SAMPLER_ARGS", "LAUNCH", "PYTHON"}
    for loop, own in zip(LOOPS, (set(), {"THRESHOLD"}, {"TARGET_REWARD"}), strict=True):
        assert common | own <= settings_of(loop)
    assert "THRESHOLD" not in settings_of("rs")


def test_every_setting_is_explained() -> None:
    text = usage()
    assert [name for loop in LOOPS for name in settings_of(loop) if name not in text] == []


def test_a_value_may_hold_what_it_likes() -> None:
    assert environment_of("rs", ["SAMPLER_ARGS=data.n=4 seed=3", "SEED="]) == {
        "SAMPLER_ARGS": "data.n=4 seed=3",
        "SEED": "",
    }


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("THRESHOLD=1", "THRESHOLD: no such setting of aligner loop rs; it takes GENERATE_SAMPLES_PATH, "),
        ("data.n", "'data.n' is not of the form NAME=value"),
    ],
)
def test_what_the_loop_does_not_know_is_refused(word: str, line: str) -> None:
    with pytest.raises(ConfigError, match=f"^{line}"):
        environment_of("rs", [word])


@pytest.mark.processes
def test_a_decision_transformer_asks_for_its_target_once_it_has_been_trained(tmp_path: Path) -> None:
    stage, notes = tmp_path / "stage", tmp_path / "notes"
    stage.write_text(STAGE)
    stage.chmod(0o755)
    settings = environment_of(
        "dt",
        [
            f"PYTHON={stage}", "TRAINING_ITERS=2", f"RESULT_PATH={tmp_path}/loop", "PROMPTS_PATH=p", "TARGET_REWARD=2",
            "POLICY_MODEL_PATH=sft.nemo", "REWARD_MODEL_PATH=rm.nemo", "SFT_ARGS=model.optim.lr=1",
        ],
    )  # fmt: skip
    environment = {**os.environ, **settings, "NOTES": str(notes)}
    subprocess.run(["bash", str(script_of("dt"))], env=environment, check=True, capture_output=True, timeout=60)
    said = notes.read_text().splitlines()
    samples, labels, trainings = (
        [line for line in said if line.startswith(f"nemo_aligner {name} ")] for name in ("sample", "label", "sft")
    )
    assert ['data.prompt_template="{input} <rm_score>: 2.0 "' in line for line in samples] == [False, True]
    policies = ("sft.nemo", f"{tmp_path}/loop/checkpoints/megatron_gpt_sft.nemo")
    assert [f"gpt_model_file={policy} " in line for line, policy in zip(samples, policies, strict=True)] == [True] * 2
    assert ["processor=dt" in line and "standardization.enable=True" in line for line in labels] == [True] * 2
    whole = 'model.data.train_ds.prompt_template="{input}{output}" model.optim.lr=1'
    assert [whole in line for line in trainings] == [True] * 2
