"""Attention of generation over cached keys and values: by our kernel, or by torch for a prefill and for a step.

Notation as in decode.py. Each is called with a layer's index and its mixed heads `[N, G, R + 2, D]`, stores the new
keys and values where they will be looked at again, and returns contexts `[N, G·R·D]`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_aligner.engine.kernels.library import CpuKernels
from nemo_aligner.engine.kernels.stream_attention import Spans, attend_alike
from nemo_aligner.engine.model.attention import packed_attention

Windows = Sequence[int | None]
"""The sliding window of each layer of this stage; None: it sees everything."""


class CachedAttention(Protocol):
    def __call__(self, layer: int, mixed: Tensor) -> Tensor: ...


class Rotary(NamedTuple):
    """cos and signed sin of every position's rotary angles, `[max positions, D_rot]` in the model's dtype."""

    cos: Tensor
    sin: Tensor

    def at(self, positions: Tensor) -> Rotary:
        """Those of `positions` `[N]`, `[N, 1, 1, D_rot]`."""
        return Rotary(self.cos[positions][:, None, None], self.sin[positions][:, None, None])


class KernelAttention(NamedTuple):
    """All rows in one call, be they decoded responses or positions of prompts; see CpuKernels.attend."""

    kernels: CpuKernels
    rotary: Rotary | None
    places: Tensor
    positions: Tensor
    windows: Windows

    def __call__(self, layer: int, mixed: Tensor) -> Tensor:
        where, scale = (self.places, self.positions), 1 / math.sqrt(mixed.size(3))
        window = self.windows[layer] or 0
        return self.kernels.attend(mixed, self.rotary, *where, layer=layer, window=window, scale=scale)


class RowAttention(NamedTuple):
    """Of rows in a stream, of which nothing is kept; `rotary` is that of every place, `[N, D_rot]` each."""

    kernels: CpuKernels
    rotary: Rotary | None
    spans: Spans
    windows: Windows

    def __call__(self, layer: int, mixed: Tensor) -> Tensor:
        scale = 1 / math.sqrt(mixed.size(3))
        return attend_alike(mixed, self.rotary, self.spans, self.windows[layer], scale, self.kernels)


class PromptAttention:
    """Prompt by prompt, with torch's kernel; fills `keys_values` `[layers, 2, G, S, D]` of each."""

    def __init__(
        self, rotary: Rotary | None, positions: Tensor, keys_values: Sequence[Tensor], windows: Windows
    ) -> None:
        self._turn, self._keys_values, self._windows = rotary and rotary.at(positions), keys_values, windows
        self._edges = [0, *itertools.accumulate(one.size(3) for one in keys_values)]

    def __call__(self, layer: int, mixed: Tensor) -> Tensor:
        query, key, value = turned_heads(mixed, self._turn)
        for one, (start, end) in zip(self._keys_values, itertools.pairwise(self._edges), strict=True):
            one[layer, 0], one[layer, 1] = key[start:end].transpose(0, 1), value[start:end].transpose(0, 1)
        return packed_attention(query, key, value, self._edges, window=self._windows[layer])


class BlockAttention:
    """Of a step, block by block of the cache, with torch's kernel over all positions of a block and masked."""

    def __init__(
        self, rotary: Rotary | None, positions: Tensor, blocks: Iterable[tuple[slice, Tensor]], windows: Windows
    ) -> None:
        """`blocks` as KVCache.blocks has them."""
        self._turn, self._positions, self._windows = rotary and rotary.at(positions), positions, windows
        self._parts = [
            (
                rows,
                block,
                torch.arange(block.size(2), device=positions.device),
                {window: _bias(positions[rows], block, window) for window in set(windows)},
            )
            for rows, block in blocks
        ]

    def __call__(self, layer: int, mixed: Tensor) -> Tensor:
        query, key, value = turned_heads(mixed, self._turn)
        # the R query heads of a key/value head stand as R query rows, so keys are never repeated
        query = query.view(*key.shape[:2], -1, key.size(2))
        contexts = []
        for rows, block, index, biases in self._parts:
            keys, values = block[layer]
            keys[index, :, self._positions[rows]] = key[rows]
            values[index, :, self._positions[rows]] = value[rows]
            context = F.scaled_dot_product_attention(query[rows], keys, values, attn_mask=biases[self._windows[layer]])
            contexts.append(context.reshape(len(context), -1))
        return contexts[0] if len(contexts) == 1 else torch.cat(contexts)


def _bias(positions: Tensor, block: Tensor, window: int | None) -> Tensor:
    """What attention adds to the scores of rows at `positions` `[B]`: -inf where unseen, `[B, 1, 1, T]`.

    `block` is `[layers, 2, B, G, T, D]`.
    """
    cached = torch.arange(block.size(4), device=positions.device)
    visible = cached <= positions[:, None]
    if window is not None:
        visible &= cached > (positions - window)[:, None]
    bias = torch.zeros_like(visible, dtype=block.dtype).masked_fill_(~visible, -torch.inf)
    return bias[:, None, None, :]


def turned_heads(mixed: Tensor, turn: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
    """Query `[N, G·R, D]`, key and value `[N, G, D]` of `mixed` `[N, G, R + 2, D]`, turned by position."""
    heads, value = mixed[:, :, :-1], mixed[:, :, -1]
    if turn is not None:
        heads = rotate(heads, *turn)
    return heads[:, :, :-1].flatten(1, 2), heads[:, :, -1], value


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, halves form (arXiv 2104.09864), of the first D_rot dimensions of `heads` `[..., D]`.

    (a, b) → (a·cos − b·sin, b·cos + a·sin), with a and b their halves; cos is given for both halves, and sin with the
    sign it has in either, `[..., D_rot]`.
    """
    width = cos.size(-1)
    turned, rest = heads[..., :width], heads[..., width:]
    turned = torch.addcmul(turned * cos, turned.roll(width // 2, dims=-1), sin)
    return turned if not rest.size(-1) else torch.cat((turned, rest), dim=-1)
