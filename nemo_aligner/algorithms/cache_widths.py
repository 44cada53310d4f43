"""How many positions the rows of a key/value cache have room for, and how many rows come and go together."""

from __future__ import annotations

GPU_GRAIN, GPU_BLOCK_ROWS = 512, 256
"""Where attention takes a launch per block of rows, few and large blocks are cheaper."""


def bucket_width(length: int, grain: int) -> int:
    """Room for `length` positions: multiples of the grain up to four of them, then with steps of a quarter to a half,
    so that there are few widths for any length."""
    step = grain
    while length > 4 * step:
        step *= 2
    return -(-length // step) * step


def bucket_widths(shortest: int, longest: int, grain: int) -> list[int]:
    """The widths that a row goes through while it grows, ascending."""
    widths = [bucket_width(shortest, grain)]
    while widths[-1] < longest:
        widths.append(bucket_width(widths[-1] + 1, grain))
    return widths
