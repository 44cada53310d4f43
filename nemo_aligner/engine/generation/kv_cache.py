"""Keys and values of the rows being decoded, in buckets of like length, in blocks of rows.

    bucket of 64 positions     block of rows, block of rows, ...
    bucket of 128 positions    block of rows, ...
    ...

A row moves on to a wider bucket when it has filled its own, so a long response does not make the short ones beside it
pay, in memory or in attention over positions that it alone has. Blocks come and go whole, so growing copies nothing.

Where attention can read a row in two parts, rows hold responses only, and all responses to a prompt read its keys and
values where they were prefilled; elsewhere every row begins with a copy of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nemo_aligner.algorithms.cache_widths import bucket_width
from nemo_aligner.engine.interfaces import PromptScores


@dataclass(frozen=True)
class CachedPrompt:
    """A prefilled prompt: its keys and values `[layers, 2, G, S, D]`, and the logits `[V]` of its next token.

    `keys_values` is contiguous; `logits` is None except on the last pipeline stage. `scores` are there where they were
    asked for.
    """

    keys_values: Tensor
    logits: Tensor | None
    scores: PromptScores | None = None


def place_of(keys_values: Tensor) -> tuple[int, int, int, int]:
    """Where keys and values `[layers, 2, G, S, D]` of a row are: the address of its keys in the first layer, and in
    elements the way from layer to layer, from keys to values, from group to group."""
    layer, values, group = keys_values.stride()[:3]
    return keys_values.data_ptr(), layer, values, group


class Bucket:
    """Rows of at most `width` positions; all blocks but the last are full."""

    def __init__(self, width: int, block_rows: int, clear: bool) -> None:
        self.width, self._block_rows, self._clear = width, block_rows, clear
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
        if self._clear:
            row[..., length:, :] = 0

    def row(self, slot: int) -> Tensor:
        """Keys and values of a row, `[layers, 2, G, width, D]`."""
        return self._row(self.slots.index(slot))

    def _row(self, index: int) -> Tensor:
        return self._blocks[index // self._block_rows][:, :, index % self._block_rows]

    def remove(self, slot: int) -> int:
        """Free a row; the last one takes its place. Returns whose that is."""
        index, last = self.slots.index(slot), len(self.slots) - 1
        if index != last:
            self._row(index).copy_(self._row(last))
            self.slots[index] = self.slots[last]
        moved = self.slots.pop()
        if last % self._block_rows == 0:
            self._blocks.pop()
        return moved

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Blocks `[layers, 2, block_rows, G, width, D]`, and how many rows of each are in use, the first ones."""
        for start, block in zip(range(0, len(self.slots), self._block_rows), self._blocks, strict=True):
            yield min(self._block_rows, len(self.slots) - start), block


class KVCache:
    """Rows by slot, 0 to `capacity` - 1; `slots` says in which order a decode step takes them.

    Buckets hold multiples of `grain` positions, blocks hold `block_rows` rows. Read by `places` when it shares prompts,
    else by `blocks`.
    """

    def __init__(self, capacity: int, grain: int, block_rows: int, *, shares_prompts: bool) -> None:
        self._grain, self._block_rows, self._shares = grain, min(block_rows, capacity), shares_prompts
        self._buckets: dict[int, Bucket] = {}  # by width, ascending
        self._home: dict[int, Bucket] = {}  # by slot
        self._prompts: dict[int, Tensor] = {}  # by slot: keys and values of the prompt, where they are shared
        self._places = np.zeros((capacity, 9), dtype=np.int64)  # by slot; see `places`
        self._room = np.zeros(capacity, dtype=np.int64)  # by slot: positions there is room for, the prompt's included

    @property
    def slots(self) -> list[int]:
        """Slots in the order of the rows of a decode step: as they came, as far as blocks need not stay together."""
        if self._shares:
            return list(self._home)
        return [slot for bucket in self._buckets.values() for slot in bucket.slots]

    def add(self, slot: int, prompt: CachedPrompt) -> None:
        """A row that begins with a prefilled prompt, with room for the next token."""
        own = prompt.keys_values
        if self._shares:
            self._prompts[slot], own = own, own[..., :0, :]
            shared = self._prompts[slot]
            self._places[slot, :5] = shared.size(3), *place_of(shared)
        self._settle(slot, self._bucket(own.size(3) + 1), own)

    def ensure(self, slots: np.ndarray, lengths: np.ndarray) -> None:
        """Room for so many positions: rows that have filled their bucket move to a wider one."""
        for i in np.flatnonzero(self._room[slots] < lengths).tolist():
            slot, home = int(slots[i]), self._home[int(slots[i])]
            wider, row = self._bucket(int(lengths[i] - self._places[slot, 0])), home.row(slot)
            self._settle(slot, wider, row)
            self._leave(slot, home)

    def drop(self, slot: int) -> None:
        """Free a row."""
        self._prompts.pop(slot, None)
        self._leave(slot, self._home.pop(slot))

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows of a decode step, and their keys and values `[layers, 2, rows, G, T, D]`, block by block."""
        start = 0
        for used, block in self.whole_blocks():
            yield slice(start, start + used), block[:, :, :used]
            start += used

    def whole_blocks(self) -> Iterator[tuple[int, Tensor]]:
        """The blocks in the same order with all their rows, and how many of those are in use, the first ones."""
        for bucket in self._buckets.values():
            yield from bucket.blocks()

    def places(self) -> Tensor:
        """Where the rows of a decode step are, `[rows, 9]` int64: positions of the prompt that is shared, and the
        places, as `place_of` has them, of its keys and values and of the row's own."""
        return torch.from_numpy(self._places[self.slots])

    def _bucket(self, length: int) -> Bucket:
        """That of `length` positions."""
        width = bucket_width(length, self._grain)
        if width not in self._buckets:
            # what is masked is multiplied by 0, which what lay in memory might survive; `places` leads to no such thing
            self._buckets[width] = Bucket(width, self._block_rows, clear=not self._shares)
            self._buckets = dict(sorted(self._buckets.items()))
        return self._buckets[width]

    def _settle(self, slot: int, bucket: Bucket, keys_values: Tensor) -> None:
        bucket.append(slot, keys_values)
        self._home[slot], self._room[slot] = bucket, bucket.width + self._places[slot, 0]
        self._places[slot, 5:] = place_of(bucket.row(slot))

    def _leave(self, slot: int, bucket: Bucket) -> None:
        moved = bucket.remove(slot)
        if moved != slot:
            self._places[moved, 5:] = place_of(bucket.row(moved))
        if not bucket.slots:
            del self._buckets[bucket.width]
