"""Two policies side by side: each figure against its definition, and what it says where the answer is known."""

from __future__ import annotations

import math
import random

import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binom, binomtest

from nemo_aligner.algorithms.comparison import Answers, compare, distinct, length_controlled, wilson_interval


def answers(rewards: list[float], prompts: list[int]) -> Answers:
    return Answers(rewards, prompts, [1] * len(rewards))


def test_a_policy_is_compared_with_the_first_prompt_by_prompt() -> None:
    prompts = [0, 0, 1, 1, 2, 2]
    first = answers([10.0, 12.0, 1.0, 1.0, 5.0, 5.0], prompts)
    other = answers([12.0, 12.0, 1.0, 1.0, 9.0, math.nan], prompts)
    differences, mean = [1.0, 0.0, 4.0], 5 / 3
    found = compare(other, first)
    assert found["gain"] == pytest.approx(mean)
    assert found["gain_standard_error"] == pytest.approx(
        math.sqrt(sum((d - mean) ** 2 for d in differences) / 2) / math.sqrt(3)
    )
    assert found["better_on"] == pytest.approx(2 / 3)
    assert found["win_rate"] == pytest.approx(((1 + 1 + 0.5 + 0.5) / 4 + 0.5 + 1) / 3)


def test_a_policy_is_neither_better_nor_worse_than_itself() -> None:
    own = answers([1.0, 5.0, 2.0, 2.0], [0, 0, 1, 1])
    found = compare(own, own)
    assert (found["gain"], found["gain_standard_error"], found["better_on"], found["win_rate"]) == (0.0, 0.0, 0.0, 0.5)
    assert found["win_rate_length_controlled"] == pytest.approx(0.5)


def test_who_wins_one_way_loses_the_other() -> None:
    draw = random.Random(3)
    prompts = [p for p in range(9) for _ in range(3)]
    a, b = (
        Answers([draw.gauss(m, 1) for _ in prompts], prompts, [draw.randrange(1, 40) for _ in prompts]) for m in (0, 1)
    )
    there, back = compare(a, b), compare(b, a)
    for name in ("win_rate", "win_rate_length_controlled"):
        assert there[name] == pytest.approx(1 - back[name], abs=1e-5)  # type: ignore[operator]
    assert there["win_rate_interval"] == pytest.approx([1 - end for end in reversed(back["win_rate_interval"])])  # type: ignore[arg-type]


def test_prompts_without_a_reward_do_not_count() -> None:
    found = compare(answers([math.nan, 3.0, 4.0], [0, 1, 2]), answers([1.0, 1.0, math.nan], [0, 1, 2]))
    assert (found["gain"], found["better_on"], found["win_rate"]) == (2.0, 1.0, 1.0)
    nothing = compare(answers([math.nan], [0]), answers([1.0], [0]))
    assert nothing.pop("better_on") == 0.0
    assert all(math.isnan(value) for value in (*nothing.pop("win_rate_interval"), *nothing.values()))  # type: ignore[misc, arg-type]


@pytest.mark.parametrize(("wins", "prompts"), [(0, 5), (5, 5), (3, 10), (61, 100)])
def test_of_wins_and_losses_the_interval_is_wilsons(wins: int, prompts: int) -> None:
    known = binomtest(wins, prompts).proportion_ci(method="wilson")
    assert wilson_interval(wins / prompts, prompts) == pytest.approx((known.low, known.high))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_the_interval_holds_the_rate_95_times_of_100(rate: float) -> None:
    """Exactly, over all numbers of wins; by whole numbers of wins it misses 95 % by a little."""
    covered = 0.0
    for wins in range(101):
        low, high = wilson_interval(wins / 100, 100)
        covered += binom.pmf(wins, 100, rate) if low <= rate <= high else 0.0
    assert 0.93 < covered < 0.97


def test_length_control_finds_the_minimum_of_its_loss() -> None:
    pairs = [([(1.0, 10), (2.0, 30)], [(1.5, 12), (0.0, 8)]), ([(0.0, 25)], [(1.0, 5)]), ([(3.0, 9)], [(3.0, 9)])]
    seen = [
        (a_len - b_len, 0.5 if a == b else float(a > b), 1 / (len(own) * len(first)))
        for own, first in pairs for a, a_len in own for b, b_len in first
    ]  # fmt: skip
    scale = math.sqrt(sum(w * d * d for d, _, w in seen) / (sum(w for _, _, w in seen) + 1))

    def loss(theta: float, phi: float) -> float:
        total = phi * phi / 2 + math.log(1 + math.exp(-theta)) / 2 + math.log(1 + math.exp(theta)) / 2
        for d, won, w in seen:
            z = theta + phi * math.tanh(d / scale)
            total += w * (won * math.log(1 + math.exp(-z)) + (1 - won) * math.log(1 + math.exp(z)))
        return total

    def best_phi(theta: float) -> float:
        return float(minimize_scalar(lambda phi: loss(theta, phi)).fun)

    theta = float(minimize_scalar(best_phi).x)
    assert length_controlled(pairs) == pytest.approx(1 / (1 + math.exp(-theta)), abs=1e-4)


def test_wins_that_length_explains_are_not_counted() -> None:
    """The longer answer always wins, and one policy is longer more often: at equal length neither is better."""
    draw = random.Random(5)
    pairs = []
    for _ in range(400):
        own, first = draw.randrange(10, 60), draw.randrange(0, 40)
        pairs.append(([(float(own), own)], [(float(first), first)]))
    wins = sum(a[0][0] > b[0][0] for a, b in pairs) / len(pairs)
    assert wins > 0.75
    assert length_controlled(pairs) < 0.6


def test_distinct_is_the_part_of_n_grams_that_are_new() -> None:
    texts = ["a b a b", "b a"]
    assert distinct(texts, 1) == pytest.approx(2 / 6)
    assert distinct(texts, 2) == pytest.approx(2 / 4)
    assert math.isnan(distinct(["one"], 2))
