"""The prompts of REINFORCE: JSONL lines of {"text": ...}, {"input": ...} or conversations, as token ids."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_aligner.data.blending import Blend, blend, prefix_files
from nemo_aligner.data.chat import ChatTemplate
from nemo_aligner.data.conversations import check_turns
from nemo_aligner.data.jsonl import Row, load_rows
from nemo_aligner.data.row_texts import RowTexts
from nemo_aligner.data.token_texts import TextTokenizer
from nemo_aligner.errors import ConfigError, DataError
from nemo_aligner.records import Turns

log = logging.getLogger(__name__)

_FIELDS = ("text", "input")


@dataclass(frozen=True)
class PromptRow:
    """A prompt as text and as what the model sees of it; the other fields of its row, and where that stands.

    Of a conversation `text` is the turn that is answered, and `turns` are all of them, also among the `fields`.
    """

    text: str
    tokens: tuple[int, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""
    turns: Turns | None = None

    @property
    def shown(self) -> Row:
        """The prompt as rows for people have it."""
        return {"input": self.text} if self.turns is None else {self.turns.field: self.turns.given}


def bos_for(tokenizer: TextTokenizer, asked: bool, key: str) -> int | None:
    """BOS where it is `asked` for, which `key` says. Raises ConfigError where the tokenizer has none."""
    if asked and tokenizer.bos_id is None:
        raise ConfigError("the model's tokenizer has no BOS token", key)
    return tokenizer.bos_id if asked else None


def with_bos(tokens: Sequence[int], bos_id: int | None) -> list[int]:
    """`tokens` with BOS before them, where there is one and the text did not bring it itself."""
    return list(tokens) if bos_id is None or list(tokens[:1]) == [bos_id] else [bos_id, *tokens]


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
        check_prompt(row, path, number)
        both += all(isinstance(row.get(name), str) for name in _FIELDS)

    files = [load_rows(name, required={}, check=check) for name in names]
    if both:
        log.info("%s: %d rows have both text and input; text is the prompt", key, both)
    return blend(files, weights, key=key)


def check_prompt(row: Row, path: Path, number: int) -> None:
    """Raises DataError, with file and line, for a row without a text or a conversation to be answered."""
    turns = turns_of(row)
    if turns is not None:
        check_turns(row, turns, output_key=None, path=path, line=number)
    elif prompt_field(row) is None:
        has = ", ".join(map(repr, row)) or "no fields"
        raise DataError(f'no text in field "text" or "input"; the row has {has}', path, number)


def prompt_field(row: Row) -> str | None:
    """The field that holds the prompt, where that is a text."""
    return next((name for name in _FIELDS if isinstance(row.get(name), str)), None)


def turns_of(row: Row) -> Turns | None:
    """The conversation of a row without a text."""
    return Turns.of(row, prompt_field(row))


def other_fields(row: Row) -> Row:
    """What a row has besides its prompt; a conversation stays."""
    own = prompt_field(row)
    return {name: value for name, value in row.items() if name != own}


def encode_prompts(
    rows: Blend,
    encode: Callable[[str], Sequence[int]],
    *,
    bos_id: int | None,
    limit: int,
    key: str,
    chat: ChatTemplate | None = None,
) -> list[PromptRow]:
    """Token ids of every prompt; those of over `limit` tokens, and empty ones, are left out and counted.

    Raises DataError when nothing is left, and for conversations without a chat template.
    """
    prompts = []
    for index in range(len(rows)):
        row, (path, line) = rows[index], rows.where(index)
        name, turns = prompt_field(row), turns_of(row)
        text = RowTexts(None, name or "", chat, "model.data.chat_template").prompt(row, path, line)
        tokens = tuple(with_bos(encode(text), bos_id))
        if 0 < len(tokens) <= limit:
            shown = text if turns is None else turns.text
            prompts.append(PromptRow(shown, tokens, other_fields(row), f"{path}:{line}", turns))
    if len(prompts) < len(rows):
        log.warning("%d of %d prompts left out: empty, or over %d tokens", len(rows) - len(prompts), len(rows), limit)
    if not prompts:
        raise DataError(f"{key}: every prompt is empty or has over {limit} tokens")
    return prompts
