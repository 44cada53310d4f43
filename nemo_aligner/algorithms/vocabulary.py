"""Logits are gone through some rows at a time, so that they are never all there in float32."""

from __future__ import annotations


def rows_together(vocabulary: int, *, on_cpu: bool) -> int:
    """Rows of `vocabulary` logits that go together: few enough for a CPU's cache, enough to keep a GPU busy."""
    return max(1, (2**20 if on_cpu else 2**26) // vocabulary)
