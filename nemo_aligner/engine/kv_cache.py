"""Keys and values of the rows being decoded, in buckets of like length, in blocks of rows.

    bucket of 64 positions     block of rows, block of rows, ...
    bucket of 128 positions    block of rows, ...
    ...

A row moves on to a wider bucket when it has filled its own, so a long response does not make the short ones beside it
pay, in memory or in attention over positions that it alone has. Blocks come and go whole, so growing copies nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    """Rows of at most `width` positions; all blocks but the last are full."""

    def __init__(self, width: int, block_rows: int) -> None:
        self.width, self._block_rows = width, block_rows
        self.slots: list[int] = []  # whose row is which
        self._blocks: list[Tensor] = []  # [layers, 2, block_rows, G, width, D] each

    def append(self, slot: int, keys_values: Tensor) -> None:
        """A new row that begins with `keys_values` `[layers, 2, G, S, D]`."""
        layers, two, groups, length, head_dim = keys_values.shape
        if len(self.slots) == len(self._blocks) * self._block_rows:
            shape = (layers, two, self._block_rows, groups, self.width, head_dim)
            self._blocks.append(keys_values.new_empty(shape))
        self.slots.append(slot)
        row = self._row(len(self.slots) - 1)
        row[..., :length, :] = keys_values
        row[..., length:, :] = 0  # where masked, it is multiplied by 0, which what lay in memory might survive

    def row(self, slot: int) -> Tensor:
        """Keys and values of a row, `[layers, 2, G, width, D]`."""
        return self._row(self.slots.index(slot))

    def _row(self, index: int) -> Tensor:
        return self._blocks[index // self._block_rows][:, :, index % self._block_rows]

    def remove(self, slot: int) -> None:
        """Free a row; the last one takes its place."""
        index, last = self.slots.index(slot), len(self.slots) - 1
        if index != last:
            self._row(index).copy_(self._row(last))
            self.slots[index] = self.slots[last]
        self.slots.pop()
        if last % self._block_rows == 0:
            self._blocks.pop()

    def blocks(self) -> Iterator[Tensor]:
        """The rows in use, `[layers, 2, rows, G, width, D]`, block by block."""
        for start, block in zip(range(0, len(self.slots), self._block_rows), self._blocks, strict=True):
            yield block[:, :, : len(self.slots) - start]


class KVCache:
    """Rows by slot, a number of the caller's choice; `slots` says in which order a decode step takes them.

    Buckets hold multiples of `grain` positions, blocks hold `block_rows` rows.
    """

    def __init__(self, grain: int, block_rows: int) -> None:
        self._grain, self._block_rows = grain, block_rows
        self._buckets: dict[int, Bucket] = {}  # by width, ascending
        self._home: dict[int, Bucket] = {}  # by slot

    def _bucket(self, length: int) -> Bucket:
        """That of `length` positions: multiples of the grain up to four of them, then with steps of a quarter to a
        half, so that there are few for any length."""
        step = self._grain
        while length > 4 * step:
            step *= 2
        width = -(-length // step) * step
        if width not in self._buckets:
            self._buckets[width] = Bucket(width, self._block_rows)
            self._buckets = dict(sorted(self._buckets.items()))
        return self._buckets[width]

    def add(self, slot: int, prompt: CachedPrompt) -> None:
        """A row that begins with a prefilled prompt, with room for the next token."""
        self._home[slot] = self._bucket(prompt.keys_values.size(3) + 1)
        self._home[slot].append(slot, prompt.keys_values)

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
            wider = self._bucket(length)
            wider.append(slot, home.row(slot))
            self.drop(slot)
            self._home[slot] = wider

    @property
    def slots(self) -> list[int]:
        """Slots in the order of the rows of a decode step."""
        return [slot for bucket in self._buckets.values() for slot in bucket.slots]

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows of a decode step, and their keys and values `[layers, 2, rows, G, T, D]`, block by block."""
        start = 0
        for bucket in self._buckets.values():
            for block in bucket.blocks():
                yield slice(start, start + block.size(2)), block
                start += block.size(2)

    def places(self) -> Tensor:
        """Of each row of a decode step: address of its keys in the first layer, and in elements: from layer to layer,
        from keys to values, from group to group; `[rows, 4]` int64."""
        parts = []
        for rows, block in self.blocks():
            layer, values, row, group = block.stride()[:4]
            index = torch.arange(rows.stop - rows.start)
            addresses = block.data_ptr() + index * (row * block.element_size())
            parts.append(
                torch.stack([addresses, *(torch.full_like(index, step) for step in (layer, values, group))], 1)
            )
        return torch.cat(parts)
