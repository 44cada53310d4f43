"""Log-probabilities of tokens from logits, part by part: `[N, V]` is never there in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_aligner.algorithms.vocabulary import rows_together
from nemo_aligner.engine.kernels.library import cpu_kernels


class TokenLogprobs(torch.autograd.Function):
    """log p(target) = logit(target) − log Σ_v e^logit(v), over a vocabulary that is cut over TP ranks.

    ∂ log p(target) / ∂ logit(v) = [v = target] − p(v)
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        """`logits` `[N, V/TP]` of this rank's part of the padded vocabulary, `targets` `[N]` int64: `[N]` float32.

        Padding, from `vocab_size` on, has no probability.
        """
        logits = logits.contiguous()
        first = parallel_state.get_tensor_model_parallel_rank() * logits.size(1)
        real = min(max(vocab_size - first, 0), logits.size(1))
        log_sums = log_sums_of(logits, real)
        own = (targets - first).where((targets >= first) & (targets < first + real), -1)
        found = logits.gather(1, own.clamp(min=0)[:, None]).squeeze(1).float() * (own >= 0)
        log_sums, found = _log_sum_over_ranks(log_sums), _sum_over_ranks(found)
        ctx.save_for_backward(logits, own, log_sums)
        ctx.real = real
        return found - log_sums

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        [given] = gradients
        logits, own, log_sums = ctx.saved_tensors
        kernels = cpu_kernels(logits.dtype, logits.device)
        if kernels is not None:
            return kernels.logprobs_backward(logits, log_sums, given.contiguous(), own, ctx.real), None, None
        found = torch.empty_like(logits)
        for rows in _parts(logits):
            # not to be named: it would be there until the next is made
            found[rows, : ctx.real] = (
                (logits[rows, : ctx.real].float() - log_sums[rows, None]).exp_().mul_(-given[rows, None])
            )
            found[rows, ctx.real :] = 0
        # from the probability in float32 again: what was stored is rounded
        at, is_mine = own.clamp(min=0)[:, None], (own >= 0)[:, None]
        target = given[:, None] * -torch.expm1(logits.gather(1, at).float() - log_sums[:, None])
        found.scatter_(1, at, target.to(found.dtype).where(is_mine, found.gather(1, at)))
        return found, None, None


def log_sums_of(logits: Tensor, vocab_size: int) -> Tensor:
    """log Σ e^logit over the first `vocab_size` of `logits` `[N, V]`: `[N]` float32, −∞ of none."""
    kernels = cpu_kernels(logits.dtype, logits.device)
    if kernels is not None and vocab_size:
        return kernels.log_sums(logits, vocab_size)
    found = torch.full((len(logits),), -torch.inf, device=logits.device)
    if vocab_size:
        for rows in _parts(logits):
            found[rows] = logits[rows, :vocab_size].float().logsumexp(-1)
    return found


def _parts(logits: Tensor) -> Iterator[slice]:
    count = rows_together(logits.size(1), on_cpu=logits.device.type == "cpu")
    return (slice(start, start + count) for start in range(0, len(logits), count))


def _sum_over_ranks(values: Tensor) -> Tensor:
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        torch.distributed.all_reduce(values, group=parallel_state.get_tensor_model_parallel_group())
    return values


def _log_sum_over_ranks(values: Tensor) -> Tensor:
    """log Σ e^value over TP ranks, of `[N]`."""
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return values
    largest = values.clone()
    group = parallel_state.get_tensor_model_parallel_group()
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
    return largest + _sum_over_ranks((values - largest).exp()).log()
