"""Two policies that answered the same prompts, side by side: how often one is better, and by how much."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_aligner.algorithms.statistics import known_by_prompt, mean_and_std

NORMAL_95 = 1.959963984540054
"""97.5th percentile of the standard normal distribution."""


@dataclass(frozen=True)
class Answers:
    """Of one policy: the rewards and lengths of its samples, each with the number of its prompt."""

    rewards: list[float]
    prompts: list[int]
    lengths: list[int]

    def by_prompt(self) -> dict[int, list[tuple[float, int]]]:
        """Reward and length of each prompt's samples that have a reward."""
        known = known_by_prompt(self.rewards, self.prompts)
        return {prompt: [(self.rewards[i], self.lengths[i]) for i in places] for prompt, places in known.items()}


def compare(own: Answers, first: Answers) -> dict[str, float | list[float]]:
    """What a policy is better than the first by; prompts that either has no reward of do not count.

    `gain`: the mean over prompts of the difference of their mean rewards; both answered the same prompts, so that the
    spread of the prompts themselves drops out of `gain_standard_error`, s/√G over G prompts. `better_on`: the part of
    the prompts with a higher mean. `win_rate`: the chance that a sample of its own beats one of the first's to the same
    prompt, a tie being half of a win, with its 95 % interval; `win_rate_length_controlled`: see there.
    """
    theirs = first.by_prompt()
    pairs = [(samples, theirs[prompt]) for prompt, samples in own.by_prompt().items() if prompt in theirs]
    gains = [_mean_reward(a) - _mean_reward(b) for a, b in pairs]
    wins = [_win_rate(a, b) for a, b in pairs]
    gain, std = mean_and_std(gains)
    rate, _ = mean_and_std(wins)
    return {
        "gain": gain,
        "gain_standard_error": std / math.sqrt(len(gains)) if gains else math.nan,
        "better_on": sum(difference > 0 for difference in gains) / max(1, len(gains)),
        "win_rate": rate,
        "win_rate_interval": list(wilson_interval(rate, len(wins))),
        "win_rate_length_controlled": length_controlled(pairs),
    }


def wilson_interval(rate: float, prompts: int) -> tuple[float, float]:
    """95 % interval of the mean of `prompts` independent numbers in [0, 1] (Wilson 1927, J. Am. Stat. Assoc. 22:209).

    (p + z²/2G ± z·√(p(1 − p)/G + z²/4G²)) / (1 + z²/G). Wins and losses have a variance of p(1 − p), and
    no other numbers in [0, 1] a larger one, so that ties and several samples of a prompt make the interval too wide, if
    anything.
    """
    if prompts == 0:
        return math.nan, math.nan
    z = NORMAL_95**2 / prompts
    half = math.sqrt(z * (rate * (1 - rate) + z / 4))
    return max(0.0, (rate + z / 2 - half) / (1 + z)), min(1.0, (rate + z / 2 + half) / (1 + z))


def length_controlled(pairs: Sequence[tuple[Sequence[tuple[float, int]], Sequence[tuple[float, int]]]]) -> float:
    """Win rate were answers of equal length, from (reward, length) of either's samples to each prompt.

    logit P(win) = θ + φ · tanh(Δ/s), Δ the difference of two answers' lengths and s its root mean square; fitted to all
    pairs of answers, each prompt weighing the same, and read at Δ = 0: σ(θ) (Dubois et al. 2024, arXiv 2404.04475,
    equation 1, with one φ and no term for a prompt's difficulty). Half a win and half a loss at equal length are
    added, and φ has a prior of N(0, 1), so that the fit exists for any answers.
    """
    from sklearn.linear_model import LogisticRegression

    differences, wins, weights = [0.0, 0.0], [1.0, 0.0], [0.5, 0.5]
    for own, first in pairs:
        for reward, length in own:
            for other, other_length in first:
                for won, share in ((1.0, _beats(reward, other)), (0.0, 1 - _beats(reward, other))):
                    differences.append(float(length - other_length))
                    wins.append(won)
                    weights.append(share / (len(own) * len(first)))
    if not pairs:
        return math.nan
    mass = math.fsum(weights)
    scale = math.sqrt(math.fsum(w * d * d for w, d in zip(weights, differences, strict=True)) / mass) or 1.0
    lengths = [[math.tanh(difference / scale)] for difference in differences]
    fitted = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(lengths, wins, sample_weight=weights)
    return 1 / (1 + math.exp(-float(fitted.intercept_[0])))


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams of words over all of them (Li et al. 2016, arXiv 1510.03055, section 5.3); NaN without any."""
    grams = [tuple(words[i : i + n]) for words in (text.split() for text in texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def _mean_reward(samples: Sequence[tuple[float, int]]) -> float:
    return math.fsum(reward for reward, _ in samples) / len(samples)


def _win_rate(own: Sequence[tuple[float, int]], first: Sequence[tuple[float, int]]) -> float:
    return math.fsum(_beats(a, b) for a, _ in own for b, _ in first) / (len(own) * len(first))


def _beats(reward: float, other: float) -> float:
    return 0.5 if reward == other else float(reward > other)
