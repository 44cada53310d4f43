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
        ("normalization", "layernorm1p"), ("transformer_block_type", "post_ln"),
        ("moe_router_score_function", "sigmoid"), ("moe_shared_expert_intermediate_size", 8),
        ("rotary_interleaved", True), ("headscale", True), ("layernorm_zero_centered_gamma", True),
        ("apply_residual_connection_post_layernorm", True), ("peft", {"peft_scheme": "lora"}),
        ("seq_len_interpolation_factor", 4), ("attention_type", "multiquery"),
        ("apply_embedding_scaling", True), ("openai_gelu", True), ("final_logit_softcapping", 30.0),
        ("attn_logit_softcapping", 50.0), ("softmax_scale", 0.1), ("softmax_type", "learnable"), ("drop_layers", [1]),
        ("mcore_customization_config", {"parallel_attention": True}), ("no_rope_freq", 4), ("mtp_num_layers", 1),
        ("mcore_customization_config", "falcon"), ("multi_latent_attention", True), ("glu_linear_offset", 1.0),
    ],
)  # fmt: skip
def test_a_setting_that_means_another_model_is_refused(setting: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=setting):
        Architecture.from_nemo({**NEEDED, setting: value})


def test_the_values_that_nemo_writes_for_a_plain_model_are_let_through_and_written_back() -> None:
    plain = {
        "transformer_block_type": "pre_ln", "normalize_attention_scores": True, "headscale": False,
        "seq_len_interpolation_factor": None, "num_moe_experts": None, "apply_rope_fusion": True, "mcore_gpt": True,
        "openai_gelu": False, "apply_embedding_scaling": False, "softmax_scale": None, "drop_layers": None,
        "mcore_customization_config": {"new_decoder_architecture": False, "parallel_attention": False},
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


def refused(config: dict[str, Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        Architecture.from_nemo(config)
    return str(caught.value)


def test_what_an_archive_lacks_is_named() -> None:
    assert refused({}) == "model_config.yaml lacks ffn_hidden_size, hidden_size, num_attention_heads, num_layers"
    assert refused({key: 1 for key in NEEDED if key != "hidden_size"}) == "model_config.yaml lacks hidden_size"


def test_a_value_that_means_another_model_is_named_with_its_key() -> None:
    assert refused({**NEEDED, "headscale": True}) == "model_config.yaml: headscale=True is not supported"
    said = "model_config.yaml: mcore_customization_config: parallel_attention=True is not supported"
    assert refused({**NEEDED, "mcore_customization_config": {"parallel_attention": True}}) == said
    said = "model_config.yaml: normalization=layernorm1p is not rmsnorm or layernorm"
    assert refused({**NEEDED, "normalization": "layernorm1p"}) == said


def test_a_shape_comes_back_as_it_was_written_with_the_keys_of_others() -> None:
    arch = Architecture.from_nemo(
        {**NEEDED, "vocab_size": 9, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "data": {"a": 1}}
    )
    assert arch.rope_scaling == RopeScaling("linear", 2.0)
    assert (arch.vocab_size, arch.other) == (9, {"data": {"a": 1}})
    assert Architecture.from_nemo(arch.to_nemo()) == arch
    assert "other" not in arch.to_nemo()
    assert Architecture.from_nemo(NEEDED).vocab_size == 0, "left to the tokenizer"
    own = {**NEEDED, "rope_scaling": None, "scale_positional_embedding": True, "scale_factor": 4}
    assert Architecture.from_nemo(own).rope_scaling == RopeScaling("llama3", 4.0)


def test_of_two_lengths_one_that_is_not_given_is_the_other() -> None:
    for given in ("encoder_seq_length", "max_position_embeddings"):
        for kind in ("rope", "learned_absolute"):
            arch = Architecture.from_nemo({**NEEDED, given: 512, "position_embedding_type": kind})
            assert (arch.encoder_seq_length, arch.max_position_embeddings, arch.positions) == (512, 512, 512)


def test_rows_longer_than_max_position_embeddings_take_rotary_positions() -> None:
    lengths = {"encoder_seq_length": 64, "max_position_embeddings": 16}
    assert Architecture.from_nemo({**NEEDED, **lengths}).positions == 64
    assert Architecture(**NEEDED, vocab_size=9, encoder_seq_length=16, max_position_embeddings=64).positions == 64
    said = "model_config.yaml: encoder_seq_length=64 is above max_position_embeddings=16, and positions are learned"
    assert refused({**NEEDED, **lengths, "position_embedding_type": "learned_absolute"}) == said


def test_parts_that_are_not_given_follow_others() -> None:
    arch = Architecture(**NEEDED, vocab_size=9)
    assert (arch.query_groups, arch.head_dim, arch.has_proj_bias, arch.has_mlp_bias) == (2, 4, False, False)
    arch = Architecture(**NEEDED, vocab_size=9, num_query_groups=1, kv_channels=6, bias=True)
    assert (arch.query_groups, arch.head_dim, arch.has_proj_bias, arch.has_mlp_bias) == (1, 6, True, True)
    arch = Architecture(**NEEDED, vocab_size=9, bias=True, proj_bias=False, mlp_bias=False)
    assert (arch.has_proj_bias, arch.has_mlp_bias) == (False, False)
    arch = Architecture(**NEEDED, vocab_size=9, proj_bias=True)
    assert (arch.has_proj_bias, arch.has_mlp_bias) == (True, False)
