"""A fault that one rank meets while the others wait for it, raised by all of them in the same words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from nemo_aligner.errors import AlignerError


class _Ranks(Protocol):
    """The part of engine.interfaces.Cluster that this takes."""

    def gather_ranks(self, value: Any) -> list[Any]: ...


@contextmanager
def together(cluster: _Ranks) -> Iterator[None]:
    """The block succeeds on every rank, or every rank raises the AlignerError of the first that has one. Collective.

    Work for some of the ranks goes into an `if` inside the block.
    """
    fault: AlignerError | None = None
    try:
        yield
    except AlignerError as found:
        fault = found
    for told in cluster.gather_ranks(fault):
        if told is not None:
            raise told
