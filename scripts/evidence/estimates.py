"""Figures of the runs: means, intervals, and the curve of best-of-n of the start model.

An interval is one of 95 %. With several seeds it is Student's, over the seeds: what another seed would do is in it.
With one seed it is over the prompts (normal, each prompt's samples as one value): what another seed would do is not in
it. The prompts are the same for all, so differences are taken prompt by prompt, and what prompts differ by drops out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from nemo_aligner.algorithms.best_of import best_of_kl_bound, powers_up_to
from nemo_aligner.algorithms.comparison import NORMAL_95
from nemo_aligner.algorithms.statistics import mean_and_std

Row = dict[str, Any]
ByPrompt = Mapping[str, float]


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its interval; both ends are NaN where nothing can be said of it."""

    mean: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 where all of it is above 0, −1 where all is below, 0 where it holds 0 or is not known."""
        return (self.low > 0) - (self.high < 0)

    def overlaps(self, other: Interval) -> bool:
        return not (self.low > other.high or self.high < other.low)


def interval(values: Sequence[float], quantile: float) -> Interval:
    mean, std = mean_and_std(values)
    half = quantile * std / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def over(seeds: Sequence[ByPrompt]) -> Interval:
    """Of a figure by prompt, {prompt: mean} of each seed: over the seeds, or the prompts of the only one."""
    if len(seeds) == 1:
        return interval([*seeds[0].values()], NORMAL_95)
    from scipy.stats import t

    means = [mean_and_std(seed.values())[0] for seed in seeds]
    return interval(means, float(t.ppf(0.975, len(means) - 1)))


def difference(own: Sequence[ByPrompt], other: Sequence[ByPrompt]) -> Interval:
    """`own` − `other`; the seeds are paired in their order."""
    return over([{p: one[p] - two[p] for p in one} for one, two in zip(own, other, strict=True)])


@dataclass(frozen=True)
class Point:
    """A method at one point of its training, over its seeds."""

    method: str
    at: int
    responses: float
    generated_tokens: float
    kl: Interval
    rewards: dict[str, list[dict[str, float]]]  # of each reward, by seed, the mean of each prompt
    gains: dict[str, Interval]  # of each reward, over the start model on the same prompts


def by_prompt(rows: Sequence[Row], name: str) -> dict[str, float]:
    """The mean of each prompt's samples."""
    groups: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        groups[row["input"]].append(row[name])
    return {prompt: math.fsum(values) / len(values) for prompt, values in groups.items()}


def points_of(rows: Sequence[Row], rewards: Sequence[str]) -> list[Point]:
    """Every method at every point, in the order of the rows; the start model is what gains are over."""
    start = {name: by_prompt([row for row in rows if row["method"] == "start"], name) for name in rewards}
    groups: dict[tuple[str, int], dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["method"] != "start":
            groups[row["method"], row["at"]][row["seed"]].append(row)
    found = []
    for (method, at), seeds in groups.items():
        own = {name: [by_prompt(samples, name) for samples in seeds.values()] for name in rewards}
        tokens, _ = mean_and_std([samples[0]["generated_tokens"] for samples in seeds.values()])
        responses, _ = mean_and_std([samples[0]["responses"] for samples in seeds.values()])
        kl = over([by_prompt(samples, "kl") for samples in seeds.values()])
        gains = {name: difference(own[name], [start[name]] * len(seeds)) for name in rewards}
        found.append(Point(method, at, responses, tokens, kl, own, gains))
    return found


def results_of(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """One row for each method, seed and point: what was drawn until then, and the means of `names` over its samples."""
    groups: dict[tuple[str, int, int], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["method"], row["seed"], row["at"]].append(row)
    return [
        {
            **{key: samples[0][key] for key in ("method", "seed", "at", "responses", "generated_tokens")},
            "samples": len(samples),
            **{name: mean_and_std([sample[name] for sample in samples])[0] for name in names},
        }
        for samples in groups.values()
    ]


@dataclass(frozen=True)
class Reference:
    """Best-of-n of the start model by the reward that is trained against: at most so far away, and so much gained."""

    ns: list[int]
    kl: list[float]  # the bound log n − (n − 1)/n
    gains: dict[str, list[float]]  # of every reward, that of the response which that one chooses

    def at(self, reward: str, kl: float) -> float | None:
        """Its gain at a KL, between two n by a straight line; None beyond the largest n."""
        if kl > self.kl[-1]:
            return None
        gains = self.gains[reward]
        for (left, right), (low, high) in zip(pairwise(self.kl), pairwise(gains), strict=True):
            if kl <= right:
                return low + (high - low) * max(0.0, kl - left) / (right - left)
        return None


def reference_of(rows: Sequence[Row], rewards: Sequence[str]) -> Reference:
    """From several samples of the start model to each prompt, by all choices of n of them."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["method"] == "start":
            groups[row["input"]].append(row)
    ns = powers_up_to(min(map(len, groups.values())))
    gains = {}
    for name in rewards:
        values = [mean_and_std([chosen(group, n, name) for group in groups.values()])[0] for n in ns]
        gains[name] = [value - values[0] for value in values]
    return Reference(ns, [best_of_kl_bound(n) for n in ns], gains)


def chosen(group: Sequence[Row], n: int, name: str) -> float:
    """Expected `name` of the best of n of a prompt's samples, the best by `reward`: as `best_of`, of another value."""
    subsets = math.comb(len(group), n)
    ranked = sorted(group, key=lambda row: row["reward"])
    return math.fsum(math.comb(i, n - 1) / subsets * row[name] for i, row in enumerate(ranked))
