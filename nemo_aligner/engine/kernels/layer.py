"""A decoder layer of the common kind (RMS norms, SiLU gate, no norm of queries and keys) in two calls of the C kernels.

With few rows or a small model, the calls from Python to each kernel take as long as the kernels.
"""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_aligner.engine.kernels.library import CpuKernels, address


class LayerWeights(NamedTuple):
    """Norms' weights `[H]`, and those of products `[out, in]` as CpuKernels.pack left them."""

    input_norm: Tensor
    qkv: Tensor
    projection: Tensor
    mlp_norm: Tensor
    fc1: Tensor
    fc2: Tensor


class _Layer(ctypes.Structure):
    """csrc/layer.c describes it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*LayerWeights._fields, "qkv_bias", "fc1_bias", "cosine", "sine")),
        *((name, ctypes.c_int64) for name in ("layer", "H", "G", "R", "D", "F", "turned", "window")),
        *((name, ctypes.c_float) for name in ("eps", "scale")),
    )


class CpuLayer:
    """The two halves of a decoder layer, without the sum over tensor-parallel ranks and the bias that follow each."""

    def __init__(
        self,
        kernels: CpuKernels,
        weights: LayerWeights,
        biases: tuple[Tensor | None, Tensor | None],
        rotary: tuple[Tensor, Tensor] | None,
        *,
        index: int,
        groups: int,
        head_dim: int,
        window: int,
        eps: float,
    ) -> None:
        """Layer number `index`, with `biases` of qkv and fc1; `rotary` and `window` are those of CpuKernels.attend."""
        self._attention, self._feed_forward = kernels.attention_half, kernels.feed_forward_half
        self._tensors = (*weights, *biases, *(rotary or (None, None)))  # held: the layer has their addresses
        addresses = [address(tensor) for tensor in self._tensors]
        (hidden, context), inner = weights.projection.shape, weights.fc2.size(1)
        turned = 0 if rotary is None else rotary[0].size(1)
        sizes = index, hidden, groups, context // (groups * head_dim), head_dim, inner, turned, window
        self._layer = ctypes.byref(_Layer(*addresses, *sizes, eps, 1 / math.sqrt(head_dim)))

    def attention(self, hidden: Tensor, delta: Tensor | None, places: Tensor, positions: Tensor) -> Tensor:
        """`hidden` `[N, H]` += `delta`, in place; returns the projected attention `[N, H]` of its norm.

        `places` and `positions` are those of CpuKernels.attend. Raises MemoryError.
        """
        out = torch.empty_like(hidden)
        where = places.data_ptr(), positions.data_ptr()
        if self._attention(self._layer, hidden.data_ptr(), address(delta), *where, out.data_ptr(), len(hidden)):
            raise MemoryError("attention of a layer")
        return out

    def feed_forward(self, hidden: Tensor, delta: Tensor | None) -> Tensor:
        """`hidden` `[N, H]` += `delta`, in place; returns the feed-forward output `[N, H]` of its norm.

        Raises MemoryError.
        """
        out = torch.empty_like(hidden)
        if self._feed_forward(self._layer, hidden.data_ptr(), address(delta), out.data_ptr(), len(hidden)):
            raise MemoryError("feed-forward part of a layer")
        return out
