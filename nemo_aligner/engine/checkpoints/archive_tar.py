"""The tar of an archive: opened, its members looked at before they are used, and packed the same by everybody."""

from __future__ import annotations

import os
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from nemo_aligner.engine.checkpoints.hf_settings import named
from nemo_aligner.errors import CheckpointError
from nemo_aligner.metrics import Progress

_MOST_TEXT = 16 << 20
_MB = 1_000_000
_LONG = 1000 * _MB
"""Bytes of an archive whose packing is worth a bar."""


@contextmanager
def open_tar(path: Path, key: str) -> Iterator[tarfile.TarFile]:
    if not path.exists():
        raise CheckpointError(f"{named(key, path)}: no such file")
    try:
        with tarfile.open(path, "r:") as tar:
            yield tar
    except (tarfile.TarError, EOFError) as fault:
        raise CheckpointError(f"{named(key, path)}: not a .nemo archive, or truncated or corrupt ({fault})") from None
    except PermissionError:
        raise CheckpointError(f"{named(key, path)}: no permission to read it") from None


def read_member(tar: tarfile.TarFile, name: str, path: Path, key: str) -> bytes:
    for candidate in (name, f"./{name}"):  # NeMo's own writer puts ./ in front
        try:
            member = tar.getmember(candidate)
        except KeyError:
            continue
        if member.size > _MOST_TEXT:
            raise CheckpointError(
                f"{named(key, path)}: {name} has {member.size} bytes, and none needs over {_MOST_TEXT}"
            )
        stream = tar.extractfile(member) if member.isfile() else None
        if stream is not None:
            return stream.read()
    raise CheckpointError(f"{named(key, path)}: the archive has no {name}, so it is not a .nemo archive")


def checked_members(
    tar: tarfile.TarFile, path: Path, key: str, *, room: int | None = None
) -> Iterator[tarfile.TarInfo]:
    """The members of an archive, in their order. Raises CheckpointError for one that no archive should have.

    `room`: bytes that there are for all of them.
    """
    size, names = path.stat().st_size, set[str]()
    for member in tar:
        name = os.path.normpath(member.name)
        fault = None
        if not (member.isfile() or member.isdir()) or member.issparse():
            fault = "is a link, a device or sparse; archives hold files"
        elif member.name.startswith("/") or ".." in Path(member.name).parts:
            fault = "would leave the archive's folder"
        elif member.offset_data + member.size > size:
            fault = f"claims {member.size} bytes, which the file, truncated or corrupt, has not"
        elif room is not None and member.size > room:
            fault = f"has {member.size} bytes, and the disk of {tempfile.gettempdir()} has room for {room}"
        elif name in names:
            fault = "is there twice"
        if fault is not None:
            raise CheckpointError(f"{named(key, path)}: member {member.name!r} {fault}")
        names.add(name)
        if room is not None:
            room -= member.size
        yield member


def pack(folder: Path, target: Path, *, first: str) -> None:
    """A tar of what is in `folder`, `first` at its beginning: the same bytes whoever packs it, and whenever."""

    def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        member.mode = 0o755 if member.isdir() else 0o644
        return member

    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    megabytes = -(-size // _MB)
    with (
        target.open("wb") as stream,
        Progress("packing", megabytes, show=size >= _LONG, unit="MB") as progress,
    ):
        with tarfile.open(fileobj=_Counted(stream, progress), mode="w") as tar:  # type: ignore[call-overload]
            for name in (first, *sorted(entry.name for entry in folder.iterdir() if entry.name != first)):
                tar.add(folder / name, arcname=name, filter=anonymous)
        progress.advance(megabytes)  # what is left of the last
        stream.flush()
        os.fsync(stream.fileno())


class _Counted:
    """What a tar is written to; `progress` counts its megabytes."""

    def __init__(self, stream: BinaryIO, progress: Progress) -> None:
        self._stream, self._progress, self._bytes = stream, progress, 0
        self.tell = stream.tell

    def write(self, data: bytes) -> int:
        self._bytes += len(data)
        if self._bytes >= _MB:
            self._progress.advance(self._bytes // _MB)
            self._bytes %= _MB
        return self._stream.write(data)
