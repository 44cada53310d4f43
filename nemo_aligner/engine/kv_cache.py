"""Keys and values of the rows being decoded, in buckets of like length.

    bucket of 64 positions     rows 0..a-1 of the decode step
    bucket of 128 positions    rows a..b-1
    ...

A row moves on to a wider bucket when it has filled its own, so a long response does not make the short ones beside it
pay, in memory or in attention over positions that it alone has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CachedPrompt:
    """A prefilled prompt: its keys and values `[layers, 2, G, S, D]`, and the logits `[V]` of its next token.

    `logits` is None except on the last pipeline stage.
    """

    keys_values: Tensor
    logits: Tensor | None


class Bucket:
    """Rows of at most `width` positions; those in use are the first."""

    def __init__(self, like: Tensor, width: int) -> None:
        layers, two, groups, _, head_dim = like.shape
        self.width = width
        self.slots: list[int] = []  # whose row is which
        self._data = like.new_zeros(layers, two, 0, groups, width, head_dim)
        self._views: list[tuple[Tensor, Tensor]] = []

    def append(self, slots: Sequence[int], keys_values: Tensor) -> None:
        """New rows that all begin with `keys_values` `[layers, 2, G, S, D]`."""
        row, capacity = len(self.slots), self._data.size(2)
        wanted = row + len(slots)
        if wanted > capacity:
            layers, two, _, *rest = self._data.shape
            # zeros, since masked positions are multiplied by 0, which an infinity would survive; on a CPU, memory that
            # was never written takes no room
            grown = self._data.new_zeros(layers, two, max(wanted, 2 * row), *rest)
            grown[:, :, :row] = self._data[:, :, :row]
            self._data = grown
        self._data[:, :, row:wanted, :, : keys_values.size(3)] = keys_values[:, :, None]
        self.slots.extend(slots)
        self._views.clear()

    def row(self, slot: int, length: int) -> Tensor:
        """The first `length` positions of a row, `[layers, 2, G, length, D]`."""
        return self._data[:, :, self.slots.index(slot), :, :length]

    def remove(self, slot: int) -> None:
        """Free a row; the last one takes its place."""
        row, last = self.slots.index(slot), len(self.slots) - 1
        if row != last:
            self._data[:, :, row] = self._data[:, :, last]
        self.slots[row] = self.slots[last]
        self.slots.pop()
        self._views.clear()

    def places(self) -> Tensor:
        """Of each row: address of its keys in the first layer, and in elements: from layer to layer, from keys to
        values, from group to group; `[rows, 4]` int64."""
        layer, values, row, group = self._data.stride()[:4]
        rows = torch.arange(len(self.slots))
        addresses = self._data.data_ptr() + rows * (row * self._data.element_size())
        return torch.stack([addresses, *(torch.full_like(rows, step) for step in (layer, values, group))], dim=1)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, `[rows, G, T, D]` each, to be read and written."""
        if not self._views:
            used = self._data[:, :, : len(self.slots)]
            self._views = [(keys, values) for keys, values in map(Tensor.unbind, used.unbind())]
        return self._views[index]


class KVCache:
    """Rows by slot, a number of the caller's choice; `slots` says in which order a decode step takes them."""

    def __init__(self, grain: int) -> None:
        self._grain = grain
        self._buckets: dict[int, Bucket] = {}  # by width, ascending
        self._home: dict[int, Bucket] = {}  # by slot

    def _width(self, length: int) -> int:
        """Multiples of the grain up to four of them, then steps of a quarter to a half: few buckets for any length."""
        step = self._grain
        while length > 4 * step:
            step *= 2
        return -(-length // step) * step

    def _bucket(self, like: Tensor, length: int) -> Bucket:
        width = self._width(length)
        if width not in self._buckets:
            self._buckets[width] = Bucket(like, width)
            self._buckets = dict(sorted(self._buckets.items()))
        return self._buckets[width]

    def add(self, slots: Sequence[int], prompt: CachedPrompt) -> None:
        """Give each of `slots` a row that begins with the prompt, with room for the next token."""
        keys_values = prompt.keys_values
        bucket = self._bucket(keys_values, keys_values.size(3) + 1)
        bucket.append(slots, keys_values)
        self._home.update(dict.fromkeys(slots, bucket))

    def drop(self, slot: int) -> None:
        """Free a row."""
        home = self._home.pop(slot)
        home.remove(slot)
        if not home.slots:
            del self._buckets[home.width]

    def ensure(self, slot: int, length: int) -> None:
        """Room for `length` positions: a row that has filled its bucket moves to a wider one."""
        home = self._home[slot]
        if length > home.width:
            kept = home.row(slot, home.width)
            wider = self._bucket(kept, length)
            wider.append([slot], kept)
            self.drop(slot)
            self._home[slot] = wider

    @property
    def slots(self) -> list[int]:
        """Slots in the order of the rows of a decode step."""
        return [slot for bucket in self._buckets.values() for slot in bucket.slots]

    def places(self) -> Tensor:
        """Where the rows of a decode step lie in memory; see Bucket.places."""
        return torch.cat([bucket.places() for bucket in self._buckets.values()])

    def spans(self) -> Iterator[tuple[slice, Bucket]]:
        """Which rows of a decode step are in which bucket."""
        start = 0
        for bucket in self._buckets.values():
            stop = start + len(bucket.slots)
            yield slice(start, stop), bucket
            start = stop
