"""Random tensors, and how near a kernel's result has to be."""

from __future__ import annotations

import torch


def normal(dtype: torch.dtype, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))).to(dtype)


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Within one rounding to the dtype of `found`."""
    rtol, atol = (2**-7, 1e-3) if found.dtype == torch.bfloat16 else (1e-5, 1e-5)
    torch.testing.assert_close(found.float(), wanted.float(), rtol=rtol, atol=atol)
