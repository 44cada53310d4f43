"""Weights in the layout that the CPU's bf16 products read, while generation runs.

oneDNN brings a weight into blocks for the processor's bf16 instructions before every product. With the few rows of a
decode step that takes up to half of the product's time, so it is done once here. The values are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def can_pack(weight: Tensor) -> bool:
    """True for what oneDNN packs: bf16 weights on a CPU that computes with them."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PackedWeights:
    """Products with `parameters`, packed inside the block `packed()` and as they are outside of it."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [parameter for parameter in parameters if can_pack(parameter)]
        self._packed: dict[int, Tensor] = {}

    @contextmanager
    @torch.no_grad()
    def packed(self) -> Iterator[None]:
        """The packed weights stand in for the parameters, which are empty meanwhile, so there is no second copy.

        Parameters that are part of a larger buffer (the distributed optimizer's) stay, as their memory would not be
        freed.
        """
        emptied: list[nn.Parameter] = []
        try:
            for parameter in self._parameters:
                self._packed[id(parameter)] = torch.ops.mkldnn._reorder_linear_weight(parameter.detach())
                if parameter.untyped_storage().nbytes() == parameter.nbytes:
                    parameter.data = parameter.new_empty(0)
                    emptied.append(parameter)
            yield
        finally:
            for parameter in emptied:
                parameter.data = self._packed.pop(id(parameter)).to_dense()
            self._packed.clear()

    def product(self, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`rows` `[N, in]` times `weight` `[out, in]`, as torch.nn.functional.linear gives it."""
        packed = self._packed.get(id(weight))
        if packed is None:
            return F.linear(rows, weight, bias)
        return torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
