"""How many parameters a process has, and how wide the parts of its layers are, from the model's shape and its cut.

Notation: H hidden size, F FFN size, n query heads, G key/value heads, D head dimension, E experts, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nemo_aligner.config.architecture import Architecture, padded_vocab_size


@dataclass(frozen=True)
class Layout:
    """How a model is cut over processes, and which activations are computed twice instead of kept."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1  # stages of a rank
    dp: int = 1
    ep: int = 1  # ranks that share the experts of a layer
    etp: int | None = None  # ranks that share an expert; None: as tp
    sequence_parallel: bool = False
    granularity: str | None = None  # as model.activations_checkpoint_*: selective or full
    method: str = "uniform"  # with full: uniform or block
    num_layers: int = 1  # with full: layers per recomputed part, or how many layers are recomputed

    @property
    def expert_tp(self) -> int:
        return self.etp or self.tp

    @property
    def expert_dp(self) -> int:
        """Ranks that have the same part of the same experts."""
        return self.tp * self.dp // (self.ep * self.expert_tp)

    @property
    def gathers_experts(self) -> bool:
        """Whether generation makes itself experts that are cut over tensor-parallel ranks alone."""
        return self.ep > 1 or self.expert_tp != self.tp


@dataclass(frozen=True)
class Parameters:
    """Of one process: those that data-parallel ranks have alike, and those of experts, which fewer have alike."""

    shared: int
    experts: int = 0

    @property
    def total(self) -> int:
        return self.shared + self.experts

    def of_optimizer(self, layout: Layout, *, sharded: bool) -> int:
        """Those whose state this process keeps."""
        return self.shared // layout.dp + self.experts // layout.expert_dp if sharded else self.total


def stage_parameters(arch: Architecture, layout: Layout, stage: int) -> Parameters:
    """Of one process of pipeline stage `stage`, counted from 0."""
    table = table_size(arch, layout)
    first, last = stage == 0, stage == layout.pp - 1
    shared = experts = 0
    for layer in stage_layers(arch, layout, stage):
        shared += _layer(arch, layout.tp, dense=not arch.has_experts(layer))
        experts += expert_parameters(arch, layout) if arch.has_experts(layer) else 0
    if first:
        shared += table
        shared += arch.max_position_embeddings * arch.hidden_size if arch.position_embedding_type != "rope" else 0
    if last:
        shared += norm_size(arch, arch.hidden_size)
        if arch.reward_model_type is not None:
            shared += arch.hidden_size + 1
        elif not arch.share_embeddings_and_output_weights or not first:
            shared += table  # tied ones are there twice when the stages are two
    return Parameters(shared, experts)


def stage_layers(arch: Architecture, layout: Layout, stage: int) -> Iterator[int]:
    """The layers of pipeline rank `stage`, counted from 0: with several stages on a rank they take turns."""
    each = arch.num_layers // (layout.pp * layout.vpp)
    return (layer for layer in range(arch.num_layers) if layer // each % layout.pp == stage)


def _layer(arch: Architecture, tp: int, *, dense: bool) -> int:
    """A decoder layer on one tensor-parallel rank; without its experts, where it has some."""
    hidden, ffn = arch.hidden_size, arch.ffn_hidden_size // tp
    queries, heads, fc1 = query_size(arch, tp), mixed_size(arch, tp), ffn * (2 if is_gated(arch) else 1)
    weights = hidden * (heads + queries + (fc1 + ffn if dense else arch.num_moe_experts or 0))
    biases = (heads if arch.bias or arch.qkv_bias else 0) + (hidden if arch.has_proj_bias else 0)
    biases += fc1 + hidden if arch.has_mlp_bias and dense else 0
    norms = 2 * norm_size(arch, arch.head_dim) if arch.qk_layernorm else 0
    return weights + biases + norms + 2 * norm_size(arch, hidden)


def expert_parameters(arch: Architecture, layout: Layout) -> int:
    """A process's part of the experts of a layer."""
    own = (arch.num_moe_experts or 0) // layout.ep
    return own * arch.hidden_size * (3 if is_gated(arch) else 2) * (arch.expert_ffn_hidden_size // layout.expert_tp)


def gathered_experts(arch: Architecture, layout: Layout, stage: int) -> int:
    """Parameters that generation holds beside the model's."""
    if not layout.gathers_experts:
        return 0
    layers = sum(arch.has_experts(layer) for layer in stage_layers(arch, layout, stage))
    return layers * expert_parameters(arch, Layout(tp=layout.tp))


def largest_weight(arch: Architecture, layout: Layout, stage: int) -> int:
    """Elements of it."""
    halves = 2 if is_gated(arch) else 1
    sizes = [arch.hidden_size * halves * arch.ffn_hidden_size // layout.tp]
    if stage in (0, layout.pp - 1):
        sizes.append(table_size(arch, layout))
    if arch.num_moe_experts is not None:
        sizes.append(arch.hidden_size * halves * arch.expert_ffn_hidden_size // layout.expert_tp)
    return max(sizes)


def table_size(arch: Architecture, layout: Layout) -> int:
    """A process's part of the embedding, or of the output layer."""
    return padded_vocab_size(arch, layout.tp) // layout.tp * arch.hidden_size


def is_gated(arch: Architecture) -> bool:
    return arch.activation.removeprefix("fast-").removeprefix("squared-").removesuffix("-tanh") in (
        "swiglu",
        "geglu",
        "reglu",
    )


def norm_size(arch: Architecture, width: int) -> int:
    return width if arch.normalization == "rmsnorm" else 2 * width


def query_size(arch: Architecture, tp: int) -> int:
    return arch.num_attention_heads // tp * arch.head_dim


def kv_size(arch: Architecture, tp: int) -> int:
    return 2 * arch.query_groups // tp * arch.head_dim


def mixed_size(arch: Architecture, tp: int) -> int:
    return query_size(arch, tp) + kv_size(arch, tp)
