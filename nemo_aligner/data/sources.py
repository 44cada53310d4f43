"""Rows that are no JSONL file: Parquet, folders, and data sets of the Hugging Face Hub, through `datasets`.

    rows.parquet                 a Parquet file
    folder                       its Parquet or JSONL files, or what `save_to_disk` wrote; the split train
    hf:NAME[:SPLIT]              a data set of the Hub, or a folder of that name; the split train, if none is named
    hf:NAME:CONFIGURATION:SPLIT  one of several that a data set has, as in hf:openai/gsm8k:main:test

Rows are those of JSONL: a field without a value is absent, as Arrow gives every row the fields of all; times are texts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from nemo_aligner.checksums import file_sum
from nemo_aligner.data.jsonl import Inspect, Rows
from nemo_aligner.errors import DataError

PREFIX, _TRAIN = "hf:", "train"
_FILES = ("*.parquet", "*.jsonl", "*.jsonl.gz", "*.jsonl.zst")
_SAVED = ("state.json", "dataset_dict.json")
"""Of which `save_to_disk` writes one."""


def is_source(path: str | Path) -> bool:
    """Whether `path` is read here, and not as a JSONL file."""
    return str(path).startswith(PREFIX) or Path(path).suffix == ".parquet" or Path(path).is_dir()


def files_read(path: str | Path) -> list[Path]:
    """The files here that rows of `path` come from: it alone, or those of a folder. Raises DataError."""
    own = Path(_parts(str(path))[0] if str(path).startswith(PREFIX) else path)
    return [own, *(file for pattern in _FILES for file in own.rglob(pattern))] if own.is_dir() else [own]


def source_rows(path: str | Path, cache_dir: str | None, inspect: Inspect) -> Rows:
    """The rows of a source, looked at one by one. Raises DataError, with the number of the row where one is wrong."""
    table, name = _opened(str(path), cache_dir), Path(path)
    line = _line_of(table, name)
    for index in range(len(table)):
        inspect(line(index), index + 1)
    return Rows(name, range(1, len(table) + 1), line)


def source_sum(path: str | Path, cache_dir: str | None = None) -> str:
    """sha256 of a JSONL file, or of the rows of a source as JSONL."""
    if not is_source(path) or Path(path).is_file():
        return file_sum(path)
    table = _opened(str(path), cache_dir)
    line, found = _line_of(table, Path(path)), hashlib.sha256()
    for index in range(len(table)):
        found.update(f"{line(index)}\n".encode())
    return found.hexdigest()


def _opened(path: str, cache_dir: str | None) -> Any:
    import datasets

    datasets.disable_progress_bars()
    said_before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong is said once, below
    try:
        return _table(path, cache_dir)
    except DataError:
        raise
    except Exception as fault:  # of its many kinds, from the network to Arrow
        cause = fault.__cause__ if isinstance(fault, datasets.exceptions.DatasetGenerationError) else None
        said = " ".join(str(cause or fault).split())
        raise DataError(f"datasets cannot read it: {said[:300]}", path) from None
    finally:
        datasets.logging.set_verbosity(said_before)


def _table(path: str, cache_dir: str | None) -> Any:
    import datasets

    if not path.startswith(PREFIX) and Path(path).suffix == ".parquet":
        if not Path(path).is_file():
            raise DataError("no such file", path)
        return datasets.load_dataset("parquet", data_files=path, split=_TRAIN, cache_dir=cache_dir)
    name, configuration, split = _parts(path) if path.startswith(PREFIX) else (path, None, _TRAIN)
    if any((Path(name) / file).is_file() for file in _SAVED):
        saved = datasets.load_from_disk(name)
        if isinstance(saved, datasets.Dataset):
            return saved
        if split not in saved:
            raise DataError(f"there is no split {split!r}, but {', '.join(saved)}", path)
        return saved[split]
    if Path(name).is_dir():
        if not any(next(Path(name).rglob(files), None) for files in _FILES):
            raise DataError("a folder without Parquet or JSONL files", path)
        name = str(Path(name).resolve())  # or a folder called `text` would be a reader of datasets' own
    elif "/" not in name:
        raise DataError("no such folder; a data set of the Hub is called organisation/name", path)
    return datasets.load_dataset(name, configuration, split=split, cache_dir=cache_dir)


def _parts(path: str) -> tuple[str, str | None, str]:
    """Name, configuration and split. Raises DataError."""
    parts = path.removeprefix(PREFIX).split(":")
    if not all(parts) or len(parts) > 3:
        raise DataError("neither hf:NAME, hf:NAME:SPLIT nor hf:NAME:CONFIGURATION:SPLIT", path)
    return parts[0], parts[1] if len(parts) == 3 else None, parts[-1] if len(parts) > 1 else _TRAIN


def _line_of(table: Any, path: Path) -> Callable[[int], str]:
    """Row → its line of JSONL."""

    def line(index: int) -> str:
        row = table[index]
        try:
            return json.dumps(_without_nulls(row), ensure_ascii=False, default=_as_text)
        except TypeError:
            names = ", ".join(sorted(name for name, value in row.items() if not _is_json(value)))
            raise DataError(
                f"{names}: no text, number, list or object; take that column away", path, index + 1
            ) from None

    return line


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _as_text(value: Any) -> str:
    if isinstance(value, date | time | timedelta | Decimal):
        return str(value)
    raise TypeError


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, default=_as_text)
    except TypeError:
        return False
    return True
