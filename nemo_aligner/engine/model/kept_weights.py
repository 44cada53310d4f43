"""The weights a model had at one moment, kept in CPU memory and swapped in when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class KeptWeights:
    """A copy of this rank's weights of `module`.

    The accelerator holds one model at any time: swapping in moves the present weights to the CPU. Where the model is
    on the CPU already the two sets trade places, and nothing is copied.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parameters = list(module.parameters())
        self._kept = [parameter.detach().to("cpu", copy=True) for parameter in self._parameters]

    @contextmanager
    @torch.no_grad()
    def swapped_in(self) -> Iterator[None]:
        """The module computes with the kept weights inside the block, with its own again after it."""
        present = [self._put(parameter, kept) for parameter, kept in zip(self._parameters, self._kept, strict=True)]
        try:
            yield
        finally:
            for parameter, weights in zip(self._parameters, present, strict=True):
                self._put(parameter, weights)

    @staticmethod
    def _put(parameter: nn.Parameter, weights: torch.Tensor) -> torch.Tensor:
        """Give `parameter` these weights; returns those it had, on the CPU."""
        if parameter.device.type == "cpu":
            had, parameter.data = parameter.data, weights
            return had
        had = parameter.data.to("cpu", copy=True)
        parameter.data.copy_(weights)  # in place: optimizer and gradient buffers refer to this memory
        return had
