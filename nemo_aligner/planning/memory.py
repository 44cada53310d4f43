"""How much memory a process needs, part by part, from the model's shape: what this engine keeps, tensor by tensor.

    weights      2 bytes a parameter in bf16, 4 in float32
    gradients    4: they are summed in float32, in a buffer that is always there
    optimizer    8 for Adam's two moments, and 4 for the float32 master weights of bf16; when sharded, over the ranks
                 that have the same parameters
    phases       what comes on top while a step, a rollout or a scoring pass runs; one at a time

Notation: H hidden size, F FFN size, V padded vocabulary, E experts, K of which a token goes to. Sizes are in bytes, of
the pipeline stage that needs most. What a backward pass reads is counted as autograd saves it: on a CPU by the kernels
of engine/model/fused.py, on a GPU by torch's operations in Megatron's layers (engine/model/attention.py). No S × S
scores are stored, and no logits of all tokens in float32. Experts are taken to get as many tokens each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nemo_aligner.algorithms.cache_widths import GPU_BLOCK_ROWS, GPU_GRAIN, bucket_widths
from nemo_aligner.algorithms.heads import kernels_take
from nemo_aligner.algorithms.vocabulary import rows_together
from nemo_aligner.config.architecture import Architecture, padded_vocab_size
from nemo_aligner.planning.parameters import (
    Layout,
    gathered_experts,
    is_gated,
    kv_size,
    largest_weight,
    mixed_size,
    query_size,
    stage_layers,
    stage_parameters,
    table_size,
)

_FP32 = 4
_PREFILLED_TOGETHER = 4096
"""Prompt tokens of one prefill at most, unless a prompt alone has more (engine/generation/scheduler.py)."""


@dataclass(frozen=True)
class Work:
    """What one process computes at a time."""

    seq_length: int  # tokens of a row
    response_length: int  # those whose log-probability is asked for
    rows: int = 1  # of a micro-batch of training
    forward_rows: int = 1  # of a forward pass without a gradient
    microbatches: int = 1  # of an optimizer step, on one data-parallel rank
    item: int = 2  # bytes of a weight: 2 in bf16, 4 in float32
    sharded: bool = True  # Adam's state is cut over data-parallel ranks
    slots: int = 0  # responses decoded at once; 0 = nothing is generated
    samples_per_prompt: int = 1
    keeps_initial: bool = False  # the initial policy's weights are kept beside the policy's
    on_cpu: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_length

    @property
    def answers(self) -> int:
        return self.rows * self.response_length


@dataclass(frozen=True)
class Memory:
    """Bytes of one process. `phases`: what comes on top of the resident parts, by phase and part; one at a time."""

    weights: int
    gradients: int = 0
    optimizer: int = 0
    initial_policy: int = 0  # on the device
    host: int = 0  # in the memory of the node, beside an accelerator
    phases: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def resident(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.initial_policy

    @property
    def peak(self) -> int:
        return self.resident + max((sum(parts.values()) for parts in self.phases.values()), default=0)


def training(arch: Architecture, layout: Layout, work: Work) -> Memory:
    """Of the process that needs most of a training run; with `work.slots` rollouts and their log-probabilities too."""
    return max((_training_stage(arch, layout, work, stage) for stage in range(layout.pp)), key=lambda m: m.peak)


def inference(arch: Architecture, layout: Layout, work: Work) -> Memory:
    """Of the process that needs most of a run without training: of generation with `work.slots`, else of scoring."""

    def of_stage(stage: int) -> Memory:
        weights = stage_parameters(arch, layout, stage).total * work.item
        phase = _rollouts if work.slots else _scoring
        return Memory(weights, phases={"generation" if work.slots else "scoring": phase(arch, layout, work, stage)})

    return max(map(of_stage, range(layout.pp)), key=lambda m: m.peak)


def _training_stage(arch: Architecture, layout: Layout, work: Work, stage: int) -> Memory:
    count = stage_parameters(arch, layout, stage)
    updated = count.of_optimizer(layout, sharded=work.sharded)
    phases = {
        "forward and backward": _step(arch, layout, work, stage),
        "optimizer step": {"temporary": _update(arch, layout, work, stage, updated)},
    }
    if work.slots:
        phases["rollouts"] = _rollouts(arch, layout, work, stage)
        phases["log-probabilities"] = _scoring(arch, layout, work, stage)
    weights = count.total * work.item
    kept = weights if work.keeps_initial else 0
    return Memory(
        weights=weights,
        gradients=count.total * _FP32,
        optimizer=(2 if work.item == _FP32 else 3) * _FP32 * updated,
        initial_policy=kept if work.on_cpu else 0,
        host=0 if work.on_cpu else 2 * kept,  # the policy's own lie there while the initial ones are on the device
        phases=phases,
    )


def _update(arch: Architecture, layout: Layout, work: Work, stage: int, updated: int) -> int:
    """Clipping scales one tensor at a time; torch's Adam on a GPU takes all square roots at once."""
    clipped = largest_weight(arch, layout, stage) * _FP32
    return clipped if work.on_cpu else max(clipped, updated * _FP32)


def _step(arch: Architecture, layout: Layout, work: Work, stage: int) -> dict[str, int]:
    """The larger of two moments: the loss, when all is saved, and the backward pass of the first layer that is over."""
    layers, tokens = arch.num_layers // (layout.pp * layout.vpp), work.tokens  # of one of the rank's stages
    kinds = [arch.has_experts(layer) for layer in stage_layers(arch, layout, stage)]
    saved_by = {kind: saved_by_layer(arch, layout, work, experts=kind) * tokens for kind in set(kinds)}
    whole, largest = sum(saved_by[kind] for kind in kinds) // len(kinds), max(saved_by.values())  # of a layer
    given = _wide(arch, layout) * work.item * tokens  # what a layer takes and gives
    ends = _saved_at_ends(arch, layout, work, stage)
    backward = given + max(_gradients_at_once(arch, layout, experts=kind) for kind in saved_by) * work.item * tokens
    if layout.granularity == "full":
        length = min(layout.num_layers, layers)
        uniform = layout.method == "uniform"
        begins = (-(-layers // length) if uniform else length) * given
        kept = begins + (0 if uniform else layers - length) * whole
        recomputed = (length if uniform else 1) * largest
    else:
        begins = kept = layers * whole
        recomputed = _recomputed_at_once(arch, layout, work) * tokens if layout.granularity == "selective" else 0
    others = (under_way(layout, work, stage) - 1) * (kept + _saved_of_angles(arch, work))
    saved = {"activations": others + kept + ends}
    moments = [
        {**saved, "gradients of activations": backward},
        {"activations": others + begins + ends, "recomputed": recomputed, "gradients of activations": backward},
    ]
    if stage == layout.pp - 1 and arch.reward_model_type is None:
        moments.append({**saved, "logits": _logits(arch, layout, work, work.answers, backward=True)})
    if stage == 0:  # the embedding's gradient comes last
        table = table_size(arch, layout) * work.item
        moments.append({"activations": others + ends + given, "gradient of the embedding": table})
    return max(moments, key=lambda parts: sum(parts.values()))


def _has_kernel(arch: Architecture, work: Work) -> bool:
    """Whether attention is one kernel, which reads the heads where the product before it left them."""
    return work.on_cpu and not arch.qk_layernorm and kernels_take(arch.head_dim)


def _attending(arch: Architecture, layout: Layout, work: Work) -> int:
    """Bytes a token that autograd saves of attention proper: q, k, v, the context, and a number for each row of scores.

    The kernel's context is what the next product saves too. torch attends in float32 on a CPU.
    """
    queries, scores = query_size(arch, layout.tp), arch.num_attention_heads // layout.tp * _FP32
    if _has_kernel(arch, work):
        return mixed_size(arch, layout.tp) * work.item + scores
    elements = 2 * queries + kv_size(arch, layout.tp)
    return elements * (_FP32 if work.on_cpu else work.item) + scores


def _recomputed_at_once(arch: Architecture, layout: Layout, work: Work) -> int:
    """Bytes a token of a layer's attention, or of its activation and a norm, which are there twice for a moment."""
    feed_forward = 2 * (arch.ffn_hidden_size // layout.tp + _wide(arch, layout)) * work.item
    return feed_forward if _has_kernel(arch, work) else max(_attending(arch, layout, work), feed_forward)


def saved_by_layer(arch: Architecture, layout: Layout, work: Work, *, experts: bool = False) -> int:
    """Bytes a token that autograd saves of one layer, with `experts` or without, that is not recomputed as a whole."""
    item, wide, tp = work.item, _wide(arch, layout), layout.tp
    queries, kv = query_size(arch, tp), kv_size(arch, tp)
    selective = layout.granularity == "selective"
    norms = 2 * ((1 if selective else 2) * wide * item)  # a norm's input and output
    # cos and sin, for q and k each; of the kernel all layers have them in common
    rotary = 0 if _has_kernel(arch, work) else 4 * _turned(arch) * item
    heads = 0
    if arch.qk_layernorm:  # q and k before their norms: on a CPU copies, on a GPU views of q, k and v
        heads = (queries + (kv // 2 if work.on_cpu else kv)) * item
    if not selective or _has_kernel(arch, work):  # which is not computed again
        core = _attending(arch, layout, work)
    else:
        core = (queries + kv) * item + (queries + kv // 2) * item * (
            1 if rotary else 0
        )  # views, unless they were turned
        heads = max(0, heads - (queries + kv) * item)
    context = queries * item
    feed_forward = _of_experts(arch, layout, work) if experts else _of_feed_forward(arch, layout, work, selective)
    return norms + rotary + heads + core + context + feed_forward


def _of_feed_forward(arch: Architecture, layout: Layout, work: Work, selective: bool) -> int:
    ffn = arch.ffn_hidden_size // layout.tp * work.item
    return (2 if is_gated(arch) else 1) * ffn if selective else _of_activation(arch, work) * ffn


def _of_activation(arch: Architecture, work: Work) -> int:
    """Tensors of the FFN size that autograd saves: in and out of the activation, and on the way."""
    if arch.activation in ("swiglu", "fast-swiglu"):
        return 3 if work.on_cpu else 4
    return 5 if is_gated(arch) else 2


def _of_experts(arch: Architecture, layout: Layout, work: Work) -> int:
    """What each expert takes, its activation with and without the router's weight, and what the router makes."""
    inner = (_of_activation(arch, work) + 1) * arch.expert_ffn_hidden_size // layout.expert_tp
    return _to_experts(arch, layout) * (arch.hidden_size + inner) * work.item + 3 * _FP32 * (arch.num_moe_experts or 0)


def _to_experts(arch: Architecture, layout: Layout) -> int:
    """Tokens that experts of this process compute for each token of the stream, if all experts get as many."""
    return arch.moe_router_topk * layout.expert_tp // layout.tp


def _gradients_at_once(arch: Architecture, layout: Layout, *, experts: bool) -> int:
    """Elements a token, in the feed-forward of a layer."""
    if experts:
        return 2 * _to_experts(arch, layout) * arch.hidden_size
    return (2 if is_gated(arch) else 1) * (arch.ffn_hidden_size // layout.tp)


def under_way(layout: Layout, work: Work, stage: int) -> int:
    """Passes of micro-batches through a stage of this rank that wait for their backward pass, at most.

    Of Megatron's schedules: a rank begins as many before its first backward pass, and then ends one for each it begins.
    """
    after = layout.pp - stage - 1
    most = after + 1 if layout.vpp == 1 else 2 * after + (layout.vpp - 1) * layout.pp + 1
    return min(most, work.microbatches * layout.vpp)


def _turned(arch: Architecture) -> int:
    """Dimensions of a head that are turned by rotary angles."""
    return int(arch.head_dim * arch.rotary_percentage) if arch.position_embedding_type == "rope" else 0


def _saved_of_angles(arch: Architecture, work: Work) -> int:
    """With their cos and sin, where attention is one kernel."""
    tables = 2 * _turned(arch) * work.item if _has_kernel(arch, work) else 0
    return (arch.head_dim * _FP32 + tables) * work.tokens


def _saved_at_ends(arch: Architecture, layout: Layout, work: Work, stage: int) -> int:
    """Of the rotary angles, and on the last stage of the last norm and what the output layer takes."""
    wide, tokens = _wide(arch, layout), work.tokens
    saved = _saved_of_angles(arch, work)
    if stage == layout.pp - 1:
        saved += wide * work.item * tokens
        taken = wide * tokens if layout.sequence_parallel and layout.tp > 1 else arch.hidden_size * work.answers
        saved += taken * work.item if arch.reward_model_type is None else arch.hidden_size * _FP32 * tokens
    return saved


def _logits(arch: Architecture, layout: Layout, work: Work, answers: int, *, backward: bool) -> int:
    """Of `answers` tokens: logits, on a GPU those of some tokens in float32, and on the way back their gradient."""
    shard, item = padded_vocab_size(arch, layout.tp) // layout.tp, work.item
    raw = (answers if not (layout.sequence_parallel and layout.tp > 1) else work.tokens + answers) * shard * item
    part = 0 if work.on_cpu else min(answers, rows_together(shard, on_cpu=False)) * shard * _FP32
    if not backward:
        return raw + 3 * part
    gradient = answers * shard * item + part * (1 if item == _FP32 else 2)
    return raw + max(3 * part, gradient, shard * arch.hidden_size * item)


def _scoring(arch: Architecture, layout: Layout, work: Work, stage: int) -> dict[str, int]:
    """A forward pass without a gradient."""
    tokens, parts = work.forward_rows * work.seq_length, {}
    parts["activations"] = _passing(arch, layout, work) * tokens
    if stage == layout.pp - 1 and arch.reward_model_type is None:
        parts["logits"] = _logits(arch, layout, work, work.forward_rows * work.response_length, backward=False)
    return parts


def _rollouts(arch: Architecture, layout: Layout, work: Work, stage: int) -> dict[str, int]:
    prompt = max(1, work.seq_length - work.response_length)
    fetched = -(-work.slots // work.samples_per_prompt) * prompt  # those of a group of requests, until they have slots
    parts = {
        "KV cache": kv_cache(arch, layout, work) + fetched * kv_token(arch, layout, work),
        "prefill": _passing(arch, layout, work) * max(prompt, min(_PREFILLED_TOGETHER, fetched)),
    }
    if layout.gathers_experts:
        parts["experts gathered"] = gathered_experts(arch, layout, stage) * work.item
    if stage == layout.pp - 1:  # of every slot: in the model's dtype, then float32, shaped, and probabilities
        whole = padded_vocab_size(arch, layout.tp)
        parts["logits"] = work.slots * (whole // layout.tp * work.item + whole * (work.item + 3 * _FP32))
    return parts


def kv_token(arch: Architecture, layout: Layout, work: Work) -> int:
    """Bytes of the keys and values of one token, of this process's layers and heads."""
    return arch.num_layers // layout.pp * kv_size(arch, layout.tp) * work.item


def kv_cache(
    arch: Architecture, layout: Layout, work: Work, grain: int = GPU_GRAIN, block_rows: int = GPU_BLOCK_ROWS
) -> int:
    """The most that the cache of a GPU may take: rows at every width on the way, most of them at the widest.

    Blocks of rows are allocated whole, a block at least for every width in use (engine/generation/kv_cache.py).
    """
    widths = bucket_widths(max(1, work.seq_length - work.response_length) + 1, work.seq_length, grain)[-work.slots :]
    block = min(block_rows, work.slots)
    blocks = -(-(work.slots - len(widths) + 1) // block)  # of the widest
    return (sum(widths[:-1]) + blocks * widths[-1]) * block * kv_token(arch, layout, work)


def _passing(arch: Architecture, layout: Layout, work: Work) -> int:
    """Bytes a token of what lives at once while a layer runs without a gradient."""
    ffn = (3 if is_gated(arch) else 2) * arch.ffn_hidden_size // layout.tp
    if arch.num_moe_experts is not None:  # in and out of the experts, which follow one another
        ffn = max(ffn, 2 * _to_experts(arch, layout) * arch.hidden_size)
    return (3 * arch.hidden_size + max(ffn, 2 * query_size(arch, layout.tp) + mixed_size(arch, layout.tp))) * work.item


def _wide(arch: Architecture, layout: Layout) -> int:
    """Elements a token of the residual stream."""
    return arch.hidden_size // (layout.tp if layout.sequence_parallel else 1)
