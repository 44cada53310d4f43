"""Which attention heads the C kernels of a CPU take."""

from __future__ import annotations


def kernels_take(head_dim: int) -> bool:
    """Whether heads of this dimension: multiples of 16 up to 256."""
    return head_dim % 16 == 0 and head_dim <= 256
