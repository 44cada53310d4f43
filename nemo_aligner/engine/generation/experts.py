"""The feed-forward part of a layer with experts, in the forward passes of generation.

Every rank has all experts here, cut over tensor-parallel ranks alone, so that it decodes without waiting for others.
Those that training cuts over more ranks are gathered when a forward pass is made (collective), and held as long as it
is.
Notation: N tokens, E experts, H hidden size, F an expert's FFN size on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from torch import Tensor, nn


class Experts:
    """What the forward pass reads of a layer's experts: weights `[2F, H]` (`[F, H]` without a gate) and `[H, F]`."""

    def __init__(self, mlp: Any) -> None:
        """`mlp` is Megatron's MoELayer. Collective where its experts are cut over more than tensor-parallel ranks."""
        self._router = mlp.router
        self.router: nn.Parameter = mlp.router.weight
        own = [(expert.linear_fc1.weight, expert.linear_fc2.weight) for expert in mlp.experts.local_experts]
        self.weights = own if _is_whole(mlp) else list(_gathered(mlp, own))

    def parameters(self) -> Iterator[nn.Parameter]:
        yield self.router
        for pair in self.weights:
            yield from pair

    def __call__(
        self, hidden: Tensor, product: Callable[[Tensor, Tensor], Tensor], activate: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Output `[N, H]` for `hidden` `[N, H]`, still to be summed over tensor-parallel ranks.

        A row's terms are added in the order of the experts, so nothing of it depends on the rows beside it. `product`
        is of rows and a weight; `activate` goes from an expert's inner rows to `[n, F]`.
        """
        config = self._router.config
        probs, chosen = topk_routing_with_score_function(
            product(hidden, self.router), config.moe_router_topk, use_pre_softmax=config.moe_router_pre_softmax
        )
        by_expert = chosen.T
        rows, scales = by_expert.nonzero(as_tuple=True)[1], probs.T[by_expert]
        output, start = torch.zeros_like(hidden), 0
        for (fc1, fc2), count in zip(self.weights, by_expert.sum(1).tolist(), strict=True):
            if count:
                part = slice(start, start + count)
                inner = activate(product(hidden[rows[part]], fc1)) * scales[part, None]
                output.index_add_(0, rows[part], product(inner, fc2))
                start += count
        return output


def _is_whole(mlp: Any) -> bool:
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    return mlp.ep_group.size() == 1 and mlp.experts.tp_group.size() == tensor


@torch.no_grad()
def _gathered(mlp: Any, own: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """All experts, each cut over this rank's tensor-parallel group."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    halves = 2 if mlp.config.gated_linear_unit else 1
    first, second = (torch.stack([pair[i].detach() for pair in own]) for i in range(2))  # [E/ep, ...]
    first = first.unflatten(1, (halves, -1))  # now F is the third axis of both
    group, anew = mlp.experts.tp_group, mlp.experts.tp_group.size() != size
    if anew:
        first, second = (torch.cat(_all(part, group), dim=2) for part in (first, second))
    for fc1s, fc2s in zip(_all(first, mlp.ep_group), _all(second, mlp.ep_group), strict=True):
        for fc1, fc2 in zip(fc1s, fc2s, strict=True):
            if anew:  # what other ranks of the group hold is theirs to compute
                fc1, fc2 = (part.chunk(size, dim=1)[rank] for part in (fc1, fc2))
            yield _weight(fc1.flatten(0, 1)), _weight(fc2)


def _weight(part: Tensor) -> nn.Parameter:
    return nn.Parameter(part.clone(memory_format=torch.contiguous_format), requires_grad=False)


def _all(part: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return parts
