"""Llama-shaped GGUF files: the shape, and tensors under their Hugging Face names."""

from __future__ import annotations

import functools
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_aligner.config.architecture import Architecture, RopeScaling
from nemo_aligner.engine.checkpoints.gguf_tokenizer import tokenizer_json, tokenizer_settings
from nemo_aligner.engine.checkpoints.lazy_tensors import LazyTensor, LazyTensors, lazily
from nemo_aligner.engine.checkpoints.settings import Settings
from nemo_aligner.errors import CheckpointError
from nemo_aligner.extras import require_extra

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FREQUENCIES = "rope_freqs.weight"
_HARMLESS = frozenset({"vocab_size", "rope.scaling.original_context_length", "rope.scaling.finetuned"})


def read_gguf(path: Path) -> tuple[Architecture, LazyTensors, bytes]:
    """Shape, tensors under their Hugging Face names, and tokenizer.json of a GGUF file. Raises CheckpointError."""
    require_extra("hf", f"--input {path}, a GGUF file,")
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError) as fault:
        raise CheckpointError(f"--input {path}: not a whole GGUF file ({fault})") from None
    values = {name: field.contents() for name, field in reader.fields.items()}
    kind = values.get("general.architecture")
    if kind != "llama":
        raise CheckpointError(f"--input {path}: GGUF architecture {kind!r} is not llama")
    settings = Settings(_below(values, "llama."), f"--input {path}: llama")
    tokenizer = _below(values, "tokenizer.ggml.")
    tensors = {tensor.name: _dequantised(tensor) for tensor in reader.tensors}
    frequencies = tensors.pop(_FREQUENCIES, None)
    arch = _architecture(settings, tensors, len(tokenizer["tokens"]))
    arch.rope_freq_factors = None if frequencies is None else frequencies.make().tolist()
    arch.tokenizer = tokenizer_settings(tokenizer, values.get("tokenizer.chat_template"))
    settings.check_all_used(_HARMLESS)
    named = {_hf_name(name): _hf_order(name, value, arch) for name, value in tensors.items()}
    return arch, LazyTensors(named), tokenizer_json(tokenizer)


def _dequantised(tensor: Any) -> LazyTensor:
    """Of a `gguf.ReaderTensor`, whose numbers stay in the file until they are asked for; float32."""
    import gguf

    shape = tuple(int(length) for length in reversed(tensor.shape))
    return LazyTensor(
        torch.empty(shape, device="meta"),
        lambda: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()),
    )


def _below(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def _architecture(settings: Settings, tensors: Collection[str], vocabulary: int) -> Architecture:
    heads, hidden = settings.needed("attention.head_count"), settings.needed("embedding_length")
    head_dim = settings.get("attention.key_length", hidden // heads)
    if settings.get("attention.value_length", head_dim) != head_dim:
        raise CheckpointError("attention.key_length and attention.value_length differ, which is not supported")
    return Architecture(
        num_layers=settings.needed("block_count"),
        hidden_size=hidden,
        ffn_hidden_size=settings.needed("feed_forward_length"),
        num_attention_heads=heads,
        num_query_groups=settings.get("attention.head_count_kv", heads),
        kv_channels=head_dim,
        vocab_size=vocabulary,
        encoder_seq_length=settings.needed("context_length"),
        max_position_embeddings=settings["context_length"],
        rotary_base=float(settings.get("rope.freq_base", 10000.0)),
        rotary_percentage=settings.get("rope.dimension_count", head_dim) / head_dim,
        rope_scaling=_scaling(settings),
        layernorm_epsilon=round(float(settings.needed("attention.layer_norm_rms_epsilon")), 12),
        window_size=settings.get("attention.sliding_window"),
        qkv_bias="blk.0.attn_q.bias" in tensors,
        proj_bias="blk.0.attn_output.bias" in tensors or None,
        mlp_bias="blk.0.ffn_down.bias" in tensors or None,
        share_embeddings_and_output_weights="output.weight" not in tensors,
    )


def _scaling(settings: Settings) -> RopeScaling | None:
    kind, factor = settings.get("rope.scaling.type", "none"), settings.get("rope.scaling.factor", 1.0)
    old = settings.get("rope.scale_linear", 1.0)
    if kind not in ("none", "linear"):
        raise CheckpointError(f"rope.scaling.type={kind} is not none or linear")
    found = old if kind == "none" else factor
    return None if found in (0.0, 1.0) else RopeScaling("linear", float(found))


def _hf_name(name: str) -> str:
    """Its own where it has none: it is then refused as one that is not understood."""
    if name in _TOP:
        return _TOP[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER:
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.{parts[3]}"
    return name


def _hf_order(name: str, value: LazyTensor, arch: Architecture) -> LazyTensor:
    for part, heads in ((".attn_q.", arch.num_attention_heads), (".attn_k.", arch.query_groups)):
        if part in name:
            return lazily(functools.partial(unpermuted, heads=heads), value)
    return value


def unpermuted(weight: Tensor, heads: int) -> Tensor:
    """Undo GGUF's row order of q and k: `[heads, D/2, 2]` (interleaved rotary pairs) → `[heads, 2, D/2]` (halves)."""
    shape = weight.shape
    return weight.view(heads, shape[0] // heads // 2, 2, *shape[1:]).transpose(1, 2).reshape(shape)
