"""Weights in the layout that the CPU's products read, while generation runs.

torch brings a weight into blocks before every product. With the few rows of a decode step that takes up to two thirds
of the product's time, so it is done once here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_aligner.engine.kernels.library import CpuKernels
from nemo_aligner.engine.processes.cuda_on_cpu import multiplies_bf16


class Layout(Protocol):
    """A way to keep weights `[out, in]`. A parameter is empty while it is packed."""

    can_look_up: bool

    def pack(self, parameter: nn.Parameter) -> Tensor: ...

    def restore(self, parameter: nn.Parameter, packed: Tensor) -> None: ...

    def product(self, rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor: ...

    def rows_of(self, packed: Tensor, ids: Tensor) -> Tensor: ...


class Panels:
    """Our own, in the parameter's own memory, and read from front to back by every product; see csrc/products.c."""

    can_look_up = True

    def __init__(self, kernels: CpuKernels) -> None:
        self._kernels = kernels
        self.product, self.rows_of = kernels.product, kernels.rows_of

    def pack(self, parameter: nn.Parameter) -> Tensor:
        weight = parameter.data
        self._kernels.pack(weight)
        parameter.data = parameter.new_empty(0)
        return weight

    def restore(self, parameter: nn.Parameter, packed: Tensor) -> None:
        self._kernels.pack(packed, back=True)
        parameter.data = packed


class OneDnn:
    """That of torch's bf16 products, the fastest without ours.

    Parameters that are part of a larger buffer (the distributed optimizer's) stay as they are beside it, as their
    memory would not be freed.
    """

    can_look_up = False

    def pack(self, parameter: nn.Parameter) -> Tensor:
        packed = torch.ops.mkldnn._reorder_linear_weight(parameter.detach())
        if parameter.untyped_storage().nbytes() == parameter.nbytes:
            parameter.data = parameter.new_empty(0)
        return packed

    def restore(self, parameter: nn.Parameter, packed: Tensor) -> None:
        if not parameter.numel():
            parameter.data = packed.to_dense()

    def product(self, rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")

    def rows_of(self, packed: Tensor, ids: Tensor) -> Tensor:
        raise NotImplementedError


def layout_for(weight: Tensor, kernels: CpuKernels | None) -> Layout | None:
    """The fastest one for `weight`; None where it is best left as it is."""
    if weight.device.type != "cpu" or not weight.is_contiguous():
        return None
    if kernels is not None and kernels.has_products and weight.size(1) * weight.element_size() % 4 == 0:
        return Panels(kernels)
    if weight.dtype == torch.bfloat16 and multiplies_bf16():
        return OneDnn()
    return None


ALIKE = 128
"""Rows of every product that is to treat rows alike: enough for units for matrices, few for a single short text."""


class PackedWeights:
    """Products with parameters `[out, in]`, which are packed inside the block `packed()` and as they are outside of it.

    `looked_up` is one of them that is also read row by row (a tied embedding). With `alike` a row's product does not
    depend on the rows beside it: libraries choose how to sum by the number of rows, so they get the same number always.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        kernels: CpuKernels | None = None,
        looked_up: nn.Parameter | None = None,
        *,
        alike: bool = False,
        merged: Callable[[nn.Parameter], Tensor | None] = lambda parameter: None,
    ) -> None:
        """`merged` gives what stands in for a parameter that has an adapter, and None for others."""
        self._alike, self._merged = alike, merged
        self._layouts: list[tuple[nn.Parameter, Layout | None]] = []
        for parameter in parameters:
            layout = layout_for(parameter, kernels)
            known = layout is not None and (parameter is not looked_up or layout.can_look_up)
            self._layouts.append((parameter, layout if known else None))
        self._packed: dict[int, tuple[Layout | None, Tensor]] = {}  # by the parameter's id

    @contextmanager
    @torch.no_grad()
    def packed(self) -> Iterator[None]:
        """The packed weights stand in for the parameters."""
        done: list[tuple[nn.Parameter, Layout, Tensor]] = []
        try:
            for parameter, layout in self._layouts:
                merged = self._merged(parameter)
                if merged is not None:  # a copy: the parameter stays as it is beside it
                    packed = merged if layout is None else layout.pack(nn.Parameter(merged, requires_grad=False))
                    self._packed[id(parameter)] = layout, packed
                elif layout is not None:
                    done.append((parameter, layout, layout.pack(parameter)))
                    self._packed[id(parameter)] = done[-1][1:]
            yield
        finally:
            self._packed.clear()
            for parameter, layout, packed in done:
                layout.restore(parameter, packed)

    def panels(self, weight: nn.Parameter) -> Tensor | None:
        """`weight` as it is now in our own layout; None where it is not."""
        layout, packed = self._packed.get(id(weight), (None, None))
        return packed if isinstance(layout, Panels) else None

    def product(self, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`rows` `[N, in]` times `weight` `[out, in]`, as torch.nn.functional.linear defines it."""
        layout, packed = self._packed.get(id(weight), (None, None))
        if isinstance(layout, Panels) or not self._alike:
            return _product(layout, rows, weight if packed is None else packed, bias)
        parts = list(rows.split(ALIKE))
        if rest := -len(rows) % ALIKE:
            parts[-1] = F.pad(parts[-1], (0, 0, 0, rest))
        found = [_product(layout, part, weight if packed is None else packed, bias) for part in parts]
        found[-1] = found[-1][: ALIKE - rest]
        return torch.cat(found)

    def rows(self, ids: Tensor, weight: Tensor) -> Tensor:
        """Rows `ids` `[N]` int64 of `weight` `[out, in]`: `[N, in]`."""
        layout, packed = self._packed.get(id(weight), (None, None))
        if layout is None or packed is None:
            return F.embedding(ids, weight)
        return layout.rows_of(packed, ids)


def _product(layout: Layout | None, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(rows, weight, bias) if layout is None else layout.product(rows.contiguous(), weight, bias)
