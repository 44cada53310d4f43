"""NeMo's keys of an adapter mean what they say, or are refused by their full name."""

from __future__ import annotations

import functools
from typing import Any, cast

import pytest
from omegaconf import DictConfig, OmegaConf

from nemo_aligner.config.architecture import Architecture
from nemo_aligner.config.load import load_config
from nemo_aligner.config.peft import LoraTuning
from nemo_aligner.config.supervised import SFTConfig
from nemo_aligner.errors import CheckpointError, ConfigError
from tests.unit.config.test_load import composed

LORA = "model.peft.lora_tuning"


@functools.cache
def shipped() -> DictConfig:
    return composed("conf/gpt_sft", ["model.restore_from_path=m"])


def loaded(*overrides: str) -> SFTConfig:
    return load_config(cast(DictConfig, OmegaConf.merge(shipped(), OmegaConf.from_dotlist([*overrides]))), SFTConfig)


def test_target_modules_are_layers_of_megatron_in_their_order() -> None:
    assert loaded().model.peft.lora is None
    assert loaded("model.peft.peft_scheme=none").model.peft.lora is None
    given = loaded("model.peft.peft_scheme=lora", f"{LORA}.target_modules=[mlp,attention_qkv]", f"{LORA}.alpha=8")
    lora = given.model.peft.lora
    assert lora is not None
    assert lora.linears == ("linear_qkv", "linear_fc1", "linear_fc2")
    assert lora.scale == 8 / 32
    assert LoraTuning().scale == 1
    assert LoraTuning(target_modules=["all", "mlp"]).linears == (
        "linear_qkv",
        "linear_proj",
        "linear_fc1",
        "linear_fc2",
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.peft.peft_scheme=ptuning", "'ptuning' is not lora or none"),
        ("model.peft.merge=True", "there is no adapter; set model.peft.peft_scheme=lora"),
        ("model.peft.restore_from_path=a.nemo", "there is no adapter; set model.peft.peft_scheme=lora"),
        (f"{LORA}.adapter_dim=0", "0 is below 1"),
        (f"{LORA}.alpha=0", "0.0 is not above 0"),
        (f"{LORA}.adapter_dropout=1", "1.0 is not from 0 to below 1"),
        (
            f"{LORA}.target_modules=[q_proj]",
            "'q_proj' is not one of attention_qkv, attention_dense, attention, mlp_fc1",
        ),
        (f"{LORA}.target_modules=[]", "an empty list is not one of attention_qkv"),
        (f"{LORA}.variant=dora", "'dora' is not one of nemo, canonical"),
        (f"{LORA}.layer_selection=[1]", "[1] is not offered; all layers have an adapter"),
        (f"{LORA}.weight_tying=True", "True is not offered; layers share no adapter"),
        (f"{LORA}.row_init_method=xavier", "'xavier' is not offered; B begins at 0"),
    ],
)
def test_what_is_no_adapter_is_one_line_that_names_the_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(override)
    assert str(caught.value).startswith(f"{override.partition('=')[0]}: {message}")


@pytest.mark.parametrize(
    "peft",
    [
        {"peft_scheme": "ptuning"},
        {"peft_scheme": "lora", "lora_tuning": {"adapter_dim": 8}},
        {"peft_scheme": "lora", "lora_tuning": {"adapter_dim": 0}, "base": {"path": "b", "sha256": "s"}},
        {"peft_scheme": "lora", "lora_tuning": {"new_setting": 1}, "base": {"path": "b", "sha256": "s"}},
    ],
)
def test_an_archive_of_an_adapter_that_is_not_understood_is_refused(peft: dict[str, Any]) -> None:
    shape = {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 16, "num_attention_heads": 2}
    with pytest.raises(CheckpointError, match=r"^model_config.yaml: peft"):
        Architecture.from_nemo({**shape, "peft": peft})
    for plain in (None, {"peft_scheme": None}, {"peft_scheme": "none"}):
        assert Architecture.from_nemo({**shape, "peft": plain}).peft is None
