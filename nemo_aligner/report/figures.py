"""Figures of a set of rewards: quantiles, shared histogram bins, and what best-of-n of the same samples would give.

Entries that are None or NaN do not count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nemo_aligner.algorithms.best_of import best_of
from nemo_aligner.algorithms.statistics import finite, known_by_prompt, mean_and_std, standard_error

QUANTILES = 101
"""Points that stand for a distribution in a page, whatever its size: the 0th, 1st, ... 100th percentile."""

BINS = 40


def summary(rewards: Sequence[float | None], prompts: Sequence[int]) -> dict[str, Any]:
    """Mean, spread, quantiles and best of each prompt; `prompts` are the numbers of the samples' prompts.

    The standard error takes the samples of a prompt as hanging together. All None where no reward is known.
    """
    values = [math.nan if reward is None else reward for reward in rewards]
    known = finite(values)
    mean, std = mean_and_std(known)
    return {
        "mean": mean,
        "std": std,
        "standard_error": standard_error(values, prompts) if len(known) > 1 else math.nan,
        "known": len(known),
        "quantiles": quantiles(known),
        "best_of": best_of_n(values, prompts),
    }


def quantiles(known: Sequence[float]) -> list[float]:
    """The percentiles of finite values; none of none."""
    return np.quantile(known, np.linspace(0, 1, QUANTILES)).tolist() if known else []


def best_of_n(rewards: Sequence[float], prompts: Sequence[int]) -> list[tuple[int, float]]:
    """(n, expected reward of the best of n samples), averaged over prompts, for n = 1, 2, ... 16 and m.

    m is the fewest samples that a prompt has; no n is larger.
    """
    groups = [[rewards[i] for i in places] for places in known_by_prompt(rewards, prompts).values()]
    most = min(map(len, groups), default=0)
    return [
        (n, math.fsum(best_of(group, n) for group in groups) / len(groups))
        for n in sorted({*range(1, min(most, 16) + 1), *([most] if most else [])})
    ]


def histograms(sets: Sequence[Sequence[float | None]]) -> dict[str, Any]:
    """Shares of each set in bins that all of them share: {"edges": [BINS + 1], "shares": [[BINS], ...]}."""
    known = [finite(values) for values in sets]
    everything = [value for values in known for value in values]
    if not everything:
        return {"edges": [], "shares": [[] for _ in sets]}
    low, high = min(everything), max(everything)
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, BINS + 1)
    counts = [np.histogram(values, bins=edges)[0] / max(1, len(values)) for values in known]
    return {"edges": edges.tolist(), "shares": [shares.tolist() for shares in counts]}
