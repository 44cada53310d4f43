"""Resumable output: rows reach the disk as they are made, and become one ordered file at the end.

    <output_file>_temp/fingerprint.json    what the rows were made with; another run may not add to them
    <output_file>_temp/rank_<r>.json       JSON lines {"index": 17, "row": {...}}, appended by data-parallel rank r

A row and its index are one line, so no kill can part them: a torn last line is cut off when the run goes on, and the
places taken are read back from all files, whatever the number of ranks that wrote them. Rows stay on the disk: what is
in memory is a byte for each of them, and 12 while they are merged.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nemo_aligner.data.jsonl import Row, dump_row, parse_line
from nemo_aligner.errors import DataError, OutputError
from nemo_aligner.files import write_atomically, writing
from nemo_aligner.ranks import together

log = logging.getLogger(__name__)

FINGERPRINT = "fingerprint.json"

_PAGE = 4096


class _Cluster(Protocol):
    """The part of engine.interfaces.Cluster that a journal needs."""

    dp_rank: int

    @property
    def is_main(self) -> bool: ...

    @property
    def speaks_for_replica(self) -> bool: ...

    def barrier(self) -> None: ...

    def gather_ranks(self, value: Any) -> list[Any]: ...


def refuse_other_run(output_file: str | Path, fingerprint: Callable[[], Mapping[str, Any]], cluster: _Cluster) -> None:
    """Raises OutputError on every rank where a journal is there and holds the rows of another run. Collective.

    For the time before a model is loaded; nothing is written.
    """
    folder = _folder(output_file)
    with together(cluster):
        if cluster.is_main and (folder / FINGERPRINT).exists():
            _same_run(folder, fingerprint())


class Indices(Set[int]):
    """Indices of rows, a byte for each where they stand close together, as they do in the end."""

    def __init__(self) -> None:
        self._pages: dict[int, bytearray] = {}
        self._count = 0

    def add(self, index: int) -> bool:
        """Whether it is new."""
        number, place = divmod(index, _PAGE)
        page = self._pages.get(number)
        if page is None:
            page = self._pages[number] = bytearray(_PAGE)
        new = not page[place]
        page[place] = 1
        self._count += new
        return new

    def __contains__(self, index: object) -> bool:
        if not isinstance(index, int):
            return False
        page = self._pages.get(index // _PAGE)
        return page is not None and bool(page[index % _PAGE])

    def __iter__(self) -> Iterator[int]:
        for number, page in sorted(self._pages.items()):
            yield from (number * _PAGE + place for place, there in enumerate(page) if there)

    def __len__(self) -> int:
        return self._count


class Journal:
    """Rows of one run, each with its place (`index`) in the final file.

    Raises OutputError when the folder cannot be written or holds the rows of another run.
    """

    def __init__(self, output_file: str | Path, fingerprint: Mapping[str, Any], cluster: _Cluster) -> None:
        self.folder = _folder(output_file)
        self.made_with, self._cluster = fingerprint, cluster
        self._own = self.folder / f"rank_{cluster.dp_rank}.json"
        self._buffer: list[str] = []
        with together(cluster):
            if cluster.is_main:
                self._prepare(fingerprint)
        self.done = Indices()
        """Indices whose rows are on disk."""
        for index, _, _ in _entries(self.folder):
            self.done.add(index)

    def _prepare(self, fingerprint: Mapping[str, Any]) -> None:
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            begun = _same_run(self.folder, fingerprint)
            for file in _files(self.folder):
                _cut_torn_line(file)
            if not begun:
                write_atomically(self.folder / FINGERPRINT, [json.dumps(fingerprint, indent=1)])

    def add(self, index: int, row: Row) -> None:
        """Keep a row until the next flush; only the rank that speaks for its replica writes."""
        if self._cluster.speaks_for_replica:
            self._buffer.append(f'{{"index": {index}, "row": {dump_row(row)}}}\n')

    def flush(self) -> None:
        """Make all rows added so far durable."""
        if not self._buffer:
            return
        with writing(self._own), self._own.open("ab") as stream:
            stream.write("".join(self._buffer).encode())
            stream.flush()
            os.fsync(stream.fileno())
        self._buffer.clear()

    def merged(self, count: int) -> MergedRows:
        """The rows of all `count` indices. Raises OutputError where some are not there any more."""
        return MergedRows(self.folder, count)


class MergedRows(Sequence[Row]):
    """Rows of all files of a journal by their indices, read when asked for."""

    def __init__(self, folder: Path, count: int) -> None:
        files = _files(folder)
        numbers = {path: number for number, path in enumerate(files)}
        self._file, self._offset = np.full(count, -1, dtype=np.int32), np.empty(count, dtype=np.int64)
        for index, path, offset in _entries(folder):
            if index >= count:
                raise OutputError(f"{path}: row {index} of {count} at byte {offset}: damaged; remove that line")
            self._file[index], self._offset[index] = numbers[path], offset
        gone = int((self._file < 0).sum())
        if gone:
            raise OutputError(
                f"{folder}: {gone} of {count} rows are not there any more, somebody removed them during the run; "
                "run the same command again to make them"
            )
        self._streams = [path.open("rb") for path in files]  # as long as somebody may ask

    def __len__(self) -> int:
        return len(self._file)

    def __getitem__(self, index: Any) -> Any:
        stream = self._streams[self._file[index]]
        stream.seek(self._offset[index])
        return json.loads(stream.readline())["row"]


def check_journal(folder: Path) -> tuple[int, bool]:
    """How many rows a journal has, and whether a kill cut one off. Raises OutputError for what damages it otherwise."""
    _fingerprint(folder)
    seen = Indices()
    for index, path, offset in _entries(folder, until_torn=True):
        if not seen.add(index):
            raise OutputError(f"{path}: row {index} is there twice; its second line begins at byte {offset}")
    return len(seen), any(_is_torn(path) for path in _files(folder))


def _is_torn(path: Path) -> bool:
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 1))
        return stream.read() not in (b"", b"\n")


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("rank_*.json"))


def _entries(folder: Path, *, until_torn: bool = False) -> Iterator[tuple[int, Path, int]]:
    """(index, file, byte offset) of every row on disk; with `until_torn` without a last line that has no end."""
    for path in _files(folder):
        offset = 0
        with path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if until_torn and not line.endswith(b"\n"):
                    break
                try:
                    index = parse_line(line, path, number)["index"]
                except (DataError, KeyError):
                    index = None
                if not isinstance(index, int) or index < 0:
                    raise OutputError(f"{path}:{number}: damaged; remove that line to make its row again")
                yield index, path, offset
                offset += len(line)


def _folder(output_file: str | Path) -> Path:
    return Path(f"{output_file}_temp")


def _same_run(folder: Path, fingerprint: Mapping[str, Any]) -> bool:
    """Whether `folder` has rows made with `fingerprint`; False where it has none. Raises OutputError for others."""
    found = _fingerprint(folder)
    if found is None:
        return False
    wanted = json.loads(json.dumps(fingerprint))
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) != found.get(key):
            raise OutputError(
                f"{folder} holds progress of another run: {key} was {found.get(key)!r}, now "
                f"{wanted.get(key)!r}; remove that folder, or choose another output_file"
            )
    return True


def _fingerprint(folder: Path) -> dict[str, Any] | None:
    """What the rows in `folder` were made with; None where it has none. Raises OutputError for a damaged one."""
    path = folder / FINGERPRINT
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except ValueError as fault:
        raise OutputError(f"{path}: damaged ({fault}); remove {folder} to start over") from fault


def _cut_torn_line(path: Path) -> None:
    """Remove what a kill left of a line behind the last line end."""
    content_end = path.stat().st_size
    with path.open("rb+") as stream:
        keep = content_end
        while keep > 0:
            start = max(0, keep - 65536)
            stream.seek(start)
            newline = stream.read(keep - start).rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
            keep = start
        if keep < content_end:
            log.info("%s: cut off an unfinished line of %d bytes", path, content_end - keep)
            stream.truncate(keep)
            stream.flush()
            os.fsync(stream.fileno())
