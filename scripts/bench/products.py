"""The matrix products of a piece of work: seen as they are called, then done again without all the rest."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_aligner.engine.kernels.weight_gradient import FusedWeightGradient

PRODUCTS = ("mm", "addmm", "addmm_", "linear", "linear_backward", "mkldnn_linear")
"""Names of torch's operations that multiply rows by a weight; attention has others."""

_FUSED = FusedWeightGradient.wgrad_gemm_accum_fp32

Shape = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
Call = tuple[Any, tuple[Any, ...], Mapping[str, Any]]


class Products(TorchDispatchMode):
    """Within it every product is noted: the operation, and shape, strides and dtype of what it was given.

    Those of weights' gradients too that are added up in a kernel of their own, which torch does not see.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._noting = mock.patch.object(FusedWeightGradient, "wgrad_gemm_accum_fp32", self._note(_FUSED))

    def _note(self, product: Callable[..., None]) -> Callable[..., None]:
        def noting(fused: FusedWeightGradient, *args: Tensor) -> None:
            self.calls.append((functools.partial(product, fused), tuple(shape_of(arg) for arg in args), {}))
            product(fused, *args)

        return noting

    def __enter__(self) -> Products:
        self._noting.start()
        super().__enter__()
        return self

    def __exit__(self, *fault: Any) -> None:
        super().__exit__(*fault)
        self._noting.stop()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket.__name__ in PRODUCTS:
            self.calls.append((func, tuple(shape_of(arg) for arg in args), dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


def shape_of(value: Any) -> Any:
    return (tuple(value.shape), value.stride(), value.dtype) if isinstance(value, Tensor) else value


def seconds(calls: Sequence[Call], clock: Callable[[], float]) -> float:
    """Seconds of `calls`, in their order, on random numbers; operands of one shape are one tensor."""
    made: dict[Shape, Tensor] = {}

    def operand(value: Any) -> Any:
        if not (isinstance(value, tuple) and len(value) == 3 and isinstance(value[2], torch.dtype)):
            return value
        if value not in made:
            shape, strides, dtype = value
            made[value] = torch.empty_strided(shape, strides, dtype=dtype).normal_()
        return made[value]

    ready = [(func, [operand(arg) for arg in args], kwargs) for func, args, kwargs in calls]
    with torch.no_grad():
        for func, args, kwargs in ready[: len(ready) // 4]:
            func(*args, **kwargs)
        begin = clock()
        for func, args, kwargs in ready:
            func(*args, **kwargs)
        return clock() - begin
