"""Norm and gate of a layer with their gradients on a CPU, each in one pass of csrc/pointwise.c."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemo_aligner.engine.kernels.library import CpuKernels


class RmsNorm(torch.autograd.Function):
    """x / √(mean(x²) + eps) · weight over the last dimension of `x` `[..., H]`, in float32 (arXiv 1910.07467)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, kernels: CpuKernels) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.options = eps, kernels
        return kernels.add_rms_norm(x.view(-1, x.size(-1)), None, weight, eps).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (eps, kernels) = ctx.saved_tensors, ctx.options
        given = gradients[0].contiguous()
        rows = (-1, x.size(-1))
        found, weights = kernels.rms_norm_backward(x.view(rows), weight, given.view(rows), eps)
        return found.view(x.shape), weights, None, None


class SiluGate(torch.autograd.Function):
    """silu(first half) · second half of the last dimension of `inner` `[..., 2F]` (SwiGLU, arXiv 2002.05202)."""

    @staticmethod
    def forward(ctx: Any, inner: Tensor, kernels: CpuKernels) -> Tensor:
        inner = inner.contiguous()
        ctx.save_for_backward(inner)
        ctx.kernels = kernels
        # of no rows too: an expert may have none
        return kernels.silu_mul(inner.flatten(0, -2)).view(*inner.shape[:-1], inner.size(-1) // 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        [inner] = ctx.saved_tensors
        given = gradients[0].contiguous()
        found = ctx.kernels.silu_mul_backward(inner.flatten(0, -2), given.flatten(0, -2))
        return found.view(inner.shape), None
