"""Weight names and layouts: Hugging Face Llama, Qwen2, Qwen3, Mistral ⇄ Megatron's GPTModel, whole tensors.

Notation: G key/value heads, R query heads per key/value head, D head dimension, H hidden size, F FFN size.
Megatron keeps q, k and v in one matrix, group by group: `[G, (R + 2)·D, H]` = R query heads, one key, one value each;
and gate and up projections in one: `[2·F, H]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nemo_aligner.config.architecture import Architecture, RopeScaling
from nemo_aligner.errors import CheckpointError

SUPPORTED = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM")

_LAYER = {  # Megatron name → Hugging Face name, below decoder.layers.N / model.layers.N
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
_QK_NORM = {
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
}
_TOP = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
}


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The shape a Hugging Face `config.json` describes. Raises CheckpointError for other architectures."""
    name = (config.get("architectures") or ["none"])[0]
    if name not in SUPPORTED:
        raise CheckpointError(f"architecture {name} is not one of {', '.join(SUPPORTED)}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    sliding = config.get("sliding_window") if name == "MistralForCausalLM" or config.get("use_sliding_window") else None
    length = config["max_position_embeddings"]
    return Architecture(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config.get("num_key_value_heads"),
        kv_channels=config.get("head_dim"),
        vocab_size=config["vocab_size"],
        encoder_seq_length=length,
        max_position_embeddings=length,
        rotary_base=float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        rope_scaling=_rope_scaling(rope),
        layernorm_epsilon=config["rms_norm_eps"],
        qkv_bias=name == "Qwen2ForCausalLM" or bool(config.get("attention_bias")),
        qk_layernorm=name == "Qwen3ForCausalLM",
        window_size=sliding,
        share_embeddings_and_output_weights=bool(config.get("tie_word_embeddings", False)),
    )


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("llama3", "linear"):
        raise CheckpointError(f"rope_scaling type {kind!r} is not one of llama3, linear")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return RopeScaling(rope_type=kind, **{name: rope[name] for name in names if name in rope})


def to_hf_config(arch: Architecture, torch_dtype: str) -> dict[str, Any]:
    """The `config.json` of a shape, as the Hugging Face architecture it belongs to."""
    name = (
        "Qwen3ForCausalLM" if arch.qk_layernorm
        else "Qwen2ForCausalLM" if arch.qkv_bias
        else "MistralForCausalLM" if arch.window_size else "LlamaForCausalLM"
    )  # fmt: skip
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": arch.rotary_base}
    if arch.rope_scaling is not None:
        rope |= vars(arch.rope_scaling)
    return {
        "architectures": [name],
        "model_type": name.removesuffix("ForCausalLM").lower(),
        "num_hidden_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "num_key_value_heads": arch.query_groups,
        "head_dim": arch.head_dim,
        "vocab_size": arch.vocab_size,
        "max_position_embeddings": arch.max_position_embeddings,
        "rope_theta": arch.rotary_base,
        "rope_parameters": rope,
        "rms_norm_eps": arch.layernorm_epsilon,
        "hidden_act": "silu",
        "attention_bias": arch.qkv_bias and name == "LlamaForCausalLM",
        "sliding_window": arch.window_size,
        "tie_word_embeddings": arch.share_embeddings_and_output_weights,
        "dtype": torch_dtype,
    }


def to_megatron(arch: Architecture, hf: Mapping[str, Tensor], padded_vocab: int) -> dict[str, Tensor]:
    """Whole Megatron tensors (TP = PP = 1 names) from Hugging Face ones; embedding rows padded with zeros."""

    def take(name: str) -> Tensor:
        if name not in hf:
            raise CheckpointError(f"the checkpoint has no tensor {name}")
        return hf[name]

    out = {megatron: take(name) for megatron, name in _TOP.items()}
    out["embedding.word_embeddings.weight"] = _padded(out["embedding.word_embeddings.weight"], padded_vocab)
    if not arch.share_embeddings_and_output_weights:
        out["output_layer.weight"] = _padded(take("lm_head.weight"), padded_vocab)
    for layer in range(arch.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for megatron, name in {**_LAYER, **(_QK_NORM if arch.qk_layernorm else {})}.items():
            out[ours + megatron] = take(theirs + name)
        for kind in ("weight", "bias") if arch.qkv_bias else ("weight",):
            parts = [take(f"{theirs}self_attn.{p}_proj.{kind}") for p in "qkv"]
            out[f"{ours}self_attention.linear_qkv.{kind}"] = fuse_qkv(arch, *parts)
        gate, up = take(f"{theirs}mlp.gate_proj.weight"), take(f"{theirs}mlp.up_proj.weight")
        out[f"{ours}mlp.linear_fc1.weight"] = torch.cat((gate, up))
    return out


def to_hf(arch: Architecture, megatron: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_megatron`."""
    out = {name: megatron[ours] for ours, name in _TOP.items()}
    out["model.embed_tokens.weight"] = out["model.embed_tokens.weight"][: arch.vocab_size]
    if "output_layer.weight" in megatron:
        out["lm_head.weight"] = megatron["output_layer.weight"][: arch.vocab_size]
    for layer in range(arch.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for name, hf_name in {**_LAYER, **(_QK_NORM if arch.qk_layernorm else {})}.items():
            out[theirs + hf_name] = megatron[ours + name]
        for kind in ("weight", "bias") if arch.qkv_bias else ("weight",):
            parts = split_qkv(arch, megatron[f"{ours}self_attention.linear_qkv.{kind}"])
            out |= {f"{theirs}self_attn.{p}_proj.{kind}": part for p, part in zip("qkv", parts, strict=True)}
        gate, up = megatron[f"{ours}mlp.linear_fc1.weight"].chunk(2)
        out |= {f"{theirs}mlp.gate_proj.weight": gate, f"{theirs}mlp.up_proj.weight": up}
    return {name: tensor.contiguous() for name, tensor in out.items()}


def fuse_qkv(arch: Architecture, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """q `[G·R·D, ...]`, k and v `[G·D, ...]` → `[G·(R + 2)·D, ...]`, group by group (weights or biases)."""
    groups = arch.query_groups
    parts = [t.reshape(groups, -1, *t.shape[1:]) for t in (query, key, value)]
    return torch.cat(parts, dim=1).reshape(-1, *query.shape[1:])


def split_qkv(arch: Architecture, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `fuse_qkv`."""
    groups, dim = arch.query_groups, arch.head_dim
    per_group = arch.num_attention_heads // groups
    grouped = fused.reshape(groups, (per_group + 2) * dim, *fused.shape[1:])
    query, key, value = grouped.split((per_group * dim, dim, dim), dim=1)
    return tuple(t.reshape(-1, *fused.shape[1:]) for t in (query, key, value))  # type: ignore[return-value]


def _padded(rows: Tensor, count: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, 0, 0, count - rows.size(0)))
