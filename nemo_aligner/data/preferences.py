"""Preference sets as the Hub has them: a row with `chosen` and `rejected`, and perhaps the `prompt` of both.

{"chosen": "...", "rejected": "..."}                          whole texts, prompt and response together
{"prompt": "...", "chosen": "...", "rejected": "..."}         a prompt, and responses that go on from it
{"chosen": [{role, content}, ...], "rejected": [...]}         whole conversations; a `prompt` beside them says no more
{"prompt": [...], "chosen": [...], "rejected": [...]}         turns, and answers that go on from them
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_aligner.data.conversations import check_conversation
from nemo_aligner.data.jsonl import Row, Rows, check_texts, load_rows
from nemo_aligner.data.row_texts import RowTexts
from nemo_aligner.data.supervised import Pairs
from nemo_aligner.errors import DataError
from nemo_aligner.records import TEMPLATE_FIELDS, Turns

SIDES = ("chosen", "rejected")
_PROMPT, _TEXT, _ANSWER = "prompt", "text", "answer"


@dataclass(frozen=True)
class Side:
    """One of two texts: a row with `text`, with `prompt` and `answer`, or with `messages`; and where it stands."""

    row: Row
    path: Path
    line: int

    def text(self, texts: RowTexts) -> str:
        """As a reward model reads it. Raises DataError."""
        return str(self.row[_TEXT]) if _TEXT in self.row else texts.text(self.row, _ANSWER, self.path, self.line)


class Preferences(Sequence[tuple[Side, Side]]):
    """Rows of a preference set as (chosen, rejected), made when asked for.

    `chat`: texts are the turns of a user and an assistant.
    """

    unit = "pairs"

    def __init__(self, rows: Rows, *, chat: bool) -> None:
        self.path, self.numbers, self._rows, self._chat = rows.path, rows.numbers, rows, chat

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return sides_of(self._rows[index], self.path, self.numbers[index], chat=self._chat)


def open_pairs(path: str | Path, *, key: str, chat: bool) -> Preferences | Pairs:
    """The pairs of a file: a preference set where its first row is of one, else a `text` a line. Raises DataError.

    `key` is the config key that names the file.
    """
    of_set: bool | None = None

    def check(row: Row, path: Path, number: int) -> None:
        nonlocal of_set
        if of_set is None:
            of_set = any(name in row for name in SIDES)
        if of_set:
            sides_of(row, path, number, chat=chat)
        else:
            check_texts(row, {_TEXT: key}, path, number)

    rows = load_rows(path, required={}, check=check)
    return Preferences(rows, chat=chat) if of_set else Pairs(rows)


def side_text(side: Row | Side, texts: RowTexts) -> str:
    """A side of a pair of `open_pairs`, as a reward model reads it. Raises DataError."""
    return side.text(texts) if isinstance(side, Side) else str(side[_TEXT])


def sides_of(row: Row, path: Path, line: int, *, chat: bool) -> tuple[Side, Side]:
    """The two sides of a row. Raises DataError."""
    for name in SIDES:
        if name not in row:
            raise DataError(f"no field {name!r}; the row has {', '.join(map(repr, row))}", path, line)
        if not isinstance(row[name], str | list):
            raise DataError(f"field {name!r} is neither a text nor a list of turns", path, line)
    if not isinstance(row.get(_PROMPT), str | list | None):
        raise DataError(f"field {_PROMPT!r} is neither a text nor a list of turns", path, line)
    if type(row[SIDES[0]]) is not type(row[SIDES[1]]):
        raise DataError("of chosen and rejected one is a text, the other a list of turns", path, line)
    chosen, rejected = (_side(row, name, path, line, chat=chat) for name in SIDES)
    return chosen, rejected


def _side(row: Row, name: str, path: Path, line: int, *, chat: bool) -> Side:
    prompt, answer = row.get(_PROMPT), row[name]
    if isinstance(answer, str) and not chat and not isinstance(prompt, list):
        return Side({_TEXT: answer} if prompt is None else {_PROMPT: prompt, _ANSWER: answer}, path, line)
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if isinstance(answer, str):
        if before is None:
            raise DataError(
                f"{name!r} is a text, and there is no {_PROMPT!r} that it answers; model.data.chat=False takes it as "
                "it is", path, line,
            )  # fmt: skip
        messages = [*before, {"role": "assistant", "content": answer}]
    else:
        messages = answer if before is None or _is_whole(answer, prompt) else [*before, *answer]
    side = {"messages": messages, **{field: row[field] for field in TEMPLATE_FIELDS if field in row}}
    check_conversation(side, path, line)
    if not Turns("messages", messages).answered:
        raise DataError(f"{name!r} does not end with the assistant's turn", path, line)
    if all(turn["role"] == "assistant" for turn in messages):
        raise DataError(f"{name!r} is an answer alone, and the row has no {_PROMPT!r}", path, line)
    return Side(side, path, line)


def _is_whole(answer: list[Any], prompt: Any) -> bool:
    """Whether turns hold their prompt too."""
    if isinstance(prompt, list):
        return answer[: len(prompt)] == prompt
    return bool(answer) and not (isinstance(answer[0], dict) and answer[0].get("role") == "assistant")
