"""Mean, spread and standardisation of rewards; entries that are None or NaN do not count."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

from nemo_aligner.errors import DataError

P = TypeVar("P", bound=Hashable)


def finite(values: Iterable[float | None]) -> list[float]:
    """Those that are known."""
    return [value for value in values if value is not None and math.isfinite(value)]


def known_by_prompt(rewards: Sequence[float | None], prompts: Sequence[P]) -> dict[P, list[int]]:
    """Places of the known rewards of each prompt that has any."""
    found: dict[P, list[int]] = {}
    for place, (reward, prompt) in enumerate(zip(rewards, prompts, strict=True)):
        if reward is not None and math.isfinite(reward):
            found.setdefault(prompt, []).append(place)
    return found


def mean_and_std(values: Iterable[float | None]) -> tuple[float, float]:
    """Mean and unbiased standard deviation (n − 1) of the finite values; NaN where there are too few."""
    known = finite(values)
    if not known:
        return math.nan, math.nan
    mean = math.fsum(known) / len(known)
    if len(known) < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (len(known) - 1))


def standardised(values: Sequence[float], mean: float, std: float) -> list[float]:
    """(r − mean) / std of each value. Raises DataError when std is not a positive number."""
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise DataError(
            f"reward_standardization cannot divide by std={std:g} (mean={mean:g}, {len(values)} rewards); "
            "give reward_standardization.mean and reward_standardization.std, or more than one distinct reward"
        )
    return [(value - mean) / std for value in values]


def standard_error(values: Sequence[float], clusters: Sequence[int]) -> float:
    """Of the mean of the finite values, where those of one cluster (the samples of one prompt) hang together.

    SE² = G/(G − 1) · Σ_c (Σ_{i in c} (x_i − x̄))² / n², of n values in G clusters (cluster-robust: Miller 2024, arXiv
    2411.00640, equation 4, with the correction for few clusters); s/√n where each value is a cluster. NaN for one.
    """
    kept = [(value, cluster) for value, cluster in zip(values, clusters, strict=True) if math.isfinite(value)]
    mean, _ = mean_and_std([value for value, _ in kept])
    sums: dict[int, float] = {}
    for value, cluster in kept:
        sums[cluster] = sums.get(cluster, 0.0) + value - mean
    if len(sums) < 2:
        return math.nan
    return math.sqrt(len(sums) / (len(sums) - 1) * math.fsum(total**2 for total in sums.values())) / len(kept)
