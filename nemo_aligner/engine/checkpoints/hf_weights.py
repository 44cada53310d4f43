"""Weight names and layouts: Hugging Face Llama, Qwen2, Qwen3[-MoE], Mistral, Mixtral ⇄ Megatron's GPTModel, whole.

Notation: G key/value heads, R query heads per key/value head, D head dimension, H hidden size, F FFN size.
Megatron keeps q, k and v in one matrix, group by group: `[G, (R + 2)·D, H]` = R query heads, one key, one value each;
and gate and up projections in one: `[2·F, H]`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from nemo_aligner.config.architecture import Architecture
from nemo_aligner.engine.checkpoints.lazy_tensors import LazyTensor, LazyTensors, lazily
from nemo_aligner.errors import CheckpointError

_LAYER = {  # Megatron name → Hugging Face name, below decoder.layers.N / model.layers.N
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
}
_QK_NORM = {
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
}
_TOP = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
}


_PROJ_BIAS = {"self_attention.linear_proj.bias": "self_attn.o_proj.bias"}

_DERIVED = re.compile(r".*(rotary_emb\.inv_freq|rotary_emb\.(cos|sin)_cached|attn\.bias|attn\.masked_bias)$")
"""Tensors that older files hold and that follow from the settings."""


def _layer_names(arch: Architecture, layer: int) -> dict[str, str]:
    """Tensors of a layer that are one on both sides."""
    names = {
        **_LAYER,
        **(_QK_NORM if arch.qk_layernorm else {}),
        **(_PROJ_BIAS if arch.has_proj_bias else {}),
    }
    if arch.has_experts(layer):
        names["mlp.router.weight"] = "mlp.gate.weight" if arch.qk_layernorm else "block_sparse_moe.gate.weight"
    for ours, (_, _, down) in _feed_forwards(arch, layer):
        names |= {f"{ours}linear_fc2.{kind}": f"{down}.{kind}" for kind in _kinds(arch.has_mlp_bias)}
    return names


def _feed_forwards(arch: Architecture, layer: int) -> Iterator[tuple[str, tuple[str, str, str]]]:
    """Of a layer, or of each of its experts: our prefix, and their names of gate, up and down projection."""
    if not arch.has_experts(layer):
        yield "mlp.", ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
        return
    for expert in range(arch.num_moe_experts or 0):
        theirs = f"mlp.experts.{expert}." if arch.qk_layernorm else f"block_sparse_moe.experts.{expert}."
        names = ("gate_proj", "up_proj", "down_proj") if arch.qk_layernorm else ("w1", "w3", "w2")  # Mixtral's
        gate, up, down = (theirs + name for name in names)
        yield f"mlp.experts.local_experts.{expert}.", (gate, up, down)


def _kinds(biased: bool) -> tuple[str, ...]:
    return ("weight", "bias") if biased else ("weight",)


def shape_of(arch: Architecture, name: str) -> tuple[int, ...]:
    """Of the tensor that Hugging Face calls `name`: a weight is `[out, in]`, a bias `[out]`, a norm `[size]`."""
    module, kind = name.split(".")[-2:]
    hidden, dim = arch.hidden_size, arch.head_dim
    ffn = arch.expert_ffn_hidden_size if ".experts." in name else arch.ffn_hidden_size
    shapes = {
        **dict.fromkeys(("embed_tokens", "lm_head"), (arch.vocab_size, hidden)),
        "q_proj": (arch.num_attention_heads * dim, hidden),
        **dict.fromkeys(("k_proj", "v_proj"), (arch.query_groups * dim, hidden)),
        "o_proj": (hidden, arch.num_attention_heads * dim),
        **dict.fromkeys(("q_norm", "k_norm"), (dim,)),
        "gate": (arch.num_moe_experts or 0, hidden),
        **dict.fromkeys(("gate_proj", "up_proj", "w1", "w3"), (ffn, hidden)),
        **dict.fromkeys(("down_proj", "w2"), (hidden, ffn)),
    }
    shape = shapes.get(module, (hidden,))  # of the other norms
    return shape[:1] if kind == "bias" else shape


def check_shape(arch: Architecture, name: str, tensor: LazyTensor, said: str = "") -> None:
    """Raises CheckpointError where a tensor that Hugging Face calls `name`, and its file `said`, is not the model's."""
    has, wanted = list(tensor.meta.shape), list(shape_of(arch, name))
    if has != wanted:
        raise CheckpointError(f"{said or name} is {has}, and the model's {wanted}")


def layer_of(name: str) -> int | None:
    """Which layer, from 0, a tensor of Hugging Face's names belongs to."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return None if layer is None else int(layer[1])


def to_megatron(arch: Architecture, hf: Mapping[str, Tensor], padded_vocab: int) -> LazyTensors:
    """Whole Megatron tensors (TP = PP = 1 names) from Hugging Face ones; embedding rows padded with zeros.

    Raises CheckpointError for a tensor that is missing, of another shape than the model's, or not used, and for a head
    that is not the embedding where the settings say that it is.
    """
    given = dict(part for whole, tensor in LazyTensors.of(hf).parts.items() for part in _unfused(arch, whole, tensor))
    used: set[str] = set()

    def take(name: str) -> LazyTensor:
        if name not in given:
            raise CheckpointError(f"the checkpoint has no tensor {name}")
        used.add(name)
        check_shape(arch, name, given[name])
        return given[name]

    def rows(name: str) -> LazyTensor:
        return lazily(lambda table: _padded(table, padded_vocab), take(name))

    out = {megatron: take(name) for megatron, name in _TOP.items()}
    out["embedding.word_embeddings.weight"] = rows(_TOP["embedding.word_embeddings.weight"])
    if not arch.share_embeddings_and_output_weights:
        out["output_layer.weight"] = rows("lm_head.weight")
    elif "lm_head.weight" in given:
        _check_tied(take("lm_head.weight"), take(_TOP["embedding.word_embeddings.weight"]))
    for layer in range(arch.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for megatron, name in _layer_names(arch, layer).items():
            out[ours + megatron] = take(theirs + name)
        for kind in _kinds(arch.qkv_bias):
            parts = [take(f"{theirs}self_attn.{p}_proj.{kind}") for p in "qkv"]
            out[f"{ours}self_attention.linear_qkv.{kind}"] = lazily(functools.partial(fuse_qkv, arch), *parts)
        for mlp, (gate, up, _) in _feed_forwards(arch, layer):
            for kind in _kinds(arch.has_mlp_bias):
                halves = [take(f"{theirs}{name}.{kind}") for name in (gate, up)]
                out[f"{ours}{mlp}linear_fc1.{kind}"] = lazily(lambda *both: torch.cat(both), *halves)
    _check_all_used(arch, given.keys() - used)
    return LazyTensors(out)


def _check_tied(head: LazyTensor, embedding: LazyTensor) -> None:
    """Raises CheckpointError where they differ: transformers unties them then; here the settings have to say so."""
    if not torch.equal(head.make(), embedding.make()):
        raise CheckpointError(
            "tie_word_embeddings=true, but lm_head.weight is not model.embed_tokens.weight; with false both are used"
        )


def _unfused(arch: Architecture, name: str, tensor: LazyTensor) -> Iterator[tuple[str, LazyTensor]]:
    """Phi3 keeps q, k and v in one tensor, and gate and up."""
    fused = re.search(r"\.(qkv|gate_up)_proj\.", name)
    if fused is None:
        yield name, tensor
        return
    names = [name.replace(fused[1], part) for part in ("qkv" if fused[1] == "qkv" else ("gate", "up"))]
    sizes = [shape_of(arch, part)[0] for part in names]
    if tensor.meta.shape[:1] != (sum(sizes),):
        raise CheckpointError(f"{name} is {list(tensor.meta.shape)}, and the model's has {sum(sizes)} rows")
    for i, part in enumerate(names):
        yield part, lazily(lambda whole, i=i: whole.split(sizes)[i], tensor)


def _check_all_used(arch: Architecture, left: Iterable[str]) -> None:
    """Raises CheckpointError for tensors that would be passed over."""
    unknown = sorted(name for name in left if not _DERIVED.match(name))
    more = [name for name in unknown if (layer := layer_of(name)) is not None and layer >= arch.num_layers]
    if more:
        raise CheckpointError(f"{more[0]} is of a layer above the model's {arch.num_layers}")
    if unknown:
        some = ", ".join(unknown[:3])
        raise CheckpointError(f"the checkpoint has {len(unknown)} tensors that are not understood, among them {some}")


def to_hf(arch: Architecture, megatron: Mapping[str, Tensor]) -> LazyTensors:
    """The inverse of `to_megatron`."""
    given = LazyTensors.of(megatron).parts

    def rows(name: str) -> LazyTensor:
        return lazily(lambda table: table[: arch.vocab_size], given[name])

    out = {name: given[ours] for ours, name in _TOP.items()}
    out["model.embed_tokens.weight"] = rows("embedding.word_embeddings.weight")
    if "output_layer.weight" in given:
        out["lm_head.weight"] = rows("output_layer.weight")
    for layer in range(arch.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for name, hf_name in _layer_names(arch, layer).items():
            out[theirs + hf_name] = given[ours + name]
        for kind in _kinds(arch.qkv_bias):
            whole = given[f"{ours}self_attention.linear_qkv.{kind}"]
            for i, p in enumerate("qkv"):
                part = lazily(lambda fused, i=i: split_qkv(arch, fused)[i], whole)
                out[f"{theirs}self_attn.{p}_proj.{kind}"] = part
        for mlp, (gate, up, _) in _feed_forwards(arch, layer):
            for kind in _kinds(arch.has_mlp_bias):
                whole = given[f"{ours}{mlp}linear_fc1.{kind}"]
                for i, name in enumerate((gate, up)):
                    out[f"{theirs}{name}.{kind}"] = lazily(lambda both, i=i: both.chunk(2)[i], whole)
    return LazyTensors({name: lazily(torch.Tensor.contiguous, part) for name, part in out.items()})


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
