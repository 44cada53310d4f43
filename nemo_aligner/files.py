"""Files that appear whole or not at all, and stay after a power cut."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from nemo_aligner.errors import OutputError


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """What the disk refuses inside the block, as OutputError that names `path`."""
    try:
        yield
    except (FileExistsError, NotADirectoryError) as fault:
        raise OutputError(f"cannot write {path}: a folder is needed where {fault.filename} is a file") from fault
    except OSError as fault:
        raise OutputError(f"cannot write {path}: {fault.strerror or fault}") from fault


def write_atomically(path: str | Path, pieces: Iterable[str | bytes]) -> None:
    """Write text (in UTF-8) or bytes so that the file appears whole or not at all. Raises OutputError."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as stream:
                stream.writelines(piece.encode() if isinstance(piece, str) else piece for piece in pieces)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, path)
            fsync(path.parent)
        finally:
            with contextlib.suppress(OSError):  # a folder that cannot be written has nothing to remove either
                partial.unlink()


def fsync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Make every file below `folder` durable."""
    for path in [folder, *folder.rglob("*")]:
        fsync(path)
