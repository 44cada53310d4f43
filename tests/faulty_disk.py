"""Disks that fail: one that refuses changes from the k-th on, and a real one that is full."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from scripts.bench.crash_trap.sitecustomize import changed_path

_REMOVALS = ("os.remove", "os.rmdir")
_failing: list[FaultyDisk] = []


class FaultyDisk:
    """Python's own changes of names and files below `root` fail with `number` from the `at`-th on; 0: none does.

    A full disk lets go of what is removed, one that is read-only does not (`removals`).
    """

    def __init__(self, root: Path, number: int, *, removals: bool = False) -> None:
        self.root, self.number, self.removals = f"{root}/", number, removals
        self.at = self.changes = 0

    def watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        path = changed_path(event, arguments)
        if path is None or not path.startswith(self.root) or (event in _REMOVALS and not self.removals):
            return
        self.changes += 1
        if self.at and self.changes >= self.at:
            raise OSError(self.number, os.strerror(self.number), path)

    @contextmanager
    def failing_from(self, at: int) -> Iterator[None]:
        """Inside the block changes fail from the `at`-th on."""
        self.at, self.changes = at, 0
        if not _failing:
            sys.addaudithook(_hook)  # there is no way to take it away again
        _failing[:] = [self]
        try:
            yield
        finally:
            self.at = 0


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    for disk in _failing:
        disk.watch(event, arguments)


class SmallDisk:
    """A mounted tmpfs."""

    def __init__(self, root: Path) -> None:
        self.root, self._ballast = root, root / "ballast"

    def leave_free(self, size: int) -> None:
        """Fill the disk up to `size` bytes."""
        self.empty()
        found = os.statvfs(self.root)
        with self._ballast.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, found.f_bavail * found.f_frsize - size)

    def empty(self) -> None:
        """Take away what fills it."""
        self._ballast.unlink(missing_ok=True)


@contextmanager
def small_disk(root: Path, size: str = "8m") -> Iterator[SmallDisk]:
    """A tmpfs at `root`; the test is skipped where this user may not mount any."""
    root.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", root], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        yield SmallDisk(root)
    finally:
        subprocess.run(["umount", "--lazy", root], check=True)
