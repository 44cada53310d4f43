"""Every fault of an override is one line that names it and says what would be right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from nemo_aligner.config.overrides import explained

CONF = Path(__file__).resolve().parents[3] / "examples/nlp/gpt/conf"


def fault_of(override: str) -> HydraException:
    with initialize_config_dir(str(CONF), version_base=None), pytest.raises(HydraException) as caught:
        compose("gpt_sft", overrides=[override])
    return caught.value


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.optim.lrr=1", "model.optim.lrr: no such key, did you mean model.optim.lr"),
        ("model.data.train_ds.prompt_tmplate=a", "model.data.train_ds.prompt_tmplate: no such key, did you mean "
         "model.data.train_ds.prompt_template"),
        ("sft.max_steps=1", "sft.max_steps: no such key, did you mean trainer.sft.max_steps"),
        ("~model.optim.shed", "model.optim.shed: no such key, did you mean model.optim.sched"),
        ("zzz=1", "zzz: no such key"),
        ("+zzz", "+zzz: not key=value"),
    ],
)  # fmt: skip
def test_a_key_that_is_not_there_is_named_with_the_one_that_was_meant(override: str, says: str) -> None:
    assert explained(fault_of(override), CONF / "gpt_sft.yaml") == says


@pytest.mark.parametrize("value", ["a=b.jsonl", "{input} {output}", 'say "hi", {x}', "[a"])
def test_the_quoting_that_is_offered_is_read_as_the_text_that_was_meant(value: str) -> None:
    said = explained(fault_of(f"model.data.train_ds.file_path={value}"), CONF / "gpt_sft.yaml")
    assert said is not None
    quoted = said.partition(", '")[2].removesuffix("'")
    assert quoted
    [read] = OverridesParser.create().parse_overrides([quoted])
    assert (read.key_or_group, read.value()) == ("model.data.train_ds.file_path", value)


def test_other_faults_are_left_to_hydra() -> None:
    with initialize_config_dir(str(CONF), version_base=None), pytest.raises(HydraException) as caught:
        compose("no_such_config")
    assert explained(caught.value, CONF / "gpt_sft.yaml") is None


@pytest.mark.processes
def test_the_script_says_it_in_one_line() -> None:
    command = [sys.executable, str(CONF.parent / "train_gpt_sft.py"), "model.optim.lrr=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=CONF.parents[3])
    assert done.returncode == 1
    assert done.stderr == "error: model.optim.lrr: no such key, did you mean model.optim.lr\n"
