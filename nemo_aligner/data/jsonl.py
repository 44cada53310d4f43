"""JSON Lines in and out: faults named by file and line, files that appear whole or not at all."""

from __future__ import annotations

import functools
import gzip
import json
import math
import os
import re
import shutil
import tempfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from nemo_aligner.errors import DataError
from nemo_aligner.files import write_atomically

Row = dict[str, Any]

Line = str | bytes
"""A line of a file, as the loader has it."""


_DEPTH = 100
"""Lists and objects within one another, at most: what can be read must be writable too, from any place in the code."""

_ARROW_BATCH = 1000

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_line(line: Line, path: str | Path, number: int | None, text_field: str | None = None) -> Row:
    """One line as an object that can be written again; a text alone is that of `text_field`, where there is one.

    Raises DataError with file and line, of what is no line of a file (`number` None) with `path` alone.
    """
    row = _row_without_faults(line)
    return _named_faults(line, path, number, text_field) if row is None else row


@functools.cache
def _decoder() -> Callable[[Line], Any]:
    """Four times as fast as Python's json; it takes less than that (no NaN, no byte order mark) and says less."""
    import msgspec  # here, so that --help does not wait for it

    return msgspec.json.Decoder().decode


def _row_without_faults(line: Line) -> Row | None:
    """The row of a line that is plainly whole; None of one that has to be looked at more closely."""
    try:
        row = _decoder()(line)
    except (ValueError, RecursionError):
        return None
    brackets = line.count("[") + line.count("{") if isinstance(line, str) else line.count(b"[") + line.count(b"{")
    return row if isinstance(row, dict) and brackets <= _DEPTH else None


def _named_faults(line: Line, path: str | Path, number: int | None, text_field: str | None) -> Row:
    """The row of any line. Raises DataError for what is wrong with it."""
    text = line.removeprefix("\ufeff") if isinstance(line, str) else _decoded(line.rstrip(b"\r\n"), path, number)
    try:
        row = json.loads(text)
    except json.JSONDecodeError as fault:
        raise DataError(f"not valid JSON ({fault.msg} at column {fault.colno})", path, number) from None
    except ValueError:  # of a whole number
        raise DataError("a number has more digits than Python reads (4300)", path, number) from None
    except RecursionError:
        raise DataError(f"lists or objects are nested over {_DEPTH} deep", path, number) from None
    if text_field is not None and isinstance(row, str):
        row = {text_field: row}
    if not isinstance(row, dict):
        raise DataError(f'a {type(row).__name__} where an object such as {{"input": ...}} is needed', path, number)
    if text.count("[") + text.count("{") > _DEPTH and _is_deep(row, _DEPTH):
        raise DataError(f"lists or objects are nested over {_DEPTH} deep", path, number)
    if _SURROGATE.search(text):
        _check_whole_characters(row, path, number)
    return row


def _is_deep(value: Any, depth: int) -> bool:
    """Whether lists and objects are nested more than `depth` deep."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return inner is not None and (depth == 0 or any(_is_deep(item, depth - 1) for item in inner))


def _check_whole_characters(row: Row, path: str | Path, number: int | None) -> None:
    """Raises DataError for one half of a pair of \\u escapes, which JSON allows and no text file can hold."""
    for name, value in row.items():
        half = half_character(json.dumps({name: value}, ensure_ascii=False))
        if half is not None:
            raise DataError(f"field {name!r} holds {half}, one half of a character", path, number)


def half_character(text: str) -> str | None:
    """The escape of the first half of a character in `text`, which no tokenizer and no file takes; None: no half."""
    try:
        text.encode()
    except UnicodeEncodeError as fault:
        return f"\\u{ord(text[fault.start]):04x}"
    return None


def check_texts(row: Row, required: Mapping[str, str], path: Path, number: int) -> None:
    """`required` maps each field that must hold a string to the config key that names it. Raises DataError."""
    for field, config_key in required.items():
        if field not in row:
            has = ", ".join(map(repr, row)) or "no fields"
            raise DataError(f"no field {field!r} ({config_key}); the row has {has}", path, number)
        if not isinstance(row[field], str):
            kind = "null" if row[field] is None else type(row[field]).__name__
            raise DataError(f"field {field!r} is {kind}, a string is needed", path, number)


class Rows(Sequence[Row]):
    """The rows of a JSONL file, read when asked for; blank lines do not count.

    `line(i)` gives the line of row i; `numbers[i]` its number, from 1. What is kept of a row is where it stands.
    """

    unit = "rows"

    text_field: str | None = None  # see `parse_line`

    def __init__(self, path: Path, numbers: Sequence[int], line: Callable[[int], Line]) -> None:
        self.path, self.numbers, self._line = path, numbers, line

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return parse_line(self._line(index), self.path, self.numbers[index], self.text_field)


Inspect = Callable[[Line, int], None]
"""Looks at a line of this number. Raises DataError for one that is no row."""


def load_rows(
    path: str | Path,
    *,
    required: Mapping[str, str],
    hf_dataset: bool = False,
    cache_dir: str | None = None,
    check: Callable[[Row, Path, int], object] | None = None,
    text_field: str | None = None,
) -> Rows:
    """Open a JSONL file, plain or compressed (.gz, .zst), or a source of data/sources.py, after checking every line of
    it, in one pass.

    Lines end in LF, CR LF or CR. `hf_dataset` reads through Hugging Face datasets (memory-mapped Arrow, cached in
    `cache_dir`); otherwise lines are found by byte offset. Both give the same rows, with every field as it stands in
    the file; a line that is a text alone is a row of `text_field`, where given. Raises DataError: missing or empty
    file, broken line, missing field, value that is not a string, and what `check` raises of a row, its file and line.
    """
    path = Path(path)

    def inspect(line: Line, number: int) -> None:
        row = parse_line(line, path, number, text_field)
        check_texts(row, required, path, number)
        if check is not None:
            check(row, path, number)

    from nemo_aligner.data.sources import is_source, source_rows

    if is_source(path):
        rows = source_rows(path, cache_dir, inspect)
    else:
        rows = _arrow_rows(path, cache_dir, inspect) if hf_dataset else _offset_rows(path, inspect)
    if not rows:
        raise DataError("the file holds no rows", path)
    rows.text_field = text_field
    return rows


def _check_readable(path: Path) -> None:
    if not path.is_file():
        raise DataError("no such file", path)
    if not os.access(path, os.R_OK):
        raise DataError("no permission to read it", path)


def _offset_rows(path: Path, inspect: Inspect) -> Rows:
    _check_readable(path)
    reader = _plain(path)
    numbers, starts, sizes = array("q"), array("q"), array("q")
    number = position = 0
    for stretch in reader:
        for raw in stretch.splitlines(keepends=True):  # of bytes: LF, CR LF and CR, nothing else
            number += 1
            if raw.strip(b"\xef\xbb\xbf \t\r\n"):
                inspect(raw, number)
                numbers.append(number)
                starts.append(position)
                sizes.append(len(raw))
            position += len(raw)

    def line(index: int) -> bytes:
        reader.seek(starts[index])
        return reader.read(sizes[index])

    return Rows(path, numbers, line)


def _plain(path: Path) -> IO[bytes]:
    """The file for reading at any place; a compressed one as a temporary file.

    Raises DataError for one that is damaged, or for which the temporary folder has no room.
    """
    if path.suffix not in (".gz", ".zst"):
        return path.open("rb")
    try:
        unpacked = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the rows)
        _unpack(path, unpacked)
        unpacked.seek(0)
        return unpacked
    except OSError as fault:
        where = tempfile.tempdir or "the temporary folder, $TMPDIR,"
        raise DataError(f"cannot be unpacked to {where}: {fault.strerror or fault}", path) from None


def _unpack(path: Path, unpacked: IO[bytes]) -> None:
    """Raises DataError for a damaged file."""
    try:
        with path.open("rb") as packed:
            (_unzip if path.suffix == ".gz" else _unpack_zstd)(packed, unpacked)
    except (gzip.BadGzipFile, EOFError, zlib.error) as fault:
        raise DataError(f"cannot be unpacked: {' '.join(str(fault).split())}", path) from None


def _unzip(packed: IO[bytes], unpacked: IO[bytes]) -> None:
    with gzip.open(packed) as stream:
        shutil.copyfileobj(stream, unpacked)


def _unpack_zstd(packed: IO[bytes], unpacked: IO[bytes]) -> None:
    """Of one frame or several, one after the other. Raises EOFError for the last one cut short, and other damage."""
    import zstandard

    frame = None
    try:
        while piece := packed.read(1 << 20):
            while piece:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                unpacked.write(frame.decompress(piece))
                piece = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as fault:
        raise EOFError(str(fault)) from None
    if frame is not None:
        raise EOFError("Compressed file ended before the end of its last frame")


def _decoded(raw: bytes, path: str | Path, number: int | None) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        raise DataError(f"not valid UTF-8 at byte {fault.start}", path, number) from None


def _arrow_rows(path: Path, cache_dir: str | None, inspect: Inspect) -> Rows:
    _check_readable(path)
    if path.suffix == ".zst":  # of one that was cut short, datasets would give what is left
        with open(os.devnull, "wb") as nowhere:
            _unpack(path, nowhere)
    import datasets

    datasets.disable_progress_bars()
    try:
        # lines, not columns: Arrow would give every row the union of all fields, and one type to each
        table = datasets.load_dataset("text", data_files=str(path), split="train", cache_dir=cache_dir)
    except (datasets.exceptions.DatasetGenerationError, UnicodeDecodeError):
        if not _offset_rows(path, inspect):  # names the broken line, where there is one to name
            raise DataError("the file holds no rows", path) from None
        raise DataError("datasets could not read it; try data.hf_dataset=False", path) from None
    numbers = array("q")
    number = 0
    for batch in table.iter(_ARROW_BATCH):
        for text in batch["text"]:
            number += 1
            if text.strip("\ufeff \t\r\n"):
                inspect(text, number)
                numbers.append(number)
    lines = table["text"]
    return Rows(path, numbers, lambda index: lines[numbers[index] - 1])


def dump_row(row: Mapping[str, Any]) -> str:
    """One JSONL line without its end; NaN becomes null, since JSON has no NaN."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(without_nan(row), ensure_ascii=False)


def without_nan(value: Any) -> Any:
    """`value` with None in place of every float that is no number."""
    if isinstance(value, Mapping):
        return {name: without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows, one a line, atomically. Raises OutputError."""
    write_atomically(path, (f"{dump_row(row)}\n" for row in rows))
