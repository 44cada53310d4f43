"""Rows that hold a conversation: its turns in one form, and what else its chat template is given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_aligner.data.jsonl import Row
from nemo_aligner.errors import DataError
from nemo_aligner.records import TEMPLATE_FIELDS, Turns

Messages = list[dict[str, Any]]
"""[{role, content}, ...], as chat templates take them."""

NO_CHARACTERS = ("\ufdd0", "\ufdd1", "\ufdd2")
"""Unicode gives these to nobody; they mark places in what a template renders, so that no turn may have them."""

_ROLES = {"user": "user", "human": "user", "prompter": "user", "assistant": "assistant", "gpt": "assistant"}
_SYSTEM, _TOOLS, _VALUES = TEMPLATE_FIELDS


def messages_of(row: Row, path: str | Path, line: int | None) -> Messages:
    """`messages` or `prompt` [{role, content}] as they are, NeMo's {system, conversations: [{from, value}]} likewise.

    A turn's `weight` is 1, or 0 where it is not trained on. Raises DataError.
    """
    turns = Turns.of(row, None)
    if turns is None:
        raise DataError("a chat row needs `messages` or `conversations`, a list of turns", path, line)
    messages = list(turns.given)
    if turns.field == "conversations":
        messages = [_from_nemo(turn if isinstance(turn, dict) else {}) for turn in messages]
        if row.get(_SYSTEM):
            messages = [{"role": "system", "content": row[_SYSTEM]}, *messages]
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or not message.get("role"):
            raise DataError(f"the turn {message!r} lacks a role or a text", path, line)
        if found := set(NO_CHARACTERS).intersection(message["content"]):
            raise DataError(f"a turn holds U+{ord(min(found)):04X}, which is no character", path, line)
        if message.get("weight", 1) not in (0, 1):
            raise DataError(f"a turn's weight is 0 or 1, not {message['weight']!r}", path, line)
    return messages


def _from_nemo(turn: Mapping[str, Any]) -> dict[str, Any]:
    role = str(turn.get("from", "")).lower()
    return {"role": _ROLES.get(role, role), "content": turn.get("value"), "weight": turn.get("weight", 1)}


def template_values(row: Row, path: str | Path, line: int | None) -> dict[str, Any]:
    """What a row gives its chat template besides the turns: `tools`, and `chat_template_kwargs`. Raises DataError."""
    values = row.get(_VALUES) or {}
    if not isinstance(values, dict):
        raise DataError(f"field {_VALUES!r} is no object of values for the chat template", path, line)
    tools = row.get(_TOOLS) or None  # of Arrow, an empty list
    if not isinstance(tools, list | None):
        raise DataError(f"field {_TOOLS!r} is no list of tools for the chat template", path, line)
    return {**values, **({} if tools is None else {_TOOLS: tools})}


def plain_form(row: Row, path: str) -> Row:
    """The conversation of a row as `messages`, with what its template is given, and nothing else. Raises DataError."""
    values = template_values(row, path, None)
    tools = {_TOOLS: values.pop(_TOOLS)} if _TOOLS in values else {}
    return {"messages": messages_of(row, path, None), **tools, **({_VALUES: values} if values else {})}


def check_conversation(row: Row, path: str | Path, line: int | None) -> None:
    """Raises DataError for a row that no chat template could be given."""
    messages_of(row, path, line)
    template_values(row, path, line)


def check_turns(row: Row, turns: Turns, *, output_key: str | None, path: str | Path, line: int | None) -> None:
    """A conversation to be answered, or with its answer where `output_key` names a field for that. Raises DataError."""
    check_conversation(row, path, line)
    if not turns.given:
        raise DataError(f"{turns.field} is empty, there is nothing to go on from", path, line)
    if output_key is None and turns.answered:
        raise DataError("the conversation ends with the assistant's turn: there is nothing to answer", path, line)
    if output_key is not None and turns.answered and output_key in row:
        raise DataError(
            f"the conversation ends with the assistant's turn, and {output_key!r} holds another answer", path, line
        )
