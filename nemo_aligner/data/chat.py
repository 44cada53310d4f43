"""Conversations as text segments, each known to be the assistant's or not."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nemo_aligner.data.jsonl import Row
from nemo_aligner.data.token_texts import TextTokenizer
from nemo_aligner.errors import ConfigError, DataError

_ROLES = {"user": "user", "human": "user", "prompter": "user", "assistant": "assistant", "gpt": "assistant"}


def messages_of(row: Row, path: str | Path, line: int) -> list[dict[str, str]]:
    """`messages` [{role, content}] as they are, NeMo's {system, conversations: [{from, value}]} brought to that form.

    A turn's `weight` is 1, or 0 where it is not trained on. Raises DataError.
    """
    if isinstance(row.get("messages"), list):
        messages = row["messages"]
    elif isinstance(row.get("conversations"), list):
        turns = [turn if isinstance(turn, dict) else {} for turn in row["conversations"]]
        roles = [str(turn.get("from", "")).lower() for turn in turns]
        messages = [
            {"role": _ROLES.get(role, role), "content": turn.get("value"), "weight": turn.get("weight", 1)}
            for role, turn in zip(roles, turns, strict=True)
        ]
        if row.get("system"):
            messages = [{"role": "system", "content": row["system"]}, *messages]
    else:
        raise DataError("a chat row needs `messages` or `conversations`, a list of turns", path, line)
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or not message.get("role"):
            raise DataError(f"the turn {message!r} lacks a role or a text", path, line)
        if message.get("weight", 1) not in (0, 1):
            raise DataError(f"a turn's weight is 0 or 1, not {message['weight']!r}", path, line)
    return messages


_BEGIN, _END = "\ufdd0", "\ufdd1"
"""Around what `{% generation %}` holds; Unicode gives these two to nobody, so that no text has them."""


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, which templates put around what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012 (as the base class has it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{_BEGIN}{caller()}{_END}"


_FAULTS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""Of what a template does with the messages; it reaches no attribute that begins with _, and changes nothing."""


def _tojson(value: Any, indent: int | None = None, **options: Any) -> str:
    """Jinja's own escapes for HTML and sorts."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


@functools.lru_cache(maxsize=4)
def _compiled(template: str, key: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as fault:
        raise ConfigError(f"not a valid Jinja template: {fault}", key) from None


def check_template(text: str | None, key: str) -> None:
    """Raises ConfigError for what is no Jinja template; `key` is the config key that it comes from."""
    if text is not None:
        _compiled(text, key)


class ChatTemplate:
    """A Jinja template as Hugging Face tokenizers have it, with the tokens that it may write itself.

    `key` is the config key that it comes from, for messages. Raises ConfigError for what is no template.
    """

    def __init__(self, text: str, tokenizer: TextTokenizer, key: str) -> None:
        self._template = _compiled(text, key)
        self._special = {"eos_token": tokenizer.piece(tokenizer.eos_id)}
        if tokenizer.bos_id is not None:
            self._special["bos_token"] = tokenizer.piece(tokenizer.bos_id)

    def _marked(self, messages: list[dict[str, str]], generation_prompt: bool) -> str:
        values = {"messages": messages, "add_generation_prompt": generation_prompt, "tools": None, "documents": None}
        try:
            return self._template.render(**values, **self._special)
        except _FAULTS as fault:
            raise jinja2.TemplateError(str(fault)) from None

    def render(self, messages: list[dict[str, str]], *, generation_prompt: bool) -> str:
        """The conversation as text; with `generation_prompt` up to where the assistant would go on.

        Raises jinja2.TemplateError where the template refuses it.
        """
        return self._marked(messages, generation_prompt).replace(_BEGIN, "").replace(_END, "")

    def segments(self, row: Row, path: str, line: int) -> list[tuple[str, bool]]:
        """(text, is the assistant's) pieces that make up the rendered conversation of a row.

        What the template itself puts into `{% generation %}` is the assistant's. Without any, the conversation before
        each assistant turn is rendered with its generation prompt: what the turn adds to that is what the assistant
        would have to write. Turns of weight 0 are not the assistant's here. Raises DataError.
        """
        messages = messages_of(row, path, line)
        if not any(message["role"] == "assistant" for message in messages):
            raise DataError("the conversation has no assistant turn to train on", path, line)
        try:
            whole = self._marked(messages, generation_prompt=False)
            if _BEGIN not in whole:
                return self._by_turns(messages, path, line)
            return _weighted(_between_marks(whole), messages, path, line)
        except jinja2.TemplateError as fault:
            raise DataError(f"the chat template refuses the conversation: {fault}", path, line) from None

    def _by_turns(self, messages: list[dict[str, str]], path: str, line: int) -> list[tuple[str, bool]]:
        segments: list[tuple[str, bool]] = []
        done = ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:i], generation_prompt=True)
            after = self.render(messages[: i + 1], generation_prompt=False)
            if not (before.startswith(done) and after.startswith(before)):
                raise DataError(
                    "the chat template does not render a conversation as a prefix of its continuation", path, line
                )
            segments += [(before[len(done) :], False), (after[len(before) :], is_target(message))]
            done = after
        return segments


def is_target(message: Mapping[str, Any]) -> bool:
    """Whether an assistant's turn is trained on."""
    return bool(message.get("weight", 1))


def _weighted(
    segments: list[tuple[str, bool]], messages: list[dict[str, str]], path: str, line: int
) -> list[tuple[str, bool]]:
    """Segments without those as targets whose turn has weight 0."""
    wanted = [is_target(message) for message in messages if message["role"] == "assistant"]
    if all(wanted):
        return segments
    if sum(target for _, target in segments) != len(wanted):
        raise DataError(
            "the chat template's generation blocks are not one a turn, so weights have no place", path, line
        )
    left = iter(wanted)
    return [(text, target and next(left)) for text, target in segments]


def _between_marks(text: str) -> list[tuple[str, bool]]:
    segments: list[tuple[str, bool]] = []
    for i, part in enumerate(text.split(_BEGIN)):
        inside, _, outside = part.partition(_END) if i else ("", "", part)
        segments += [(inside, True)] * bool(inside) + [(outside, False)] * bool(outside)
    return segments
