"""Converted checkpoints give the logits that transformers gives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from nemo_aligner.config.architecture import RopeScaling
from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine.checkpoints.hf_config import architecture_of, to_hf_config
from nemo_aligner.engine.checkpoints.hf_weights import fuse_qkv, shape_of, split_qkv, to_hf, to_megatron
from nemo_aligner.engine.model.build import RunOptions, build_model, padded_vocab_size
from nemo_aligner.engine.processes.cluster import MegatronCluster, start_cluster
from nemo_aligner.errors import CheckpointError
from tests.hugging_face import random_model

SHAPE = {
    "vocab_size": 130, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, tied, no GQA": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama 3 rope": ("Llama", {"rope_parameters": LLAMA3}),
    "linear rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": 6}),
    "llama, biases of attention": ("Llama", {"attention_bias": True}),
    "llama, biases of the feed-forward": ("Llama", {"mlp_bias": True}),
    "llama, both": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen3, biases of attention": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen2, windows above": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2, windows below": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "qwen2, no window after all": ("Qwen2", {"use_sliding_window": False, "sliding_window": 5}),
    "gelu": ("Llama", {"hidden_act": "gelu"}),
    "gelu, tanh": ("Llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "relu": ("Llama", {"hidden_act": "relu"}),
    "relu2": ("Mistral", {"hidden_act": "relu2", "sliding_window": None}),
    "phi3": ("Phi3", {"sliding_window": 6, "pad_token_id": 0}),
    "phi3, part of the head turned": ("Phi3", {"pad_token_id": 0, "rope_parameters": PARTIAL}),
}
ONE_WAY = {"phi3", "phi3, part of the head turned"}  # written as what they are equal to, or not at all


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[MegatronCluster]:
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1, seed=11) as cluster:
        yield cluster


def hugging_face(family: str, extra: dict[str, Any]) -> torch.nn.Module:
    return random_model(family, {**SHAPE, **extra})


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_and_the_way_back_is_exact(case: str) -> None:
    model = hugging_face(*CASES[case])
    config = {**json.loads(model.config.to_json_string()), "architectures": [type(model).__name__]}
    arch = architecture_of(config)
    ours = build_model(arch, RunOptions()).eval()
    tensors = dict(model.state_dict())
    converted = to_megatron(arch, tensors, padded_vocab_size(arch, 1))
    missing, unexpected = ours.load_state_dict(converted, strict=False)
    assert not unexpected
    assert all("_extra_state" in name for name in missing if not name.startswith("output_layer"))
    assert arch.num_layers == 2
    tokens = torch.randint(0, arch.vocab_size, (3, 20))
    with torch.no_grad():
        expected = model(tokens).logits
        found = ours(tokens, torch.arange(20).expand(3, 20), None)[..., : arch.vocab_size]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    if case in ONE_WAY:
        return
    back = to_hf(arch, converted)
    assert set(tensors) - set(back) <= ({"lm_head.weight"} if arch.share_embeddings_and_output_weights else set())
    for name, tensor in back.items():
        assert torch.equal(tensor, tensors[name]), name
    assert architecture_of(to_hf_config(arch, "float32")) == replace(arch, kv_channels=arch.head_dim)


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Qwen3Moe", "Mistral", "Phi3"])
def test_the_layers_that_have_a_window_are_those_that_transformers_names(family: str, first: int) -> None:
    asked = {"sliding_window": 5, "max_window_layers": first, "use_sliding_window": True}
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **asked, "pad_token_id": 0}).to_dict()
    kinds = config.pop("layer_types", ["sliding_attention"] * 2)  # most have no choice
    arch = architecture_of({**config, "architectures": [f"{family}ForCausalLM"]})
    assert [arch.window_of(i) for i in range(2)] == [5 if kind == "sliding_attention" else None for kind in kinds]


@pytest.mark.parametrize("block", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", ["type", "rope_type"])
def test_the_rotary_settings_are_found_wherever_transformers_has_put_them(block: str, name: str) -> None:
    linear = {name: "linear", "factor": 2.0}
    config = {**SHAPE, "architectures": ["Phi3ForCausalLM"], "rms_norm_eps": 1e-5}  # others turn whole heads
    bare = architecture_of(config)
    assert (bare.rotary_base, bare.rotary_percentage, bare.rope_scaling) == (10000.0, 1.0, None)
    for found in (
        architecture_of({**config, "rope_theta": 5e3, "partial_rotary_factor": 0.5, block: linear}),
        architecture_of({**config, block: {**linear, "rope_theta": 5e3, "partial_rotary_factor": 0.5}}),
    ):
        assert (found.rotary_base, found.rotary_percentage) == (5e3, 0.5)
        assert found.rope_scaling == RopeScaling(rope_type="linear", factor=2.0)


def test_qkv_split_undoes_fuse() -> None:
    arch = architecture_of({**SHAPE, "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5})
    parts = torch.randn(32, 32), torch.randn(16, 32), torch.randn(16, 32)
    for part, again in zip(parts, split_qkv(arch, fuse_qkv(arch, *parts)), strict=True):
        assert torch.equal(part, again)


@pytest.mark.parametrize("kinds", [["full_attention", "chunked_attention"], ["full_attention"]])
def test_kinds_of_attention_that_are_not_known_are_refused(kinds: list[str]) -> None:
    config = {**SHAPE, "architectures": ["Qwen3ForCausalLM"], "rms_norm_eps": 1e-5, "head_dim": 8}
    with pytest.raises(CheckpointError, match=r"layer_types: \d of .*full_attention.* for 2 layers"):
        architecture_of({**config, "use_sliding_window": True, "sliding_window": 4, "layer_types": kinds})


@pytest.mark.parametrize("family", ["Mistral", "Mixtral", "Qwen3Moe"])
def test_layers_that_transformers_would_not_look_at_are_refused(family: str) -> None:
    more = {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]}
    experts = {} if family == "Mistral" else {"num_experts": 4, "num_experts_per_tok": 2}
    config = {**SHAPE, **more, **experts, "architectures": [f"{family}ForCausalLM"], "rms_norm_eps": 1e-5}
    said = rf"layer_types: 2 of .*; {family}ForCausalLM has sliding_attention alone"
    with pytest.raises(CheckpointError, match=f"^{said}$"):
        architecture_of(config)
    assert architecture_of({**config, "layer_types": ["sliding_attention"] * 2}).window_layers is None


def test_other_architectures_are_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match="architecture GPT2LMHeadModel is not one of LlamaForCausalLM"):
        architecture_of({"architectures": ["GPT2LMHeadModel"]})


def test_of_many_tensors_that_are_not_understood_the_first_three_are_named() -> None:
    arch = architecture_of({**SHAPE, "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5})
    known = dict(hugging_face("Llama", {}).state_dict())
    more = {name: torch.ones(1) for name in ("d", "b", "a", "c", "lm_head.bias")}
    with pytest.raises(CheckpointError, match=r"has 5 tensors that are not understood, among them a, b, c$"):
        to_megatron(arch, {**known, **more}, 256)


def test_missing_tensors_are_named() -> None:
    arch = architecture_of({**SHAPE, "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5})
    with pytest.raises(CheckpointError, match=r"no tensor model\.embed_tokens\.weight"):
        to_megatron(arch, {}, 256)


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("Llama", {"vocab_size": 100}, "model.embed_tokens.weight is [130, 32], and the model's [100, 32]"),
        ("Llama", {"vocab_size": 200}, "model.embed_tokens.weight is [130, 32], and the model's [200, 32]"),
        ("Llama", {"num_query_groups": 1}, "{layer}self_attn.k_proj.weight is [16, 32], and the model's [8, 32]"),
        ("Llama", {"kv_channels": 4}, "{layer}self_attn.o_proj.weight is [32, 32], and the model's [32, 16]"),
        ("Llama", {"ffn_hidden_size": 40}, "{layer}mlp.down_proj.weight is [32, 48], and the model's [32, 40]"),
        ("Phi3", {"num_query_groups": 4}, "{layer}self_attn.qkv_proj.weight is [64, 32], and the model's has 96 rows"),
        ("Phi3", {"ffn_hidden_size": 40}, "{layer}mlp.gate_up_proj.weight is [96, 32], and the model's has 80 rows"),
        ("Llama", {"num_layers": 3}, "the checkpoint has no tensor model.layers.2.input_layernorm.weight"),
        (
            "Llama",
            {"num_layers": 1},
            "model.layers.1.input_layernorm.weight is of a layer above the model's 1",
        ),
    ],
)
def test_weights_of_another_size_than_the_settings_say_are_neither_cropped_nor_filled_up(
    family: str, changes: dict[str, Any], said: str
) -> None:
    model = hugging_face(family, {"pad_token_id": 0})
    config = {**json.loads(model.config.to_json_string()), "architectures": [type(model).__name__]}
    with pytest.raises(CheckpointError) as refusal:
        to_megatron(replace(architecture_of(config), **changes), dict(model.state_dict()), 256)
    assert str(refusal.value) == said.replace("{layer}", "model.layers.0.")


def test_a_head_beside_tied_embeddings_is_the_same_or_refused_and_never_dropped() -> None:
    model = hugging_face("Llama", {})
    arch = architecture_of({**json.loads(model.config.to_json_string()), "architectures": ["LlamaForCausalLM"]})
    tied, given = replace(arch, share_embeddings_and_output_weights=True), dict(model.state_dict())
    with pytest.raises(CheckpointError, match=r"^tie_word_embeddings=true, but lm_head\.weight is not model\.embed_"):
        to_megatron(tied, given, 256)
    given["lm_head.weight"] = given["model.embed_tokens.weight"].clone()
    assert "output_layer.weight" not in to_megatron(tied, given, 256)


@pytest.mark.parametrize("case", ["llama, both", "qwen3, biases of attention", "qwen2"])
def test_the_shape_of_every_tensor_is_the_one_transformers_gives_it(case: str) -> None:
    model = hugging_face(*CASES[case])
    arch = architecture_of({**json.loads(model.config.to_json_string()), "architectures": [type(model).__name__]})
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: shape_of(arch, name) for name in shapes} == shapes
