"""Conversations as text segments, each known to be the assistant's or not."""

from __future__ import annotations

import functools
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nemo_aligner.data.jsonl import Row
from nemo_aligner.errors import ConfigError, DataError

_ROLES = {"user": "user", "human": "user", "prompter": "user", "assistant": "assistant", "gpt": "assistant"}


def messages_of(row: Row, path: str, line: int) -> list[dict[str, str]]:
    """`messages` [{role, content}] as they are, NeMo's {system, conversations: [{from, value}]} brought to that form.

    Raises DataError.
    """
    if isinstance(row.get("messages"), list):
        messages = row["messages"]
    elif isinstance(row.get("conversations"), list):
        turns = [turn if isinstance(turn, dict) else {} for turn in row["conversations"]]
        roles = [str(turn.get("from", "")).lower() for turn in turns]
        messages = [
            {"role": _ROLES.get(role, role), "content": turn.get("value")}
            for role, turn in zip(roles, turns, strict=True)
        ]
        if row.get("system"):
            messages = [{"role": "system", "content": row["system"]}, *messages]
    else:
        raise DataError("a chat row needs `messages` or `conversations`, a list of turns", path, line)
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or not message.get("role"):
            raise DataError(f"the turn {message!r} lacks a role or a text", path, line)
    return messages


@functools.lru_cache(maxsize=4)
def _compiled(template: str) -> jinja2.Template:
    try:
        return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)
    except jinja2.TemplateError as fault:
        raise ConfigError(f"not a valid Jinja template: {fault}", "model.data.chat_template") from None


def render(template: str, messages: list[dict[str, str]], *, generation_prompt: bool) -> str:
    """The conversation as text; with `generation_prompt` up to where the assistant would go on."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    values: dict[str, Any] = {"messages": messages, "add_generation_prompt": generation_prompt}
    return _compiled(template).render(**values, raise_exception=refuse, bos_token="", eos_token="")


def chat_segments(row: Row, template: str, path: str, line: int) -> list[tuple[str, bool]]:
    """(text, is the assistant's) pieces that make up the rendered conversation.

    Before each assistant turn the conversation so far is rendered with its generation prompt: what the turn adds to
    that is what the assistant would have to write.
    """
    messages = messages_of(row, path, line)
    segments: list[tuple[str, bool]] = []
    done = ""
    try:
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = render(template, messages[:i], generation_prompt=True)
            after = render(template, messages[: i + 1], generation_prompt=False)
            if not (before.startswith(done) and after.startswith(before)):
                raise DataError(
                    "the chat template does not render a conversation as a prefix of its continuation", path, line
                )
            segments += [(before[len(done) :], False), (after[len(before) :], True)]
            done = after
    except jinja2.TemplateError as fault:
        raise DataError(f"the chat template refuses the conversation: {fault}", path, line) from None
    if not segments:
        raise DataError("the conversation has no assistant turn to train on", path, line)
    return segments
