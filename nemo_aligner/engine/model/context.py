"""Context parallelism: the ranks of a group compute one stream together, each some of its places.

A transformer computes every place by itself but for attention, where a place's query meets the keys and values of what
comes before it. So each rank keeps the queries of its own places, and keys and values of all are gathered; their
gradients are summed and scattered on the way back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, reduce_from_tensor_model_parallel_region
from torch import Tensor

from nemo_aligner.algorithms.shared_prefix import Layout

T = TypeVar("T")


class Piece(NamedTuple):
    """Queries that attend as one: the last of what they see, which is a prefix (or nothing) and then places `seen`."""

    queries: slice  # among this rank's places
    prefix: slice  # of the stream
    seen: slice  # of the stream


@dataclass(frozen=True)
class ContextPart:
    """This rank's places of a stream of N places, N a multiple of 2c, that a group of c ranks computes.

    Of 2c stretches of equal length rank r has the r-th and the r-th from the end, as Megatron cuts its batches: what a
    place attends to grows along a row, and so each rank has as much to do.

    `own` `[N/c]` int64: its places, ascending. `local` `[N]` int64: where a place stands among them, −1 for another
    rank's. `gathered` `[N]` int64: where it stands when the parts of all ranks lie one behind the other.
    """

    group: dist.ProcessGroup
    own: Tensor
    local: Tensor
    gathered: Tensor
    pieces: tuple[Piece, ...]

    def to(self, device: torch.device) -> ContextPart:
        own, local, gathered = (places.to(device) for places in (self.own, self.local, self.gathered))
        return replace(self, own=own, local=local, gathered=gathered)

    def all_places(self, values: Tensor) -> Tensor:
        """`[N, ...]` of the stream, from `[N/c, ...]` of each rank; a place's gradient is the sum of all ranks'."""
        return gather_from_sequence_parallel_region(values, group=self.group).index_select(0, self.gathered)

    def sum(self, values: Tensor) -> Tensor:
        """Σ over the group. Every rank then computes the same loss, and the gradient of its share is the loss's own."""
        return reduce_from_tensor_model_parallel_region(values, group=self.group)


def places_multiple() -> int:
    """What the length of a stream must be a multiple of to be cut over this rank's group."""
    size = parallel_state.get_context_parallel_world_size()
    return 1 if size == 1 else 2 * size


def context_part(layout: Layout) -> ContextPart | None:
    """This rank's part of the stream; None where it computes all of it."""
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    if size == 1:
        return None
    device, length = layout.tokens.device, len(layout.tokens)
    stretches = torch.arange(length, device=device).view(2 * size, -1)
    parts = [stretches[[r, -1 - r]].flatten() for r in range(size)]
    local = torch.full((length,), -1, device=device)
    local[parts[rank]] = torch.arange(length // size, device=device)
    pieces = _pieces(layout, length // (2 * size), (rank, 2 * size - 1 - rank))
    group = parallel_state.get_context_parallel_group()
    return ContextPart(group, parts[rank], local, torch.cat(parts).argsort(), tuple(pieces))


def _pieces(layout: Layout, stretch: int, own: tuple[int, int]) -> Iterator[Piece]:
    for nth, number in enumerate(own):
        begins = number * stretch
        for prefix, start, end in _segments(layout):
            first, last = max(start, begins), min(end, begins + stretch)
            if first < last:
                moved = nth * stretch - begins
                yield Piece(slice(first + moved, last + moved), prefix, slice(start, last))


def _segments(layout: Layout) -> Iterator[tuple[slice, int, int]]:
    """Places that are causal among themselves, after a prefix: (prefix, start, end), all of the stream in its order.

    The padding is one of its own, so that every rank has a piece, and with it a part in every exchange of gradients.
    """
    nothing, end = slice(0, 0), 0
    for group in layout.groups:
        prefix, end = slice(group.start, group.start + group.prefix), group.start + group.prefix
        if group.prefix:
            yield nothing, group.start, end
        for length in group.lengths:
            yield prefix, end, end + length
            end += length
    yield nothing, end, len(layout.tokens)


def of_all_ranks(values: list[T]) -> tuple[list[T], slice]:
    """The values of all ranks of this one's group, in order, and which of them are its own."""
    if parallel_state.get_context_parallel_world_size() == 1:
        return values, slice(None)
    group = parallel_state.get_context_parallel_group()
    lists: list[list[T]] = [[]] * group.size()
    dist.all_gather_object(lists, values, group=group)
    first = sum(map(len, lists[: group.rank()]))
    return [value for part in lists for value in part], slice(first, first + len(values))
