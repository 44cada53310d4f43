"""The best of several samples: estimates against all draws there are, KL and win rate against exact distributions."""

from __future__ import annotations

import itertools
import math

import pytest

from nemo_aligner.algorithms.best_of import best_of, best_of_kl_bound, pass_at, powers_up_to
from nemo_aligner.algorithms.processors import best_of_group
from nemo_aligner.records import ScoredSample

POLICY = {0.5: 0.2, 3.0: 0.5, 2.0: 0.3}
"""Probability of each reward."""


def chosen(policy: dict[float, float], n: int) -> dict[float, float]:
    """How likely each reward is in the rows that rejection sampling keeps, over all draws of n."""
    found = dict.fromkeys(policy, 0.0)
    for draws in itertools.product(policy, repeat=n):
        [best] = best_of_group([ScoredSample("p", str(i), {}, reward) for i, reward in enumerate(draws)])
        found[best.reward] += math.prod(policy[reward] for reward in draws)
    return found


def uniform_best_of(outcomes: int, n: int) -> list[float]:
    """P(best of n is the i-th of as many equally likely outcomes) = F(i)^n − F(i − 1)^n."""
    return [((i + 1) / outcomes) ** n - (i / outcomes) ** n for i in range(outcomes)]


@pytest.mark.parametrize(("samples", "k"), [(n, k) for n in range(1, 5) for k in range(1, n + 1)])
def test_the_best_of_k_is_estimated_without_bias_from_n_samples(samples: int, k: int) -> None:
    expected = sum(reward * p for reward, p in chosen(POLICY, k).items())
    found = sum(
        math.prod(POLICY[r] for r in draws) * best_of(draws, k) for draws in itertools.product(POLICY, repeat=samples)
    )
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(("samples", "k"), [(n, k) for n in range(1, 7) for k in range(1, n + 1)])
def test_pass_at_k_is_estimated_without_bias_from_n_samples(samples: int, k: int) -> None:
    p = 0.3
    found = sum(
        math.comb(samples, c) * p**c * (1 - p) ** (samples - c) * pass_at(k, samples, c) for c in range(samples + 1)
    )
    assert found == pytest.approx(1 - (1 - p) ** k)


def test_the_best_of_k_is_the_mean_of_the_largest_over_all_subsets() -> None:
    rewards = [2.0, -1.0, 2.0, 0.5, 7.0]
    for k in range(1, 6):
        subsets = list(itertools.combinations(rewards, k))
        assert best_of(rewards, k) == pytest.approx(sum(map(max, subsets)) / len(subsets))
    assert math.isnan(best_of([1.0, math.nan], 1))


def test_more_samples_to_choose_from_are_never_worse() -> None:
    rewards = [0.3, -2.0, 1.1, 1.1, 0.0, -0.4, 5.0, 0.2]
    curve = [best_of(rewards, k) for k in range(1, 9)]
    assert curve == sorted(curve)
    assert (curve[0], curve[-1]) == (pytest.approx(sum(rewards) / 8), 5.0)


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16, 64])
@pytest.mark.parametrize("outcomes", [2, 10, 100, 1000])
def test_the_kl_of_the_best_of_n_is_never_above_its_bound_and_nears_it_as_outcomes_multiply(
    n: int, outcomes: int
) -> None:
    kl = sum(p * math.log(p * outcomes) for p in uniform_best_of(outcomes, n) if p > 0)
    assert kl <= best_of_kl_bound(n) + 1e-12
    if outcomes == 1000:
        assert kl == pytest.approx(best_of_kl_bound(n), abs=2e-3)


@pytest.mark.parametrize(("n", "kl"), [(2, 0.1931), (4, 0.6363), (8, 1.2044), (16, 1.8351), (32, 2.4970)])
def test_the_bound_has_its_published_values(n: int, kl: float) -> None:
    assert best_of_kl_bound(n) == pytest.approx(kl, abs=5e-5)


@pytest.mark.parametrize("n", [2, 3])
def test_the_rows_that_rejection_sampling_keeps_obey_the_bound_ties_included(n: int) -> None:
    """By our rule the first of equals is kept, so that outcomes of one reward share its probability as they did."""
    kl = sum(p * math.log(p / POLICY[reward]) for reward, p in chosen(POLICY, n).items())
    assert 0 < kl <= best_of_kl_bound(n)
    equals = {"a": 0.3, "b": 0.2, "c": 0.5}
    kept = dict.fromkeys(equals, 0.0)
    for draws in itertools.product(equals, repeat=n):
        samples = [ScoredSample("p", name, {}, 1.0 if name == "c" else 2.0) for name in draws]
        kept[best_of_group(samples)[0].output] += math.prod(equals[name] for name in draws)
    assert kept["a"] / kept["b"] == pytest.approx(0.3 / 0.2)


@pytest.mark.parametrize("n", [2, 4, 16])
def test_the_best_of_n_beats_one_draw_n_times_out_of_n_plus_1(n: int) -> None:
    outcomes = 1000
    wins = sum(p * (i + 0.5) / outcomes for i, p in enumerate(uniform_best_of(outcomes, n)))
    assert wins == pytest.approx(n / (n + 1), abs=1e-3)


def test_the_numbers_of_samples_to_report_double_up_to_all_of_them() -> None:
    assert [powers_up_to(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]
