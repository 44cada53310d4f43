"""Forward and backward passes over micro-batches, through Megatron's schedules (any TP, PP).

tokens ─▶ model ─▶ output: logprobs `[B, S]` of a policy, rewards `[B, K]` of a reward model ─▶ objective ─▶ LossTerms
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.utils import get_model_config, unwrap_model
from torch import Tensor, nn

from nemo_aligner.engine.interfaces import Microbatch, Objective
from nemo_aligner.engine.model.build import RewardGPTModel

T = TypeVar("T")


def wanted_positions(microbatch: Microbatch) -> Tensor:
    """Where the next token's log-probability is asked for, `[B, S]` bool: before every target of `loss_mask`.

    Without a mask everywhere but at the end. Never empty: a micro-batch of fillers asks for one that no mask counts.
    """
    wanted = torch.zeros_like(microbatch.tokens, dtype=torch.bool)
    mask = microbatch.fields.get("loss_mask")
    wanted[:, :-1] = True if mask is None else mask[:, 1:] != 0
    wanted[0, 0] |= ~wanted.any()
    return wanted


def token_logprobs(logits: Tensor, tokens: Tensor, wanted: Tensor, vocab_size: int) -> Tensor:
    """Log-probability of the token after every wanted position, at that token: `[B, S]` float32, 0 elsewhere.

    logits: `[1, N, V/TP]` of the N wanted positions, this rank's part of the padded vocabulary; rows past `vocab_size`
    get no probability mass.
    """
    shard = logits.size(-1)
    first = parallel_state.get_tensor_model_parallel_rank() * shard
    if first + shard > vocab_size:
        padding = torch.arange(first, first + shard, device=logits.device) >= vocab_size
        logits = logits.masked_fill(padding, -torch.inf)
    # Megatron's cross entropy works in place on its input, hence the copy
    copy = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    found = -vocab_parallel_cross_entropy(copy, tokens.roll(-1, dims=1)[wanted].unsqueeze(0))
    return torch.zeros(tokens.shape, device=tokens.device).masked_scatter(wanted.roll(1, dims=1), found)


def rewards_at_end(rewards: Tensor, lengths: Tensor) -> Tensor:
    """Of rewards at every position `[B, S, K]`, those at each row's last token: `[B, K]` float32."""
    return rewards[torch.arange(rewards.size(0), device=rewards.device), lengths - 1]


def _output(model: nn.Module, raw: Tensor, microbatch: Microbatch, vocab_size: int) -> Tensor:
    plain = unwrap_model(model)
    if isinstance(plain, RewardGPTModel):
        return rewards_at_end(raw, microbatch.lengths)
    wanted = wanted_positions(microbatch)
    logits = raw[wanted].unsqueeze(0) if plain.wanted is None else raw
    return token_logprobs(logits, microbatch.tokens, wanted, vocab_size)


def _padded(microbatch: Microbatch, multiple: int, device: torch.device) -> Microbatch:
    """On the device, with S a multiple of what sequence parallelism cuts it by."""
    extra = -microbatch.tokens.size(1) % multiple

    def fit(tensor: Tensor) -> Tensor:
        is_sequence = tensor.dim() > 1 and tensor.size(1) == microbatch.tokens.size(1)
        return torch.nn.functional.pad(tensor, (0, extra)).to(device) if is_sequence else tensor.to(device)

    fields = {name: fit(tensor) for name, tensor in microbatch.fields.items()}
    return Microbatch(fit(microbatch.tokens), microbatch.lengths.to(device), fields)


def _run(
    model: nn.Module,
    microbatches: Sequence[Microbatch],
    on_raw: Callable[[Tensor, Microbatch], Callable[..., Any]],
    *,
    forward_only: bool,
    collect: bool,
) -> list[Any]:
    """Megatron's schedule over the micro-batches; what the last stage's loss function returned, on every stage.

    `on_raw(raw model output, micro-batch)` gives Megatron's loss function.
    """
    device = next(model.parameters()).device
    config, plain = get_model_config(model), unwrap_model(model)
    multiple = config.tensor_model_parallel_size if config.sequence_parallel else 1
    ready = [_padded(microbatch, multiple, device) for microbatch in microbatches]

    def forward_step(data: Iterator[Microbatch], stage: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        microbatch = next(data)
        tokens = microbatch.tokens
        positions = torch.arange(tokens.size(1), device=device).expand_as(tokens)
        if not config.sequence_parallel:  # there each rank holds some positions only, until after the output layer
            plain.wanted = wanted_positions(microbatch)
        raw = stage(tokens, positions, None)  # no mask: causal by construction
        return raw, on_raw(raw, microbatch)

    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(ready),
        model=[model],
        num_microbatches=len(ready),
        seq_length=max(microbatch.tokens.size(1) for microbatch in ready),
        micro_batch_size=ready[0].tokens.size(0),
        forward_only=forward_only,
        collect_non_loss_data=collect,
    )
    plain.wanted = None
    return from_last_stage(results)


def from_last_stage(value: T) -> T:
    """`value` as the last pipeline stage has it, on every stage."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return value
    box = [value]
    source = parallel_state.get_pipeline_model_parallel_last_rank()
    group = parallel_state.get_pipeline_model_parallel_group()
    torch.distributed.broadcast_object_list(box, source, group=group)
    return box[0]


def run_objective(
    model: nn.Module, microbatches: Sequence[Microbatch], objective: Objective, vocab_size: int, *, forward_only: bool
) -> list[dict[str, float]]:
    """Loss (and gradient, into the model's buffers) of each micro-batch.

    Returns per micro-batch {"loss": Σ, "count": n, metric: Σ, ...}, the same on every rank of the replica.
    """

    def on_raw(raw: Tensor, microbatch: Microbatch) -> Callable[..., Any]:
        def loss_function(_: Tensor) -> tuple[Tensor, Tensor, dict[str, float]]:
            terms = objective(_output(model, raw, microbatch, vocab_size), microbatch)
            sums = {"loss": terms.loss_sum, "count": terms.count, **terms.metrics}
            return terms.loss_sum, terms.count.int(), {name: float(value.detach()) for name, value in sums.items()}

        return loss_function

    return _run(model, microbatches, on_raw, forward_only=forward_only, collect=False)


@torch.no_grad()
def forward_outputs(model: nn.Module, microbatches: Sequence[Microbatch], vocab_size: int) -> list[Tensor]:
    """Logprobs `[B, S]` or rewards `[B, K]` of each micro-batch, float32, on every stage; no gradient."""

    def on_raw(raw: Tensor, microbatch: Microbatch) -> Callable[..., Any]:
        width = microbatch.tokens.size(1)
        return lambda _, non_loss_data: _output(model, raw, microbatch, vocab_size)[:, :width].cpu()

    return _run(model, microbatches, on_raw, forward_only=True, collect=True)
