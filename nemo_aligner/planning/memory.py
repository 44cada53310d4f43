"""How much memory a process needs, part by part, from the model's shape: what this engine keeps, tensor by tensor.

    weights      2 bytes a parameter in bf16, 4 in float32
    gradients    4: they are summed in float32, in a buffer that is always there
    optimizer    8 for Adam's two moments, and 4 for the float32 master weights of bf16; over DP ranks when sharded
    phases       what comes on top while a step, a rollout or a scoring pass runs; one at a time

Notation: H hidden size, F FFN size, n query heads, G key/value heads, D head dimension, V padded vocabulary, N tokens
of a micro-batch. Sizes are in bytes, of the pipeline stage that needs most. What a backward pass reads is counted as
autograd saves it: on a CPU by the kernels of engine/model/fused.py, on a GPU by torch's operations in Megatron's layers
(engine/model/attention.py). No S × S scores are stored, and no logits of all tokens in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nemo_aligner.algorithms.cache_widths import GPU_BLOCK_ROWS, GPU_GRAIN, bucket_widths
from nemo_aligner.algorithms.heads import kernels_take
from nemo_aligner.algorithms.vocabulary import rows_together
from nemo_aligner.config.architecture import Architecture, padded_vocab_size

_FP32 = 4
_PREFILLED_TOGETHER = 4096
"""Prompt tokens of one prefill at most, unless a prompt alone has more (engine/generation/scheduler.py)."""


@dataclass(frozen=True)
class Layout:
    """How a model is cut over processes, and which activations are computed twice instead of kept."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1  # stages of a rank
    dp: int = 1
    sequence_parallel: bool = False
    granularity: str | None = None  # as model.activations_checkpoint_*: selective or full
    method: str = "uniform"  # with full: uniform or block
    num_layers: int = 1  # with full: layers per recomputed part, or how many layers are recomputed


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


def layer_parameters(arch: Architecture, tp: int) -> int:
    """Parameters of a decoder layer on one tensor-parallel rank."""
    hidden, ffn = arch.hidden_size, arch.ffn_hidden_size // tp
    query, mixed, fc1 = _query(arch, tp), _mixed(arch, tp), ffn * (2 if is_gated(arch) else 1)
    weights = hidden * (mixed + query + fc1 + ffn)
    biases = (mixed if arch.bias or arch.qkv_bias else 0) + (hidden if arch.has_proj_bias else 0)
    biases += fc1 + hidden if arch.has_mlp_bias else 0
    heads = 2 * _norm(arch, arch.head_dim) if arch.qk_layernorm else 0
    return weights + biases + heads + 2 * _norm(arch, hidden)


def stage_parameters(arch: Architecture, layout: Layout, stage: int) -> int:
    """Parameters of one process of pipeline stage `stage`, counted from 0."""
    table = padded_vocab_size(arch, layout.tp) // layout.tp * arch.hidden_size
    first, last = stage == 0, stage == layout.pp - 1
    count = arch.num_layers // layout.pp * layer_parameters(arch, layout.tp)
    if first:
        count += table
        count += arch.max_position_embeddings * arch.hidden_size if arch.position_embedding_type != "rope" else 0
    if last:
        count += _norm(arch, arch.hidden_size)
        if arch.reward_model_type is not None:
            count += arch.hidden_size + 1
        elif not arch.share_embeddings_and_output_weights or not first:
            count += table  # tied ones are there twice when the stages are two
    return count


def training(arch: Architecture, layout: Layout, work: Work) -> Memory:
    """Of the process that needs most of a training run; with `work.slots` rollouts and their log-probabilities too."""
    return max((_training_stage(arch, layout, work, stage) for stage in range(layout.pp)), key=lambda m: m.peak)


def inference(arch: Architecture, layout: Layout, work: Work) -> Memory:
    """Of the process that needs most of a run without training: of generation with `work.slots`, else of scoring."""

    def of_stage(stage: int) -> Memory:
        weights = stage_parameters(arch, layout, stage) * work.item
        phase = _rollouts if work.slots else _scoring
        return Memory(weights, phases={"generation" if work.slots else "scoring": phase(arch, layout, work, stage)})

    return max(map(of_stage, range(layout.pp)), key=lambda m: m.peak)


def _training_stage(arch: Architecture, layout: Layout, work: Work, stage: int) -> Memory:
    count = stage_parameters(arch, layout, stage)
    states = (2 if work.item == _FP32 else 3) * _FP32 * count // (layout.dp if work.sharded else 1)
    phases = {
        "forward and backward": _step(arch, layout, work, stage),
        "optimizer step": {"temporary": _update(arch, layout, work, stage, count)},
    }
    if work.slots:
        phases["rollouts"] = _rollouts(arch, layout, work, stage)
        phases["log-probabilities"] = _scoring(arch, layout, work, stage)
    weights = count * work.item
    kept = weights if work.keeps_initial else 0
    return Memory(
        weights=weights,
        gradients=count * _FP32,
        optimizer=states,
        initial_policy=kept if work.on_cpu else 0,
        host=0 if work.on_cpu else 2 * kept,  # the policy's own lie there while the initial ones are on the device
        phases=phases,
    )


def _update(arch: Architecture, layout: Layout, work: Work, stage: int, count: int) -> int:
    """Clipping scales one tensor at a time; torch's Adam on a GPU takes all square roots at once."""
    clipped = _largest(arch, layout, stage) * _FP32
    return clipped if work.on_cpu else max(clipped, count * _FP32 // (layout.dp if work.sharded else 1))


def _step(arch: Architecture, layout: Layout, work: Work, stage: int) -> dict[str, int]:
    """The larger of two moments: the loss, when all is saved, and the backward pass of the first layer that is over."""
    layers, tokens = arch.num_layers // (layout.pp * layout.vpp), work.tokens  # of one of the rank's stages
    whole = saved_by_layer(arch, layout, work) * tokens
    given = _wide(arch, layout) * work.item * tokens  # what a layer takes and gives
    ends = _saved_at_ends(arch, layout, work, stage)
    backward = given + (2 if is_gated(arch) else 1) * (arch.ffn_hidden_size // layout.tp) * work.item * tokens
    if layout.granularity == "full":
        length = min(layout.num_layers, layers)
        uniform = layout.method == "uniform"
        begins = (-(-layers // length) if uniform else length) * given
        kept = begins + (0 if uniform else layers - length) * whole
        recomputed = (length if uniform else 1) * whole
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
        table = padded_vocab_size(arch, layout.tp) // layout.tp * arch.hidden_size * work.item
        moments.append({"activations": others + ends + given, "gradient of the embedding": table})
    return max(moments, key=lambda parts: sum(parts.values()))


def _has_kernel(arch: Architecture, work: Work) -> bool:
    """Whether attention is one kernel, which reads the heads where the product before it left them."""
    return work.on_cpu and not arch.qk_layernorm and kernels_take(arch.head_dim)


def _attending(arch: Architecture, layout: Layout, work: Work) -> int:
    """Bytes a token that autograd saves of attention proper: q, k, v, the context, and a number for each row of scores.

    The kernel's context is what the next product saves too. torch attends in float32 on a CPU.
    """
    query, scores = _query(arch, layout.tp), arch.num_attention_heads // layout.tp * _FP32
    if _has_kernel(arch, work):
        return _mixed(arch, layout.tp) * work.item + scores
    elements = 2 * query + _kv(arch, layout.tp)
    return elements * (_FP32 if work.on_cpu else work.item) + scores


def _recomputed_at_once(arch: Architecture, layout: Layout, work: Work) -> int:
    """Bytes a token of a layer's attention, or of its activation and a norm, which are there twice for a moment."""
    feed_forward = 2 * (arch.ffn_hidden_size // layout.tp + _wide(arch, layout)) * work.item
    return feed_forward if _has_kernel(arch, work) else max(_attending(arch, layout, work), feed_forward)


def saved_by_layer(arch: Architecture, layout: Layout, work: Work) -> int:
    """Bytes a token that autograd saves of one layer that is not recomputed as a whole."""
    item, wide, tp = work.item, _wide(arch, layout), layout.tp
    query, kv, ffn = _query(arch, tp), _kv(arch, tp), arch.ffn_hidden_size // tp
    selective = layout.granularity == "selective"
    norms = 2 * ((1 if selective else 2) * wide * item)  # a norm's input and output
    tables = 2 if _has_kernel(arch, work) else 4  # cos and sin, of q and k alike or for each
    rotary = tables * int(arch.head_dim * arch.rotary_percentage) * item
    if arch.position_embedding_type != "rope":
        rotary = 0
    heads = 0
    if arch.qk_layernorm:  # q and k before their norms: on a CPU copies, on a GPU views of q, k and v
        heads = (query + (kv // 2 if work.on_cpu else kv)) * item
    if not selective or _has_kernel(arch, work):  # which is not computed again
        core = _attending(arch, layout, work)
    else:
        core = (query + kv) * item + (query + kv // 2) * item * (1 if rotary else 0)  # views, unless they were turned
        heads = max(0, heads - (query + kv) * item)
    context = query * item
    return norms + rotary + heads + core + context + _of_feed_forward(arch, work, selective) * ffn * item


def _of_feed_forward(arch: Architecture, work: Work, selective: bool) -> int:
    """Tensors of the FFN size that autograd saves of a layer: in and out of the activation, and on the way."""
    if selective:
        return 2 if is_gated(arch) else 1
    if arch.activation in ("swiglu", "fast-swiglu"):
        return 3 if work.on_cpu else 4
    return 5 if is_gated(arch) else 2


def under_way(layout: Layout, work: Work, stage: int) -> int:
    """Passes of micro-batches through a stage of this rank that wait for their backward pass, at most.

    Of Megatron's schedules: a rank begins as many before its first backward pass, and then ends one for each it begins.
    """
    after = layout.pp - stage - 1
    most = after + 1 if layout.vpp == 1 else 2 * after + (layout.vpp - 1) * layout.pp + 1
    return min(most, work.microbatches * layout.vpp)


def _saved_of_angles(arch: Architecture, work: Work) -> int:
    return arch.head_dim * _FP32 * work.tokens


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
    """Of `answers` tokens: logits, those of some tokens in float32, and on the way back their gradient."""
    shard, item = padded_vocab_size(arch, layout.tp) // layout.tp, work.item
    raw = (answers if not (layout.sequence_parallel and layout.tp > 1) else work.tokens + answers) * shard * item
    part = min(answers, rows_together(shard, on_cpu=work.on_cpu)) * shard * _FP32
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
    if stage == layout.pp - 1:  # of every slot: in the model's dtype, then float32, shaped, and probabilities
        whole = padded_vocab_size(arch, layout.tp)
        parts["logits"] = work.slots * (whole // layout.tp * work.item + whole * (work.item + 3 * _FP32))
    return parts


def kv_token(arch: Architecture, layout: Layout, work: Work) -> int:
    """Bytes of the keys and values of one token, of this process's layers and heads."""
    return arch.num_layers // layout.pp * _kv(arch, layout.tp) * work.item


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
    return (3 * arch.hidden_size + max(ffn, 2 * _query(arch, layout.tp) + _mixed(arch, layout.tp))) * work.item


def _largest(arch: Architecture, layout: Layout, stage: int) -> int:
    """Elements of the largest weight."""
    fc1 = arch.hidden_size * arch.ffn_hidden_size // layout.tp * (2 if is_gated(arch) else 1)
    table = padded_vocab_size(arch, layout.tp) // layout.tp * arch.hidden_size
    return max(fc1, table) if stage in (0, layout.pp - 1) else fc1


def is_gated(arch: Architecture) -> bool:
    return arch.activation.removeprefix("fast-").removeprefix("squared-").removesuffix("-tanh") in (
        "swiglu",
        "geglu",
        "reglu",
    )


def _norm(arch: Architecture, width: int) -> int:
    return width if arch.normalization == "rmsnorm" else 2 * width


def _wide(arch: Architecture, layout: Layout) -> int:
    """Elements a token of the residual stream."""
    return arch.hidden_size // (layout.tp if layout.sequence_parallel else 1)


def _query(arch: Architecture, tp: int) -> int:
    return arch.num_attention_heads // tp * arch.head_dim


def _kv(arch: Architecture, tp: int) -> int:
    return 2 * arch.query_groups // tp * arch.head_dim


def _mixed(arch: Architecture, tp: int) -> int:
    return _query(arch, tp) + _kv(arch, tp)
