"""Settings of other people's files: each is used, or known to change nothing, or refused by name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from nemo_aligner.errors import CheckpointError


@contextmanager
def placed(where: str) -> Iterator[None]:
    """A CheckpointError that leaves the block says `where` first, if it does not yet."""
    try:
        yield
    except CheckpointError as fault:
        if str(fault).startswith(where):
            raise
        raise CheckpointError(f"{where}: {fault}") from None


class Settings(Mapping[str, Any]):
    """A mapping that remembers which of its entries were looked at; `where` names it in messages.

    Raises CheckpointError for what is none.
    """

    def __init__(self, entries: Any, where: str) -> None:
        if not isinstance(entries, Mapping):
            raise CheckpointError(f"{where}={str(entries)[:80]} is not a mapping")
        self._entries, self._where = entries, where
        self._used: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self._used.add(name)
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        self._used.add(str(name))
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def needed(self, name: str) -> Any:
        """Raises CheckpointError where it is missing."""
        if name not in self:
            raise CheckpointError(f"{self._where} has no {name}")
        return self[name]

    def whole(self, name: str, default: int | None = None, *, low: int = 1) -> int:
        """A whole number from `low` on. Raises CheckpointError for another value, and where there is none."""
        value = self.needed(name) if default is None else self.get(name, default)
        if type(value) is not int or value < low:
            raise CheckpointError(f"{self._where}: {name}={str(value)[:80]} is not a whole number from {low} on")
        return value

    def number(self, name: str) -> float:
        """A finite number. Raises CheckpointError for another value, and where there is none."""
        value = self.needed(name)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise CheckpointError(f"{self._where}: {name}={str(value)[:80]} is not a number")
        return float(value)

    def check_all_used(self, harmless: frozenset[str]) -> None:
        """Raises CheckpointError for an entry that was not looked at, is not `harmless`, and is not off."""
        for name, value in self._entries.items():
            if name not in self._used and name not in harmless and value not in (None, False, [], {}, ""):
                raise CheckpointError(f"{self._where}: {name}={str(value)[:80]} is not understood")
