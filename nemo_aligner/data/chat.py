"""Conversations as text: up to where the assistant goes on, with an answer, or whole, the assistant's parts known."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nemo_aligner.config.chat import ChatKeys
from nemo_aligner.data.conversations import NO_CHARACTERS, Messages, messages_of, template_values
from nemo_aligner.data.jsonl import Row
from nemo_aligner.data.token_texts import TextTokenizer
from nemo_aligner.errors import ConfigError, DataError


class ChatTokenizer(TextTokenizer, Protocol):
    """The part of engine.interfaces.Tokenizer that decides how conversations are written."""

    chat_template: str | None


_BEGIN, _END, _PROBE = NO_CHARACTERS
"""Around what `{% generation %}` holds, and an answer that no template has a use for."""


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


_UNKNOWN = {
    name: jinja2.StrictUndefined(
        f"it writes {name}, which is not known here; the template has to have the token itself"
    )
    for name in ("pad_token", "unk_token", "sep_token", "cls_token", "mask_token", "additional_special_tokens")
}
"""What transformers gives a template besides BOS and EOS; left out, it would be written as nothing."""


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


def template_text(given: str | None, key: str) -> str | None:
    """What `chat_template=` means: Jinja, or the path of a file of it that ends in .jinja. Raises ConfigError."""
    if given is None or not given.endswith(".jinja"):
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise ConfigError(f"{given} cannot be read: {getattr(fault, 'strerror', None) or fault}", key) from None


def check_template(given: ChatKeys, key: str) -> None:
    """Raises ConfigError for what is no Jinja template, and for values that no template may be given.

    `key` is the config key of the template.
    """
    if (text := template_text(given.chat_template, key)) is not None:
        _compiled(text, key)
    for name, value in sorted((given.chat_template_kwargs or {}).items()):
        if name in _OWN:
            raise ConfigError("every template is given its own; leave it out", f"{key}_kwargs.{name}")
        try:
            with_values("", {name: value})
        except (TypeError, ValueError, jinja2.TemplateError):
            raise ConfigError(
                f"{value!r} is nothing that a chat template has by a name", f"{key}_kwargs.{name}"
            ) from None


_OWN = {"messages", "add_generation_prompt", "bos_token", "eos_token"}
_ALWAYS = ("tools", "documents")
"""Values that every template is given, none where there are none."""


def with_values(template: str, values: Mapping[str, Any]) -> str:
    """The template with `values` at its head, which hold where whoever renders it gives none of that name.

    Any engine reads that. Raises ValueError, TypeError or jinja2.TemplateError for what Jinja cannot have.
    """
    head = "".join(_default(name, value) for name, value in values.items())
    jinja2.Environment().parse(head)
    # the line break is trimmed, and what comes is at the beginning of a line, where blanks before a block are trimmed
    return template if not head or template.startswith(head) else f"{head}\n{template}"


def _default(name: str, value: Any) -> str:
    if not name.isidentifier():
        raise ValueError(name)
    missing = "none" if name in _ALWAYS else "not defined"
    return f"{{% if {name} is {missing} %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}"


def _literal(value: Any) -> str:
    """A value as Jinja has it; in a text, what would end or begin a block is written in escapes."""
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_literal(name)}: {_literal(entry)}' for name, entry in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("%}", "%\\u007d").replace("{%", "\\u007b%")


@dataclass(frozen=True)
class Frame:
    """What the chat template puts around an answer, which stands there as it was drawn.

    `closing` is what the assistant would have to write behind it, such as <|im_end|>; `rest` what it would not.
    """

    prompt: str
    closing: str
    rest: str

    def text(self, answer: str) -> str:
        return f"{self.prompt}{answer}{self.closing}{self.rest}"


class ChatTemplate:
    """A Jinja template as Hugging Face tokenizers have it, with the tokens that it may write itself.

    `key` is the config key that it comes from, for messages; `options` are values for the template, such as
    {enable_thinking: False}, before which those of a row go. Raises ConfigError for what is no template.
    """

    def __init__(self, text: str, tokenizer: TextTokenizer, key: str, options: Mapping[str, Any] | None = None) -> None:
        self._template = _compiled(text, key)
        self._options = dict(options or {})
        self._special = {"eos_token": tokenizer.piece(tokenizer.eos_id)}
        if tokenizer.bos_id is not None:
            self._special["bos_token"] = tokenizer.piece(tokenizer.bos_id)

    @classmethod
    def of(cls, tokenizer: ChatTokenizer, given: ChatKeys, key: str) -> ChatTemplate | None:
        """The template given under `key`, else the tokenizer's own; None where there is neither."""
        text = template_text(given.chat_template, key) or tokenizer.chat_template
        return None if text is None else cls(text, tokenizer, key, given.chat_template_kwargs)

    def _marked(self, messages: Messages, generation_prompt: bool, values: Mapping[str, Any] | None = None) -> str:
        own = {"messages": messages, "add_generation_prompt": generation_prompt, **self._special}
        given = {"tools": None, "documents": None, **_UNKNOWN, **self._options, **(values or {}), **own}
        try:
            return self._template.render(given)
        except _FAULTS as fault:
            raise jinja2.TemplateError(str(fault)) from None

    def render(self, messages: Messages, *, generation_prompt: bool, values: Mapping[str, Any] | None = None) -> str:
        """The conversation as text; with `generation_prompt` up to where the assistant would go on.

        `values` are more for the template. Raises jinja2.TemplateError where it refuses the conversation.
        """
        return self._marked(messages, generation_prompt, values).replace(_BEGIN, "").replace(_END, "")

    def prompt(self, row: Row, path: str | Path, line: int | None) -> str:
        """The conversation of a row up to where the assistant goes on. Raises DataError."""
        messages, values = messages_of(row, path, line), template_values(row, path, line)
        text = self._rendered(messages, values, path, line, generation_prompt=True)
        for message in messages:
            if message["role"] in ("system", "user") and message["content"].strip() not in text:
                raise DataError(
                    f"the chat template leaves out the {message['role']} turn {message['content'][:60]!r}", path, line
                )
        return text

    def whole(self, row: Row, path: str | Path, line: int | None) -> str:
        """The conversation of a row with all its turns. Raises DataError."""
        return self._rendered(messages_of(row, path, line), template_values(row, path, line), path, line)

    def frame(self, row: Row, path: str | Path, line: int | None) -> Frame:
        """What stands around an answer to the conversation of a row. Raises DataError."""
        messages = [*messages_of(row, path, line), {"role": "assistant", "content": _PROBE}]
        values = template_values(row, path, line)
        behind = self._rendered(messages, values, path, line, marks=True).rpartition(_PROBE)
        if not behind[1]:
            raise DataError("the chat template leaves out what the assistant answers", path, line)
        closing, _, rest = behind[2].partition(_END)
        return Frame(self.prompt(row, path, line), closing, rest)

    def _rendered(
        self, messages: Messages, values: Mapping[str, Any], path: str | Path, line: int | None, *,
        generation_prompt: bool = False, marks: bool = False,
    ) -> str:  # fmt: skip
        try:
            if marks:
                return self._marked(messages, generation_prompt, values)
            return self.render(messages, generation_prompt=generation_prompt, values=values)
        except jinja2.TemplateError as fault:
            raise DataError(f"the chat template refuses the conversation: {fault}", path, line) from None

    def segments(self, row: Row, path: str | Path, line: int) -> list[tuple[str, bool]]:
        """(text, is the assistant's) pieces that make up the rendered conversation of a row.

        What the template itself puts into `{% generation %}` is the assistant's. Without any, the conversation before
        each assistant turn is rendered with its generation prompt: what the turn adds to that is what the assistant
        would have to write. Turns of weight 0 are not the assistant's here. Raises DataError.
        """
        messages, values = messages_of(row, path, line), template_values(row, path, line)
        if not any(message["role"] == "assistant" for message in messages):
            raise DataError("the conversation has no assistant turn to train on", path, line)
        try:
            whole = self._marked(messages, generation_prompt=False, values=values)
            if _BEGIN not in whole:
                return self._by_turns(messages, values, path, line)
            return _weighted(_between_marks(whole), messages, path, line)
        except jinja2.TemplateError as fault:
            raise DataError(f"the chat template refuses the conversation: {fault}", path, line) from None

    def _by_turns(
        self, messages: Messages, values: Mapping[str, Any], path: str | Path, line: int
    ) -> list[tuple[str, bool]]:
        segments: list[tuple[str, bool]] = []
        done = ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:i], generation_prompt=True, values=values)
            after = self.render(messages[: i + 1], generation_prompt=False, values=values)
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
    segments: list[tuple[str, bool]], messages: Messages, path: str | Path, line: int
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
