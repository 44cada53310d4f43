"""What `generate` is given to answer: texts of the command line, and lines of a file, conversations among them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_aligner.data.conversations import check_turns
from nemo_aligner.data.jsonl import Row, load_rows
from nemo_aligner.data.sources import is_source
from nemo_aligner.errors import DataError
from nemo_aligner.records import TEMPLATE_FIELDS, Turns

INPUT = "input"
_TEXTS = (INPUT, "text")


@dataclass(frozen=True)
class Prompt:
    """A row of {"input": text}, or a conversation with what its chat template reads; `path` and `line`: where it is."""

    row: Row
    path: str | Path = "prompts"
    line: int | None = None


def read_prompts(path: Path) -> list[Prompt]:
    """A prompt of each line: a JSON string, an object with one in "input" or "text", or a conversation.

    Compressed files and the sources of data/sources.py have objects alone. Raises DataError.
    """
    return [Prompt(_prompt_in(value, path, line), path, line) for value, line in _values(path)]


def _values(path: Path) -> Iterator[tuple[Any, int]]:
    if path.suffix in (".gz", ".zst") or is_source(path):
        rows = load_rows(path, required={})
        yield from zip(rows, rows.numbers, strict=True)
        return
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as fault:
        raise DataError(f"cannot be read: {fault}", path) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line), number
        except json.JSONDecodeError as fault:
            raise DataError(f"not valid JSON ({fault.msg} at column {fault.colno})", path, number) from None


def _prompt_in(value: Any, path: Path, line: int) -> Row:
    row = value if isinstance(value, dict) else {INPUT: value}
    text = next((row[name] for name in _TEXTS if isinstance(row.get(name), str)), None)
    if text is not None:
        return {INPUT: text}
    turns = Turns.of(row, None)
    if turns is None:
        raise DataError(
            'neither a text nor an object with one in "input" or "text", or with turns in "messages"', path, line
        )
    check_turns(row, turns, output_key=None, path=path, line=line)
    return {name: row[name] for name in (turns.field, *TEMPLATE_FIELDS) if name in row}
