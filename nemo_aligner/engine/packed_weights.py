"""Weights in the layout that the CPU's bf16 products read, while generation runs.

torch brings a weight into blocks for the processor's bf16 instructions before every product. With the few rows of a
decode step that takes up to half of the product's time, so it is done once here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_aligner.engine.cpu_kernels import CpuKernels


class Layout(Protocol):
    """A way to keep weights `[out, in]`."""

    can_look_up: bool

    def pack(self, weight: Tensor) -> Tensor: ...

    def product(self, rows: Tensor, packed: Tensor, bias: Tensor | None, outputs: int) -> Tensor: ...

    def unpack(self, packed: Tensor, rows: Tensor | int) -> Tensor:
        """Rows of the weight: by their ids, or so many from the first on."""


class Panels:
    """Our own, read from front to back by every product; see csrc/products.c."""

    can_look_up = True

    def __init__(self, kernels: CpuKernels) -> None:
        self.pack, self.unpack, self.product = kernels.pack, kernels.unpack, kernels.product


class OneDnn:
    """The one of torch's own products, the fastest where the processor has units for matrices."""

    can_look_up = False

    def pack(self, weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight)

    def product(self, rows: Tensor, packed: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")

    def unpack(self, packed: Tensor, rows: Tensor | int) -> Tensor:
        return packed.to_dense()[rows if isinstance(rows, Tensor) else slice(rows)]


def layout_for(weight: Tensor, kernels: CpuKernels | None) -> Layout | None:
    """The fastest one for `weight`; None where it is best left as it is."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or weight.ndim != 2:
        return None
    if kernels is not None and kernels.has_products and weight.size(1) % 2 == 0:
        return Panels(kernels)
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return OneDnn()
    return None


class PackedWeights:
    """Products with parameters `[out, in]`, which are packed inside the block `packed()` and as they are outside of it.

    `looked_up` is one of them that is also read row by row (a tied embedding).
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        kernels: CpuKernels | None = None,
        looked_up: nn.Parameter | None = None,
    ) -> None:
        self._layouts: list[tuple[nn.Parameter, Layout]] = []
        for parameter in parameters:
            layout = layout_for(parameter, kernels)
            if layout is not None and (parameter is not looked_up or layout.can_look_up):
                self._layouts.append((parameter, layout))
        self._packed: dict[int, tuple[Layout, Tensor, int]] = {}  # with the number of outputs

    @contextmanager
    @torch.no_grad()
    def packed(self) -> Iterator[None]:
        """The packed weights stand in for the parameters, which are empty meanwhile, so there is no second copy.

        Parameters that are part of a larger buffer (the distributed optimizer's) stay, as their memory would not be
        freed.
        """
        emptied: list[nn.Parameter] = []
        try:
            for parameter, layout in self._layouts:
                self._packed[id(parameter)] = layout, layout.pack(parameter.detach()), len(parameter)
                if parameter.untyped_storage().nbytes() == parameter.nbytes:
                    parameter.data = parameter.new_empty(0)
                    emptied.append(parameter)
            yield
        finally:
            for parameter in emptied:
                layout, packed, outputs = self._packed.pop(id(parameter))
                parameter.data = layout.unpack(packed, outputs)
            self._packed.clear()

    def product(self, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`rows` `[N, in]` times `weight` `[out, in]`, as torch.nn.functional.linear defines it."""
        found = self._packed.get(id(weight))
        if found is None:
            return F.linear(rows, weight, bias)
        layout, packed, outputs = found
        return layout.product(rows.contiguous(), packed, bias, outputs)

    def rows(self, ids: Tensor, weight: Tensor) -> Tensor:
        """Rows `ids` `[N]` int64 of `weight` `[out, in]`: `[N, in]`."""
        found = self._packed.get(id(weight))
        if found is None:
            return F.embedding(ids, weight)
        layout, packed, _ = found
        return layout.unpack(packed, ids)
