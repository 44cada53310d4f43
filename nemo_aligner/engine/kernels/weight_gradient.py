"""Gradients of weights on a CPU with units for matrices, added up where they are computed, in csrc/weight_gradient.c.

As apex does on a GPU, under the name by which Megatron asks for it.
"""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, layers
from torch import Tensor

from nemo_aligner.engine.kernels.library import CpuKernels, cpu_kernels

_MULTIPLE = 16
"""Of which both sizes of a weight are."""


class FusedWeightGradient:
    """What stands where Megatron has apex's `fused_weight_gradient_mlp_cuda`."""

    def __init__(self, kernels: CpuKernels) -> None:
        self._kernels = kernels

    def wgrad_gemm_accum_fp32(self, inputs: Tensor, given: Tensor, main_grad: Tensor) -> None:
        """`main_grad` `[out, in]` float32 += `given`ᵀ · `inputs`, of `[N, out]` and `[N, in]` bf16."""
        self._kernels.add_weight_gradient(inputs.contiguous(), given.contiguous(), main_grad)


def fuse_weight_gradients(wrapped: DistributedDataParallel, dtype: torch.dtype) -> None:
    """Let the linear layers of `wrapped`, which keeps float32 gradients, do so where this machine can."""
    kernels = cpu_kernels(dtype, next(wrapped.parameters()).device)
    if kernels is None or not kernels.has_units:
        return
    layers.fused_weight_gradient_mlp_cuda = FusedWeightGradient(kernels)
    for module in wrapped.modules():
        if isinstance(module, ColumnParallelLinear):
            sizes = module.input_size, module.output_size_per_partition  # its weight may be the embedding's
        elif isinstance(module, RowParallelLinear):
            sizes = module.input_size_per_partition, module.output_size
        else:
            continue
        module.gradient_accumulation_fusion = not any(size % _MULTIPLE for size in sizes)
