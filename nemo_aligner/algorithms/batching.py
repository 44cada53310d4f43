"""Rows as batches: who computes which, so that rows that begin alike meet and every rank has as much to do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nemo_aligner.algorithms.shared_prefix import prefix_groups, stream_places

Item = Sequence[Sequence[int]]
"""Rows that stay together, such as the two of a pair."""


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Right-pad token rows to the longest: tokens `[B, S]` int64 and true lengths `[B]` int64."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max())), pad_id)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    return tokens, lengths


def deal(items: Sequence[Item], *, ranks: int, size: int, budget: int | None = None) -> list[list[list[int]]]:
    """Each rank's batches of indices into `items`, the same number of batches for every rank.

    A batch has `size` items and `budget` places of its stream (see shared_prefix) at most; an item larger than that is
    a batch of its own. Items whose first rows begin alike stay together as far as that goes. Pieces of like items go to
    the rank with the fewest places so far, the largest first; batches that a rank has no items for are empty.
    """
    largest = min(size, math.ceil(len(items) / ranks))
    pieces = [
        piece
        for group in prefix_groups([item[0] for item in items])
        for part in _even_parts(group.rows, largest)
        for piece in _within(math.inf if budget is None else budget, items, part)
    ]
    loads, dealt = [0] * ranks, [_Filler(size, budget) for _ in range(ranks)]
    for places, piece in sorted(pieces, key=lambda pair: (-pair[0], pair[1])):
        rank = loads.index(min(loads))
        loads[rank] += places
        dealt[rank].add(piece, places)
    most = max(len(filler.batches) for filler in dealt)
    return [filler.batches + [[]] * (most - len(filler.batches)) for filler in dealt]


def stream_length(rows: Sequence[Sequence[int]]) -> int:
    """Places of the stream of `rows`."""
    return stream_places(rows, prefix_groups(rows))


def _even_parts(indices: Sequence[int], largest: int) -> Iterator[tuple[int, ...]]:
    """As few parts of at most `largest` as there can be, of sizes that differ by one at most."""
    parts = math.ceil(len(indices) / largest)
    for part in range(parts):
        yield tuple(indices[part * len(indices) // parts : (part + 1) * len(indices) // parts])


def _within(budget: float, items: Sequence[Item], piece: tuple[int, ...]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """`piece`, halved until it is within the budget or one item, each part with its places."""
    places = stream_length([row for i in piece for row in items[i]])
    if len(piece) == 1 or places <= budget:
        yield places, piece
    else:
        for half in (piece[: len(piece) // 2], piece[len(piece) // 2 :]):
            yield from _within(budget, items, half)


class _Filler:
    """Batches of one rank: a piece goes into the first one with room."""

    def __init__(self, size: int, budget: int | None) -> None:
        self._size, self._budget = size, math.inf if budget is None else budget
        self.batches: list[list[int]] = []
        self._places: list[int] = []

    def add(self, piece: Sequence[int], places: int) -> None:
        for batch, (members, used) in enumerate(zip(self.batches, self._places, strict=True)):
            if len(members) + len(piece) <= self._size and used + places <= self._budget:
                members.extend(piece)
                self._places[batch] += places
                return
        self.batches.append(list(piece))
        self._places.append(places)
