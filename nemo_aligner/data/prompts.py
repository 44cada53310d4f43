"""The prompts of REINFORCE: JSONL lines of {"text": ...} or {"input": ...}, as token ids."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_aligner.data.blending import Blend, blend, prefix_files
from nemo_aligner.data.jsonl import Row, load_rows
from nemo_aligner.errors import DataError

log = logging.getLogger(__name__)

_FIELDS = ("text", "input")


@dataclass(frozen=True)
class PromptRow:
    """A prompt as text and as what the model sees of it; the other fields of its row, and where that stands."""

    text: str
    tokens: tuple[int, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""


def with_bos(tokens: Sequence[int], bos_id: int | None) -> list[int]:
    """`tokens` with BOS before them, where there is one and the text did not bring it itself."""
    return list(tokens) if bos_id is None or list(tokens[:1]) == [bos_id] else [bos_id, *tokens]


def filled(template: str | None, input_key: str, prompt: str) -> str:
    """The prompt as the model sees it; plain replacement, so braces in the prompt are only text."""
    return prompt if template is None else template.replace(f"{{{input_key}}}", prompt)


def open_prompts(prefix: Any, split: str, key: str) -> Blend | None:
    """The rows of one split of `model.data.data_prefix`, or None where it is not given.

    Raises DataError for a row without a prompt, ConfigError for a prefix of another form.
    """
    names, weights = prefix_files(prefix, split, key)
    if not names:
        return None
    both = 0

    def check(row: Row, path: Path, number: int) -> None:
        nonlocal both
        if prompt_field(row) is None:
            has = ", ".join(map(repr, row)) or "no fields"
            raise DataError(f'no text in field "text" or "input"; the row has {has}', path, number)
        both += all(isinstance(row.get(name), str) for name in _FIELDS)

    files = [load_rows(name, required={}, check=check) for name in names]
    if both:
        log.info("%s: %d rows have both text and input; text is the prompt", key, both)
    return blend(files, weights, key=key)


def prompt_field(row: Row) -> str | None:
    """The field that holds the prompt."""
    return next((name for name in _FIELDS if isinstance(row.get(name), str)), None)


def prompt_of(row: Row) -> str:
    """The text of a row that open_prompts has looked at."""
    name = prompt_field(row)
    assert name is not None
    return str(row[name])


def other_fields(row: Row) -> Row:
    """What a row has besides its prompt."""
    own = prompt_field(row)
    return {name: value for name, value in row.items() if name != own}


def encode_prompts(
    rows: Blend, encode: Callable[[str], Sequence[int]], *, bos_id: int | None, limit: int, key: str
) -> list[PromptRow]:
    """Token ids of every prompt; those of over `limit` tokens, and empty ones, are left out and counted.

    Raises DataError when nothing is left.
    """
    prompts = []
    for index in range(len(rows)):
        row = rows[index]
        text = prompt_of(row)
        tokens = tuple(with_bos(encode(text), bos_id))
        if 0 < len(tokens) <= limit:
            prompts.append(PromptRow(text, tokens, other_fields(row), "{}:{}".format(*rows.where(index))))
    if len(prompts) < len(rows):
        log.warning("%d of %d prompts left out: empty, or over %d tokens", len(rows) - len(prompts), len(rows), limit)
    if not prompts:
        raise DataError(f"{key}: every prompt is empty or has over {limit} tokens")
    return prompts
