"""Llama-shaped GGUF files: the shape, and tensors under their Hugging Face names."""

from __future__ import annotations

import functools
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_aligner.config.architecture import Architecture, RopeScaling
from nemo_aligner.engine.checkpoints.gguf_tokenizer import checked_tokenizer, tokenizer_json, tokenizer_settings
from nemo_aligner.engine.checkpoints.hf_weights import check_shape
from nemo_aligner.engine.checkpoints.lazy_tensors import LazyTensor, LazyTensors, lazily
from nemo_aligner.engine.checkpoints.settings import Settings, placed
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
_THEIRS = {  # ours → theirs
    "num_layers": "block_count",
    "hidden_size": "embedding_length",
    "ffn_hidden_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_query_groups": "attention.head_count_kv",
    "encoder_seq_length": "context_length",
    "rotary_base": "rope.freq_base",
    "rope_freq_factors": "rope_freqs.weight",
    "layernorm_epsilon": "attention.layer_norm_rms_epsilon",
    "window_size": "attention.sliding_window",
}
_FREQUENCIES = "rope_freqs.weight"
_HARMLESS = frozenset({"vocab_size", "rope.scaling.original_context_length", "rope.scaling.finetuned"})


def read_gguf(path: Path) -> tuple[Architecture, LazyTensors, bytes]:
    """Shape, tensors under their Hugging Face names, and tokenizer.json of a GGUF file. Raises CheckpointError."""
    require_extra("hf", f"--input {path}, a GGUF file,")
    import gguf

    class Bounded(gguf.GGUFReader):
        """Of a file that claims more than it has, the library's own would go on reading nothing, for years."""

        def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("it claims more than the file has")
            return super()._get(offset, dtype, count, override_order)

    try:
        reader = Bounded(path)
        values = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as fault:  # of a damaged file the reader may raise anything
        said = " ".join(str(fault).split())[:200]
        raise CheckpointError(f"--input {path}: not a whole GGUF file ({said})") from None
    with placed(f"--input {path}"):
        return _described(reader, values)


def _described(reader: Any, values: dict[str, Any]) -> tuple[Architecture, LazyTensors, bytes]:
    """Of a `gguf.GGUFReader` and its values. Raises CheckpointError."""
    kind = values.get("general.architecture")
    if kind != "llama":
        raise CheckpointError(f"GGUF architecture {kind!r} is not llama")
    settings = Settings(_below(values, "llama."), "llama")
    tokenizer = checked_tokenizer(_below(values, "tokenizer.ggml."))
    tensors = {tensor.name: _dequantised(tensor) for tensor in reader.tensors}
    frequencies = tensors.pop(_FREQUENCIES, None)
    arch = _architecture(settings, tensors, len(tokenizer["tokens"]))
    arch.rope_freq_factors = None if frequencies is None else frequencies.make().tolist()
    arch.tokenizer = tokenizer_settings(tokenizer, values.get("tokenizer.chat_template"))
    arch.check("llama", _THEIRS)
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
    heads, hidden = settings.whole("attention.head_count"), settings.whole("embedding_length")
    head_dim = settings.whole("attention.key_length", max(1, hidden // heads))
    if settings.get("attention.value_length", head_dim) != head_dim:
        raise CheckpointError("attention.key_length and attention.value_length differ, which is not supported")
    turned = settings.whole("rope.dimension_count", head_dim)
    if turned % 2 or turned > head_dim:
        raise CheckpointError(f"rope.dimension_count={turned} is not an even number up to the {head_dim} of a head")
    if settings.get("attention.causal") is False:
        raise CheckpointError("attention.causal=False is not supported: tokens would see those after them")
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
        rotary_base=settings.get("rope.freq_base", 10000.0),
        rotary_percentage=turned / head_dim,
        rope_scaling=_scaling(settings),
        layernorm_epsilon=_rounded(settings.needed("attention.layer_norm_rms_epsilon")),
        window_size=settings.get("attention.sliding_window"),
        qkv_bias="blk.0.attn_q.bias" in tensors,
        proj_bias="blk.0.attn_output.bias" in tensors or None,
        mlp_bias="blk.0.ffn_down.bias" in tensors or None,
        share_embeddings_and_output_weights="output.weight" not in tensors,
    )


def _rounded(value: Any) -> Any:
    """To the digits that float32 has of it."""
    return round(value, 12) if isinstance(value, float) else value


def _scaling(settings: Settings) -> RopeScaling | None:
    kind, factor = settings.get("rope.scaling.type", "none"), settings.get("rope.scaling.factor", 1.0)
    old = settings.get("rope.scale_linear", 1.0)
    if kind not in ("none", "linear"):
        raise CheckpointError(f"rope.scaling.type={kind} is not none or linear")
    found = old if kind == "none" else factor
    return None if found in (0.0, 1.0) else RopeScaling("linear", found)


def _hf_name(name: str) -> str:
    """Its own where it has none: it is then refused as one that is not understood."""
    if name in _TOP:
        return _TOP[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER:
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.{parts[3]}"
    return name


def _hf_order(name: str, value: LazyTensor, arch: Architecture) -> LazyTensor:
    """Raises CheckpointError for a query or key of another shape than the model's."""
    for part, heads in ((".attn_q.", arch.num_attention_heads), (".attn_k.", arch.query_groups)):
        if part in name:
            check_shape(arch, _hf_name(name), value, said=name)  # the rows of another could not be told apart
            turned = round(arch.head_dim * arch.rotary_percentage)
            return lazily(functools.partial(unpermuted, heads=heads, turned=turned), value)
    return value


def unpermuted(weight: Tensor, heads: int, turned: int) -> Tensor:
    """Undo GGUF's row order of q and k, in the first `turned` rows of each of `heads`, which the embedding turns.

    `[T/2, 2]` (rotary pairs side by side) → `[2, T/2]` (halves).
    """
    rows = weight.unflatten(0, (heads, -1))
    pairs = rows[:, :turned].unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
    return torch.cat((pairs, rows[:, turned:]), dim=1).flatten(0, 1)
