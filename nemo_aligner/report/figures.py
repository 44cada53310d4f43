"""Figures of a set of rewards: quantiles, shared histogram bins, and what best-of-n of the same samples would give.

Entries that are None or NaN do not count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from nemo_aligner.algorithms.statistics import mean_and_std, standard_error

QUANTILES = 101
"""Points that stand for a distribution in a page, whatever its size: the 0th, 1st, ... 100th percentile."""

BINS = 40


def finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def summary(rewards: Sequence[float | None], prompts: Sequence[int]) -> dict[str, Any]:
    """Mean, spread, quantiles and best of each prompt; `prompts` are the numbers of the samples' prompts.

    The standard error takes the samples of a prompt as hanging together. All None where no reward is known.
    """
    values = [math.nan if reward is None else reward for reward in rewards]
    known = finite(values)
    mean, std = mean_and_std(known)
    best = best_of_n(values, prompts)
    return {
        "mean": mean,
        "std": std,
        "standard_error": standard_error(values, prompts) if len(known) > 1 else math.nan,
        "known": len(known),
        "quantiles": quantiles(known),
        "best_of": best,
    }


def quantiles(known: Sequence[float]) -> list[float]:
    """The percentiles of finite values; none of none."""
    return np.quantile(known, np.linspace(0, 1, QUANTILES)).tolist() if known else []


def best_of_n(rewards: Sequence[float], prompts: Sequence[int]) -> list[tuple[int, float]]:
    """(n, expected reward of the best of n samples), averaged over prompts, for n = 1, 2, ... 16 and m.

    m is the fewest samples that a prompt has; no n is larger.

    Of a prompt's rewards r_1 ≤ ... ≤ r_m, the best of n that are drawn without replacement is r_i with the probability
    C(i − 1, n − 1) / C(m, n): the unbiased estimator of Chen et al. 2021 (pass@k, arXiv 2107.03374) for rewards.
    """
    groups: dict[int, list[float]] = {}
    for reward, prompt in zip(rewards, prompts, strict=True):
        if math.isfinite(reward):
            groups.setdefault(prompt, []).append(reward)
    if not groups:
        return []
    ordered = [sorted(group) for group in groups.values()]
    most = min(len(group) for group in ordered)
    return [
        (n, math.fsum(_expected_best(group, n) for group in ordered) / len(ordered))
        for n in dict.fromkeys((*range(1, min(most, 16) + 1), most))
    ]


def _expected_best(ordered: Sequence[float], n: int) -> float:
    m = len(ordered)
    total = math.comb(m, n)
    return math.fsum(math.comb(i, n - 1) / total * reward for i, reward in enumerate(ordered))


def best_of_n_kl(n: int) -> float:
    """Upper bound, in nats, of the KL of best-of-n sampling to the policy it samples: ln n − (n − 1)/n.

    Beirami et al. 2024 (arXiv 2401.01879), theorem 1.
    """
    return math.log(n) - (n - 1) / n


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
