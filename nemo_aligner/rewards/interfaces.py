"""Who gives rewards, as the stages see it: the same for a reward model, a server, functions, and several at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from nemo_aligner.records import Turns


@dataclass(frozen=True)
class Candidate:
    """A response to be judged, with the other fields of its prompt's row; `where` names the row in messages.

    Of a conversation `prompt` is the text of the turn that is answered, and `turns` are all of them, which are among
    the `fields` too.
    """

    prompt: str
    response: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""
    turns: Turns | None = None

    def row(self, input_key: str, output_key: str) -> dict[str, Any]:
        """As a row of samples: the prompt under `input_key`, or the turns under the name that they have."""
        prompt = {input_key: self.prompt} if self.turns is None else {self.turns.field: self.turns.given}
        answer = {} if self.turns is not None and self.turns.answered else {output_key: self.response}
        return {**self.fields, **prompt, **answer}


@dataclass(frozen=True)
class Outcome:
    """What one source says of a response: a reward, None for "cannot tell", or why it failed (and no reward).

    `parts` are the rewards of the sources behind it, by their names, where it is a server that has several.
    """

    reward: float | None
    failure: str | None = None
    parts: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Judgement:
    """The reward of a response, None where nobody can tell, and that of each source by its name."""

    reward: float | None
    parts: Mapping[str, float | None] = field(default_factory=dict)
    failed: tuple[str, ...] = ()  # sources that were to give a reward and could not


class Source(Protocol):
    """One giver of rewards; an outcome for each candidate, in their order."""

    def submit(self, candidates: Sequence[Candidate]) -> Future[list[Outcome]]: ...

    def hurry(self) -> None:
        """Do not wait any longer for what does not come. For signal handlers."""

    def close(self) -> None: ...


class Judgements(Protocol):
    """Judgements to come; a Future is one."""

    def result(self) -> list[Judgement]:
        """Raises an AlignerError where they cannot be had."""


class Rewarder(Protocol):
    """What a stage asks for rewards."""

    def submit(self, candidates: Sequence[Candidate]) -> Judgements: ...

    def hurry(self) -> None: ...

    def close(self) -> None: ...


class ServedModel(Protocol):
    """A reward model behind a server, such as servers.reward_client.RewardClient.

    `archive` is the sha256 of its archive, as far as it is known; once it is, rewards of another are refused.
    """

    archive: str | None
