"""`SHA256SUMS`: what the files of an archive or a checkpoint were when they were saved; `sha256sum --check` reads it.

sha256 and no shorter sum: provenance files have it, every machine has a tool for it, and most have it in hardware.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from nemo_aligner.errors import CheckpointError

SUMS = "SHA256SUMS"
_THREADS = min(8, os.cpu_count() or 1)  # hashing lets other threads run


def write_sums(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Write the sums of every file below `folder` into it; those that are `known` by `sums_of` are not read again."""
    known = known or {}
    files = [path for path in folder.rglob("*") if path.is_file() and str(path.relative_to(folder)) not in known]
    sums = {**known, **sums_of(folder, files)}
    (folder / SUMS).write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))


def sums_of(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """Name below `folder` → sum, of `files` there."""
    names = [str(path.relative_to(folder)) for path in files]
    with ThreadPoolExecutor(_THREADS) as threads:
        return dict(zip(names, threads.map(lambda name: file_sum(folder / name), names), strict=True))


def file_sum(path: str | Path) -> str:
    """sha256 of a file's bytes."""
    with Path(path).open("rb") as stream:
        return stream_sum(stream)


_known: dict[tuple[int, ...], str] = {}
"""Sums by which file it is and when it was changed."""


def known_sum(path: str | Path) -> str:
    """The same of a file that this process may have read already: one that is as it was is not read again."""
    with Path(path).open("rb") as stream:
        found = os.fstat(stream.fileno())
        state = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        if state not in _known:
            _known[state] = stream_sum(stream)
        return _known[state]


def stream_sum(stream: IO[bytes]) -> str:
    return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def parse_sums(text: bytes) -> dict[str, str]:
    """Name → sum. Raises CheckpointError for what is not of that form."""
    found = {}
    for number, line in enumerate(text.decode("utf-8", "replace").splitlines(), 1):
        wanted, _, name = line.partition("  ")
        if len(wanted) != 64 or not name:
            raise CheckpointError(f"{SUMS}:{number}: damaged")
        found[name] = wanted
    if not found:
        raise CheckpointError(f"{SUMS}: damaged, it is empty")
    return found


def check_sums(folder: Path) -> bool:
    """Whether the files below `folder` have stored sums, and are what those say.

    False where none are stored, as in what other programs wrote. Raises CheckpointError naming the first file that is
    missing or another.
    """
    path = folder / SUMS
    if not path.is_file():
        return False
    wanted = parse_sums(path.read_bytes())
    with ThreadPoolExecutor(_THREADS) as threads:
        compare(wanted, threads.map(lambda name: (name, _sum_or_none(folder / name)), wanted))
    return True


def compare(wanted: Mapping[str, str], found: Iterable[tuple[str, str | None]]) -> None:
    """Raises CheckpointError for the first name whose sum, None where it is missing, is not the wanted one."""
    for name, own in found:
        if own != wanted[name]:
            said = "it is missing" if own is None else "its bytes are others"
            raise CheckpointError(
                f"{name}: not as it was saved, by {SUMS}: {said}; take another copy, or remove its line there where it "
                "was changed on purpose"
            )


def _sum_or_none(path: Path) -> str | None:
    return file_sum(path) if path.is_file() else None
