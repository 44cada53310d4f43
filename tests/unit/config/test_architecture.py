"""What an archive says of its model is used, or known to change nothing, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_aligner.config.architecture import Architecture, RopeScaling
from nemo_aligner.errors import CheckpointError

NEEDED = {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 16, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("normalization", "layernorm1p"), ("num_moe_experts", 8), ("transformer_block_type", "post_ln"),
        ("rotary_interleaved", True), ("headscale", True), ("layernorm_zero_centered_gamma", True),
        ("apply_residual_connection_post_layernorm", True), ("peft", {"peft_scheme": "lora"}),
        ("seq_len_interpolation_factor", 4), ("attention_type", "multiquery"),
    ],
)  # fmt: skip
def test_a_setting_that_means_another_model_is_refused(setting: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=setting):
        Architecture.from_nemo({**NEEDED, setting: value})


def test_the_values_that_nemo_writes_for_a_plain_model_are_let_through_and_written_back() -> None:
    plain = {
        "transformer_block_type": "pre_ln", "normalize_attention_scores": True, "headscale": False,
        "seq_len_interpolation_factor": None, "num_moe_experts": None, "apply_rope_fusion": True, "mcore_gpt": True,
        "normalization": "layernorm", "data": {"seq_length": 2048},
    }  # fmt: skip
    written = Architecture.from_nemo({**NEEDED, **plain}).to_nemo()
    assert {name: written[name] for name in plain} == plain


def test_nemos_scaling_of_llama_3_1_is_used() -> None:
    arch = Architecture.from_nemo({**NEEDED, "scale_positional_embedding": True})
    assert arch.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert Architecture.from_nemo({**NEEDED, "scale_positional_embedding": False}).rope_scaling is None


def test_windows_belong_to_the_layers_that_are_named() -> None:
    arch = Architecture(**NEEDED, vocab_size=9, window_size=4)
    assert [arch.window_of(layer) for layer in range(2)] == [4, 4]
    arch.window_layers = [1]
    assert [arch.window_of(layer) for layer in range(2)] == [None, 4]
