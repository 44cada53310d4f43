"""Standard errors against their definition and against what they say of repeated draws."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from nemo_aligner.algorithms.statistics import standard_error


def test_of_independent_values_it_is_s_over_root_n() -> None:
    values = [1.0, 4.0, 2.5, -3.0]
    mean = sum(values) / 4
    expected = math.sqrt(sum((v - mean) ** 2 for v in values) / 3 / 4)
    assert standard_error(values, range(4)) == pytest.approx(expected)


def test_it_sums_over_all_pairs_within_a_cluster() -> None:
    values, clusters = [1.0, 2.0, 4.0, 8.0, 16.0, 3.0], [0, 0, 0, 1, 1, 2]
    mean = sum(values) / 6
    pairs = itertools.product(zip(values, clusters, strict=True), repeat=2)
    total = sum((a - mean) * (b - mean) for (a, c), (b, d) in pairs if c == d)
    assert standard_error(values, clusters) == pytest.approx(math.sqrt(3 / 2 * total) / 6)


def test_it_is_the_spread_of_the_mean_over_many_draws_of_prompts() -> None:
    draw = random.Random(1)

    def sample() -> tuple[list[float], list[int]]:
        of_prompts = [draw.gauss(0, 2) for _ in range(12)]
        return [m + draw.gauss(0, 1) for m in of_prompts for _ in range(3)], [p for p in range(12) for _ in range(3)]

    samples = [sample() for _ in range(4000)]
    means = [sum(values) / len(values) for values, _ in samples]
    spread = math.sqrt(sum(m**2 for m in means) / len(means))
    told = math.sqrt(sum(standard_error(*one) ** 2 for one in samples) / len(samples))
    assert told == pytest.approx(spread, rel=0.05)
    blind = math.sqrt(sum(standard_error(values, range(36)) ** 2 for values, _ in samples) / len(samples))
    assert blind < 0.7 * spread, "samples of one prompt are not independent"


def test_values_that_are_none_do_not_count_and_one_cluster_says_nothing() -> None:
    assert standard_error([1.0, math.nan, 4.0], [0, 1, 2]) == pytest.approx(1.5)
    assert math.isnan(standard_error([1.0, 2.0], [0, 0]))
    assert math.isnan(standard_error([math.nan], [0]))


@pytest.mark.parametrize("clusters", [[0], [0, 1, 2]])
def test_every_value_belongs_to_a_cluster(clusters: list[int]) -> None:
    with pytest.raises(ValueError, match="zip"):
        standard_error([1.0, 2.0], clusters)
