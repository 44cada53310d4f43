"""Attention of a stream and its gradient on a CPU, in csrc/stream_attention.c: nothing is copied to be attended to."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_aligner.algorithms.shared_prefix import Suffixes
from nemo_aligner.engine.kernels.library import CpuKernels, address

_GRAIN = 32
"""Keys whose products are summed together, by any processor."""


class Spans(NamedTuple):
    """The runs of a stream that attend alike, as csrc/stream_attention.c describes them.

    `spans` `[S, 4]` int64; those from `parts[i]` to `parts[i + 1]` go on from one prefix; `parts` `[P + 1]` int64.
    """

    spans: Tensor
    parts: Tensor

    def cover(self, places: int) -> bool:
        """Whether all of a stream's `places` are of one of them."""
        return int(self.spans[:, 3].sum()) == places


def spans_of(groups: Sequence[Suffixes]) -> Spans:
    spans: list[tuple[int, int, int, int]] = []
    parts = [0]
    for group in groups:
        place = group.start + group.prefix
        for length in group.lengths:
            if length:
                spans.append((group.start, group.prefix, place, length))
            if not group.prefix:
                parts.append(len(spans))
            place += length
        if group.prefix:
            spans.append((0, 0, group.start, group.prefix))
            parts.append(len(spans))
    return Spans(torch.tensor(spans).view(-1, 4), torch.tensor(parts))


class _Stream(ctypes.Structure):
    """csrc/stream_attention.c describes it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("mixed", "cosine", "sine", "spans", "parts")),
        *((name, ctypes.c_int64) for name in ("P", "N", "G", "R", "D", "turned", "window", "grain")),
        ("scale", ctypes.c_float),
    )


class StreamAttention(torch.autograd.Function):
    """Rotary embedding and attention within the rows of a stream."""

    @staticmethod
    def forward(
        ctx: Any,
        mixed: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        spans: Spans,
        window: int | None,
        scale: float,
        kernels: CpuKernels,
    ) -> Tensor:
        """`mixed` is `[N, G, R + 2, D]`: R query heads, key and value of each group; for D see `algorithms.heads`.

        `rotary` is cos and signed sin of every place, `[N, D_rot]`, in the dtype of `mixed`. Returns `[N, G·R·D]`;
        places of no span get 0. Raises MemoryError.
        """
        n, groups, heads, width = mixed.shape
        # what is zeroed here is what the kernel leaves alone
        out = (mixed.new_empty if spans.cover(n) else mixed.new_zeros)(n, groups * (heads - 2) * width)
        log_sums = torch.empty(n, groups * (heads - 2))
        ctx.save_for_backward(mixed, out, log_sums, *spans, *(rotary or ()))
        ctx.options = window, scale, kernels
        _call(kernels, _stream(mixed, rotary, spans, window, scale), out, log_sums)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        [given] = gradients
        mixed, out, log_sums, places, parts, *rotary = ctx.saved_tensors
        spans = Spans(places, parts)
        window, scale, kernels = ctx.options
        found = (torch.empty_like if spans.cover(len(mixed)) else torch.zeros_like)(mixed)
        stream = _stream(mixed, (rotary[0], rotary[1]) if rotary else None, spans, window, scale)
        _call(kernels, stream, out, log_sums, given.contiguous(), found)
        return found, None, None, None, None, None


def attend_alike(
    mixed: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    spans: Spans,
    window: int | None,
    scale: float,
    kernels: CpuKernels,
) -> Tensor:
    """StreamAttention without a gradient, of which every row's result is a function of the row, to the last bit.

    Every place is of a span. Raises MemoryError.
    """
    n, groups, heads, width = mixed.shape
    out = mixed.new_empty(n, groups * (heads - 2) * width)
    _call(kernels, _stream(mixed, rotary, spans, window, scale, _GRAIN), out, torch.empty(n, groups * (heads - 2)))
    return out


def _stream(
    mixed: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    spans: Spans,
    window: int | None,
    scale: float,
    grain: int = 1,
) -> _Stream:
    n, groups, heads, width = mixed.shape
    cos, sin, turned = (None, None, 0) if rotary is None else (*(address(t) for t in rotary), rotary[0].size(1))
    sizes = len(spans.parts) - 1, n, groups, heads - 2, width, turned, window or 0, grain
    return _Stream(address(mixed), cos, sin, *(address(t) for t in spans), *sizes, scale)


def _call(kernels: CpuKernels, stream: _Stream, *tensors: Tensor) -> None:
    """out and log_sums, and for the backward pass their gradient and that of mixed."""
    addresses = [address(tensor) for tensor in tensors] + [None] * (4 - len(tensors))
    if kernels.stream_attention(ctypes.byref(stream), *addresses):
        raise MemoryError("attention of a stream")
