"""Files that appear whole or not at all, stay after a power cut, and are not written over what they are made from."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from nemo_aligner.errors import OutputError


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """What the disk refuses inside the block, as OutputError that names `path`."""
    try:
        yield
    except FileExistsError as fault:  # of making a folder
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


Inputs = Mapping[str, Iterable[str | Path | None]]
"""Paths of what is read, by their key."""


def refuse_overwriting(output: str | Path, said: str, inputs: Inputs) -> None:
    """Raises OutputError where `output` is one of `inputs`, however its path is spelled.

    `said` is what the message calls it, such as output_file=rows.jsonl.
    """
    for key, paths in inputs.items():
        for path in paths:
            if path is not None and _is_same(output, path):
                raise OutputError(f"{said} is also an input, {path} ({key}); give it another name")


def _is_same(one: str | Path, other: str | Path) -> bool:
    """Whether two paths lead to one file, through links too; of what is not there, whether they would."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)


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
