"""What a report draws is what its definitions say."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from nemo_aligner.algorithms.best_of import best_of_kl_bound
from nemo_aligner.report.figures import BINS, best_of_n, histograms, summary


def test_best_of_n_is_the_mean_over_all_choices_of_n_samples() -> None:
    draw = random.Random(1)
    groups = [[draw.choice([0.0, 0.5, 1.0, draw.gauss(0, 1)]) for _ in range(size)] for size in (5, 7, 5)]
    rewards = [reward for group in groups for reward in group]
    prompts = [number for number, group in enumerate(groups) for _ in group]
    found = best_of_n(rewards, prompts)
    assert [n for n, _ in found] == [1, 2, 3, 4, 5]
    for n, value in found:
        choices = [[max(own) for own in itertools.combinations(group, n)] for group in groups]
        assert value == pytest.approx(sum(sum(own) / len(own) for own in choices) / len(groups))


def test_a_reward_that_is_no_number_counts_for_nothing() -> None:
    assert best_of_n([1.0, math.nan, 3.0], [0, 0, 1]) == [(1, 2.0)]
    assert best_of_n([math.nan], [0]) == []
    found = summary([None, 1.0, 3.0, math.nan], [0, 0, 1, 1])
    assert (found["known"], found["mean"]) == (2, 2.0)
    assert (found["quantiles"][0], found["quantiles"][50], found["quantiles"][-1]) == (1.0, 2.0, 3.0)
    assert summary([None], [0])["quantiles"] == []


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_kl_of_best_of_n_does_not_pass_its_bound_and_comes_near_it_with_many_responses(n: int) -> None:
    def kl(count: int) -> float:
        # of `count` responses alike in probability, the best of n is the i-th with (i/count)^n − ((i−1)/count)^n
        ranks = np.arange(count + 1) / count
        chosen = np.diff(ranks**n)
        return float(np.sum(chosen * np.log(chosen * count)))

    bound = best_of_kl_bound(n)
    assert all(kl(count) <= bound + 1e-9 for count in (2, 3, 10, 100))
    assert kl(20_000) == pytest.approx(bound, abs=1e-3)


def test_histograms_of_several_sets_share_their_bins_and_count_every_reward() -> None:
    found = histograms([[0.0, 1.0, None], [4.0], []])
    assert (found["edges"][0], found["edges"][-1], len(found["edges"])) == (0.0, 4.0, BINS + 1)
    assert [sum(shares) for shares in found["shares"]] == [pytest.approx(1.0), pytest.approx(1.0), 0.0]
    assert histograms([[2.0, 2.0]])["shares"][0].count(1.0) == 1
    assert histograms([[], [None]]) == {"edges": [], "shares": [[], []]}
