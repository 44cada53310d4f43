"""What `generate` is given to answer: texts of the command line, and lines of a file, conversations among them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nemo_aligner.data.jsonl import Row, load_rows
from nemo_aligner.data.prompts import check_prompt, prompt_field, turns_of
from nemo_aligner.records import TEMPLATE_FIELDS

INPUT = "input"


@dataclass(frozen=True)
class Prompt:
    """A row of {"input": text}, or a conversation with what its chat template reads; `path` and `line`: where it is."""

    row: Row
    path: str | Path = "prompts"
    line: int | None = None


def read_prompts(path: Path) -> list[Prompt]:
    """A prompt of each line: a JSON string, or what REINFORCE has for one. Raises DataError."""
    rows = load_rows(path, required={}, check=check_prompt, text_field=INPUT)
    return [Prompt(_prompt_in(row), path, line) for row, line in zip(rows, rows.numbers, strict=True)]


def _prompt_in(row: Row) -> Row:
    """Of a row its prompt alone, with what a chat template reads."""
    turns = turns_of(row)
    if turns is None:
        return {INPUT: row[prompt_field(row) or INPUT]}
    return {name: row[name] for name in (turns.field, *TEMPLATE_FIELDS) if name in row}
