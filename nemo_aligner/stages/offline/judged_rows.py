"""What the labeler's journal says of rows: the rewards of each, weighted, and the rows with them, read when asked."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nemo_aligner.algorithms.statistics import mean_and_std
from nemo_aligner.config.rewards import REWARD_MODEL, RewardPlan
from nemo_aligner.data.blending import Blend
from nemo_aligner.data.journal import Journal
from nemo_aligner.data.jsonl import Row
from nemo_aligner.records import Keys, Sample, ScoredSample, part_fields
from nemo_aligner.rewards.functions import Functions
from nemo_aligner.rewards.interfaces import Judgement
from nemo_aligner.rewards.mixture import weighted


def journaled(judgement: Judgement, functions: Functions | None) -> dict[str, Any]:
    """A judgement as the journal keeps it; `parts` and `failed` are what other weights need."""
    if functions is None:
        return {"reward": judgement.reward}
    failed = {"failed": list(judgement.failed)} if judgement.failed else {}
    return {"reward": judgement.reward, "parts": dict(judgement.parts), **failed}


def judgement_of(row: Mapping[str, Any], weights: Mapping[str, float]) -> Judgement:
    """What `journaled` kept, weighted as this run says."""
    if "parts" not in row:
        return Judgement(weighted({REWARD_MODEL: row["reward"]}, weights))
    failed = tuple(row.get("failed", ()))
    return Judgement(weighted(row["parts"], weights, failed), row["parts"], failed)


class Judged(Sequence[Judgement]):
    """What the journal says of each row, weighted as this run says; `rewards` are NaN where there is none."""

    def __init__(self, journal: Journal, count: int, plan: RewardPlan) -> None:
        self._rows, self._weights = journal.merged(count), plan.weights
        self.rewards, self._parts = array("d"), {name: array("d") for name in plan.weights}
        self._unknown, self._failed = Counter[str](), Counter[str]()
        for judgement in self:
            self.rewards.append(math.nan if judgement.reward is None else judgement.reward)
            self._failed.update(judgement.failed)
            for name, values in self._parts.items() if plan.functions else ():
                value = judgement.parts[name]
                values.append(math.nan if value is None else value)
                self._unknown[name] += value is None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return judgement_of(self._rows[index], self._weights)

    def figures(self, name: str) -> dict[str, float]:
        """Of one of several sources: its rewards, and on how many rows it could not tell or failed."""
        mean, std = mean_and_std(self._parts[name])
        failed = self._failed[name]
        return {"mean": mean, "std": std, "cannot_tell": self._unknown[name] - failed, "failed": failed}


def with_raw_rewards(rows: Blend, chunk: range, judged: Judged, keys: Keys) -> Iterator[Row]:
    """What was judged, as loggers show it."""
    for position, reward, judgement in zip(chunk, judged.rewards, judged, strict=True):
        yield {**rows[position % len(rows)], keys.reward: reward, **part_fields(judgement.parts, keys.reward)}


class Samples(Sequence[ScoredSample]):
    """The rows of a chunk with their rewards, read when asked for."""

    def __init__(self, rows: Blend, chunk: range, judged: Judged, rewards: Sequence[float], keys: Keys) -> None:
        self._rows, self._chunk, self._judged, self._rewards, self._keys = rows, chunk, judged, rewards, keys

    def __len__(self) -> int:
        return len(self._chunk)

    def __getitem__(self, index: Any) -> Any:
        row = self._rows[self._chunk[index] % len(self._rows)]
        return scored(row, self._rewards[index], self._keys, self._judged[index].parts)


def scored(
    row: dict[str, Any], reward: float, keys: Keys, parts: Mapping[str, float | None] | None = None
) -> ScoredSample:
    """A row with its reward and those of several sources; the user's other fields travel along."""
    sample = Sample.of(row, keys)
    return ScoredSample(sample.input, sample.output, sample.extra, reward, parts or {}, turns=sample.turns)
