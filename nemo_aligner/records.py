"""What one JSONL line means at each point of the pipeline.

    Prompt        {"input": "The film was"}
    Sample        {"input": "The film was", "output": " a delight."}
    ScoredSample  {"input": "The film was", "output": " a delight.", "reward": 1.25}
    Preference    two adjacent lines {"text": "... chosen"} and {"text": "... rejected"}

Fields a user's row carries besides these travel along in ``extra`` and are written back unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Keys:
    """Names of the JSONL fields (`data.input_key`, `data.output_key`, `data.reward_key`)."""

    input: str = "input"
    output: str = "output"
    reward: str = "reward"


def part_fields(parts: Mapping[str, float | None], reward_key: str = "reward") -> dict[str, float | None]:
    """The rewards of several sources as fields of a row; see `part_name`."""
    return {part_name(name, reward_key): reward for name, reward in parts.items()}


def part_name(name: str, reward_key: str = "reward") -> str:
    """What the reward of a source is called in rows and logs: `reward_<name>`, and `reward_model` of the model."""
    return f"{reward_key}_{name.removeprefix('reward_')}"


@dataclass(frozen=True)
class Prompt:
    """One prompt as read: ``Prompt("The film was", {"id": 7})``."""

    input: str
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """A prompt with one response: ``Sample("The film was", " a delight.", {"id": 7})``."""

    input: str
    output: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_row(self, keys: Keys) -> dict[str, Any]:
        """The JSONL object; a user's own fields first, so that ours win."""
        return {**self.extra, keys.input: self.input, keys.output: self.output}


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
