"""What one JSONL line means at each point of the pipeline.

    Prompt        {"input": "The film was"}                   or {"messages": [{"role": "user", "content": ...}]}
    Sample        {"input": "The film was", "output": " a delight."}
    ScoredSample  {"input": "The film was", "output": " a delight.", "reward": 1.25}
    Preference    two adjacent lines {"text": "... chosen"} and {"text": "... rejected"}

A conversation stays under the name that its row has for it, and `output` is the turn that answers it. Fields a user's
row carries besides these travel along in ``extra`` and are written back unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self


@dataclass(frozen=True)
class Keys:
    """Names of the JSONL fields (`data.input_key`, `data.output_key`, `data.reward_key`)."""

    input: str = "input"
    output: str = "output"
    reward: str = "reward"

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Keys:
        """Those of a block `data` of a config, as provenance has it."""
        return cls(*(data.get(f"{name}_key", name) for name in ("input", "output", "reward")))


def part_fields(parts: Mapping[str, float | None], reward_key: str = "reward") -> dict[str, float | None]:
    """The rewards of several sources as fields of a row; see `part_name`."""
    return {part_name(name, reward_key): reward for name, reward in parts.items()}


def part_name(name: str, reward_key: str = "reward") -> str:
    """What the reward of a source is called in rows and logs: `reward_<name>`, and `reward_model` of the model."""
    return f"{reward_key}_{name.removeprefix('reward_')}"


TURNS = ("messages", "conversations", "prompt")
"""Fields that may hold a conversation: as OpenAI, NeMo and TRL call it; the first that is a list counts."""

TEMPLATE_FIELDS = ("system", "tools", "chat_template_kwargs")
"""Fields beside a conversation that its chat template reads: NeMo's first turn; tools, and values for the template."""

_CONTENT, _SPEAKER = ("content", "value"), ("role", "from")
_ASSISTANT = ("assistant", "gpt")


@dataclass(frozen=True)
class Turns:
    """A conversation as its row has it under `field`: up to the turn that the assistant is to write, or with it.

    Its `text`, which takes the place of a plain prompt, is that of the last turn before the assistant's.
    """

    field: str
    given: Sequence[Any]

    @classmethod
    def of(cls, row: Mapping[str, Any], input_key: str | None) -> Turns | None:
        """None for a row with a text under `input_key` (which is a plain prompt), and for one without turns."""
        if input_key is not None and isinstance(row.get(input_key), str):
            return None
        return next((cls(name, row[name]) for name in TURNS if isinstance(row.get(name), list)), None)

    @property
    def answered(self) -> bool:
        """Whether the last turn is the assistant's."""
        return bool(self.given) and any(str(self.given[-1].get(key, "")).lower() in _ASSISTANT for key in _SPEAKER)

    @property
    def answer(self) -> str:
        """The text of the last turn."""
        return _content(self.given[-1])

    @property
    def text(self) -> str:
        place = len(self.given) - 1 - self.answered
        return _content(self.given[place]) if place >= 0 else ""

    @property
    def shown(self) -> str | None:
        """As a person reads it; None for what is no list of turns."""
        if not self.given or not all(isinstance(t, Mapping) and any(key in t for key in _CONTENT) for t in self.given):
            return None
        names = (next((turn[key] for key in _SPEAKER if key in turn), "?") for turn in self.given)
        return "\n\n".join(f"{name}: {_content(turn)}" for name, turn in zip(names, self.given, strict=True))

    def saying(self, text: str) -> Turns:
        """The same with another `text`."""
        place = len(self.given) - 1 - self.answered
        key = next(key for key in _CONTENT if key in self.given[place])
        return replace(self, given=[{**turn, key: text} if i == place else turn for i, turn in enumerate(self.given)])


def _content(turn: Mapping[str, Any]) -> str:
    return str(next(turn[key] for key in _CONTENT if key in turn))


@dataclass(frozen=True)
class Sample:
    """A prompt with one response: ``Sample("The film was", " a delight.", {"id": 7})``.

    Of a conversation `input` is the text of the turn that is answered, and `turns` are all of them.
    """

    input: str
    output: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    turns: Turns | None = field(default=None, kw_only=True)

    @classmethod
    def of(cls, row: Mapping[str, Any], keys: Keys) -> Sample:
        """A row with prompt and response."""
        turns = Turns.of(row, keys.input)
        own = (keys.input, keys.output) if turns is None else (turns.field, keys.output)
        extra = {name: value for name, value in row.items() if name not in own}
        if turns is None:
            return Sample(row[keys.input], row[keys.output], extra)
        return Sample(turns.text, turns.answer if turns.answered else row[keys.output], extra, turns=turns)

    @property
    def prompt_id(self) -> str:
        """The same for samples of the same prompt alone."""
        if self.turns is None:
            return self.input
        asked = self.turns.given[: len(self.turns.given) - self.turns.answered]
        return json.dumps([asked, *(self.extra.get(name) or None for name in TEMPLATE_FIELDS)], sort_keys=True)

    def with_input(self, text: str) -> Self:
        return replace(self, input=text, turns=None if self.turns is None else self.turns.saying(text))

    def to_row(self, keys: Keys) -> dict[str, Any]:
        """The JSONL object; a user's own fields first, so that ours win."""
        if self.turns is None:
            return {**self.extra, keys.input: self.input, keys.output: self.output}
        output = {} if self.turns.answered else {keys.output: self.output}
        return {**self.extra, self.turns.field: list(self.turns.given), **output}


@dataclass(frozen=True)
class ScoredSample(Sample):
    """A sample with its reward: ``ScoredSample("The film was", " a delight.", {}, reward=1.25)``.

    `parts` are the rewards of several sources by their names, None where one could not tell; each gets a field.
    """

    reward: float = float("nan")
    parts: Mapping[str, float | None] = field(default_factory=dict)

    def to_row(self, keys: Keys, export_reward: bool = True) -> dict[str, Any]:
        """The JSONL object, with the reward unless `export_reward` is False."""
        row = super().to_row(keys)
        if not export_reward:
            return {name: value for name, value in row.items() if name != keys.reward}
        return {**row, keys.reward: self.reward, **part_fields(self.parts, keys.reward)}

    def with_reward(self, reward: float) -> ScoredSample:
        return replace(self, reward=reward)


@dataclass(frozen=True)
class Preference:
    """Two texts (prompt + response), the first preferred: ``Preference("Good film.", "Bad film.")``."""

    chosen: str
    rejected: str
