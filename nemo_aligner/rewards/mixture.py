"""Several sources as one: the weighted sum of what they say.

    R = Σ w_s · r_s   over the sources s that gave a reward

A source that answers None does not apply to the response, and the others decide (as TRL's reward functions do:
`nansum` of the weighted rewards). Where all answer None, nobody can tell. A source that failed (was killed at its time
limit, died, raised, returned something else than a number) owes a reward that nobody knows, so the sum is not known
either: R is None, not the rest of the sum, which would be no fair match for the other responses of its prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from nemo_aligner.rewards.interfaces import Candidate, Judgement, Outcome, Source


def weighted(
    parts: Mapping[str, float | None], weights: Mapping[str, float], failed: Iterable[str] = ()
) -> float | None:
    """R as above; NaN where a part is NaN."""
    known = [weights[name] * reward for name, reward in parts.items() if reward is not None]
    return None if not known or any(True for _ in failed) else math.fsum(known)


@dataclass(frozen=True)
class _Pending:
    answers: Mapping[str, Future[list[Outcome]]]
    weights: Mapping[str, float]
    apart: bool
    count: int

    def result(self) -> list[Judgement]:
        found = {name: answer.result() for name, answer in self.answers.items()}
        return [self._judgement({name: outcomes[i] for name, outcomes in found.items()}) for i in range(self.count)]

    def _judgement(self, outcomes: Mapping[str, Outcome]) -> Judgement:
        parts = {name: outcome.reward for name, outcome in outcomes.items()}
        failed = tuple(name for name, outcome in outcomes.items() if outcome.failure is not None)
        told = {name: reward for outcome in outcomes.values() for name, reward in outcome.parts.items()}
        return Judgement(weighted(parts, self.weights, failed), {**told, **(parts if self.apart else {})}, failed)


class Mixture:
    """Implements interfaces.Rewarder; `weights` of the sources, by their names.

    `apart`: judgements tell the reward of each source too, as those of a server that has several are told anyway.
    """

    def __init__(self, sources: Mapping[str, Source], weights: Mapping[str, float], *, apart: bool = True) -> None:
        assert sources.keys() == weights.keys(), "every source has a weight"
        self._sources, self._weights, self._apart = dict(sources), dict(weights), apart

    def submit(self, candidates: Sequence[Candidate]) -> _Pending:
        """All sources are asked in the order given, so those that answer at once come last."""
        answers = {name: source.submit(candidates) for name, source in self._sources.items()}
        return _Pending(answers, self._weights, self._apart, len(candidates))

    def hurry(self) -> None:
        for source in self._sources.values():
            source.hurry()

    def close(self) -> None:
        for source in self._sources.values():
            source.close()
