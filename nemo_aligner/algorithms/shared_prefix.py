"""Rows that begin alike as one stream, in which what they share stands once.

    rows A0 A1 A2 B ─▶ groups {A0, A1, A2}, {B} ─▶ stream [prefix_A, suffix_A0, suffix_A1, suffix_A2, B]

A transformer's output at a token depends on the tokens before it in its row and on nothing else, so one computation of
a common prefix serves every row that goes on from it, and its gradient is the sum of theirs. A row that shares nothing
goes on from the empty prefix: plain packing is the special case.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_SHARED = 8
"""Tokens of a prefix below which sharing it costs more, in attention by groups, than computing it again."""


@dataclass(frozen=True)
class Group:
    """Rows (their indices) that have their first `prefix` tokens in common; those of the empty prefix are not alike."""

    rows: tuple[int, ...]
    prefix: int


@dataclass(frozen=True)
class Suffixes:
    """Where a group stands in the stream: `prefix` places from `start` on, then one suffix of each row after another.

    `lengths` of the suffixes, of which a row may have none. `padded` `[m·L]` int64 are their places as a rectangle of m
    rows, right-padded to the longest with places that are not looked at; `real` `[Σ lengths]` int64 says which entries
    of the rectangle are theirs, in the order of the stream.
    """

    start: int
    prefix: int
    lengths: tuple[int, ...]
    padded: Tensor
    real: Tensor


@dataclass(frozen=True)
class Layout:
    """A stream of N places: tokens `[N]` and their positions in their rows `[N]`, int64.

    `places` `[B, S]` int64: where token t of row i stands, for t below the row's length (0 elsewhere). The last
    N − Σ places of `groups` are padding and belong to no row.
    """

    tokens: Tensor
    positions: Tensor
    places: Tensor
    groups: tuple[Suffixes, ...]

    def to(self, device: torch.device) -> Layout:
        groups = tuple(
            Suffixes(g.start, g.prefix, g.lengths, g.padded.to(device), g.real.to(device)) for g in self.groups
        )
        return Layout(self.tokens.to(device), self.positions.to(device), self.places.to(device), groups)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading tokens that are the same."""
    shorter = min(len(a), len(b))
    return next((t for t in range(shorter) if a[t] != b[t]), shorter)


def prefix_groups(rows: Sequence[Sequence[int]], *, minimum: int = MIN_SHARED) -> list[Group]:
    """Every row in one group; a row that shares fewer than `minimum` tokens with others is a group of its own.

    Greedy over the rows in lexicographic order: a row joins the group before it where that saves places, m rows with a
    prefix of p tokens saving (m − 1)·p.
    """
    groups: list[Group] = []
    for i in sorted(range(len(rows)), key=lambda i: tuple(rows[i])):
        if groups:
            last = groups[-1]
            m, p = len(last.rows), last.prefix
            shared = common_prefix(rows[last.rows[0]][: p if m > 1 else None], rows[i])
            if shared >= minimum and m * shared > (m - 1) * p:
                groups[-1] = Group((*last.rows, i), shared)
                continue
        groups.append(Group((i,), 0))
    return groups


def stream_places(rows: Sequence[Sequence[int]], groups: Sequence[Group]) -> int:
    """Length of the stream of `groups`."""
    return sum(group.prefix + sum(len(rows[i]) - group.prefix for i in group.rows) for group in groups)


def lay_out(rows: Sequence[Sequence[int]], *, minimum: int = MIN_SHARED, multiple: int = 1) -> Layout:
    """The stream of `rows`, none of them empty, padded to a `multiple` of places."""
    groups = prefix_groups(rows, minimum=minimum)
    alone = sorted((i for g in groups if not g.prefix for i in g.rows), key=lambda i: (-len(rows[i]), i))
    tokens: list[int] = []
    positions: list[int] = []
    places = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.int64)
    placed = []
    for group in (*(g for g in groups if g.prefix), *_of_like_length(rows, alone)):
        start, p = len(tokens), group.prefix
        tokens += rows[group.rows[0]][:p]
        positions += range(p)
        for i in group.rows:
            places[i, :p] = torch.arange(start, start + p)
            places[i, p : len(rows[i])] = torch.arange(len(tokens), len(tokens) + len(rows[i]) - p)
            tokens += rows[i][p:]
            positions += range(p, len(rows[i]))
        placed.append(_suffixes(start, p, [len(rows[i]) - p for i in group.rows]))
    extra = -len(tokens) % multiple
    return Layout(torch.tensor(tokens + [0] * extra), torch.tensor(positions + [0] * extra), places, tuple(placed))


def _of_like_length(rows: Sequence[Sequence[int]], longest_first: Sequence[int]) -> Iterator[Group]:
    """Groups of the empty prefix whose rectangles are at most half padding."""
    start = 0
    for end in range(1, len(longest_first) + 1):
        if end == len(longest_first) or 2 * len(rows[longest_first[end]]) < len(rows[longest_first[start]]):
            yield Group(tuple(longest_first[start:end]), 0)
            start = end


def _suffixes(start: int, prefix: int, lengths: Sequence[int]) -> Suffixes:
    longest = max(lengths)
    own = torch.arange(longest).expand(len(lengths), -1)
    ends = torch.tensor(lengths)
    first = start + prefix + ends.cumsum(0) - ends
    real = own < ends[:, None]
    padded = (first[:, None] + own).where(real, 0)
    return Suffixes(start, prefix, tuple(lengths), padded.flatten(), real.flatten().nonzero().squeeze(1))
