"""Shaping of rewards and the KL controller against their definitions, by hand and by what they must not depend on."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch

from nemo_aligner.algorithms.shaping import next_kl_penalty, overlong, whitened, whitening

ALL = torch.ones(5, dtype=torch.bool)
REWARDS = torch.tensor([1.0, -2.5, 0.1, 7.0, 0.1], dtype=torch.float64)


def white(rewards: torch.Tensor, counted: torch.Tensor) -> list[float]:
    return whitened(rewards, *whitening(rewards, counted)).tolist()


@pytest.mark.parametrize(
    ("buffer", "penalty"),
    [(4, [0, 0, 0.25, 0.75, 1]), (1, [0, 0, 0, 0, 1]), (10, [0.1, 0.6, 0.7, 0.9, 1])],
)
def test_the_length_penalty_rises_over_the_buffer_in_equal_steps(buffer: int, penalty: list[float]) -> None:
    assert overlong(torch.tensor([1, 6, 7, 9, 10]), buffer, 10).tolist() == pytest.approx(penalty)


def test_whitened_rewards_have_mean_zero_and_unbiased_deviation_one() -> None:
    found = white(REWARDS, ALL)
    assert statistics.mean(found) == pytest.approx(0, abs=1e-12)
    assert statistics.stdev(found) == pytest.approx(1)
    assert found[3] == pytest.approx((7.0 - statistics.mean(REWARDS.tolist())) / statistics.stdev(REWARDS.tolist()))


@pytest.mark.parametrize(("scale", "shift"), [(1e-6, 0.0), (250.0, -3.0), (1.0, 1e4)])
def test_scale_and_shift_of_all_rewards_do_not_move_whitened_ones(scale: float, shift: float) -> None:
    assert white(scale * REWARDS + shift, ALL) == pytest.approx(white(REWARDS, ALL), abs=1e-9)


def test_the_order_of_the_responses_does_not_move_the_statistics_in_the_last_digit() -> None:
    rng, values = random.Random(3), [random.Random(i).gauss(1e3, 1e-3) for i in range(50)]
    counted = torch.ones(50, dtype=torch.bool)
    found = whitening(torch.tensor(values, dtype=torch.float64), counted)
    for _ in range(20):
        rng.shuffle(values)
        assert whitening(torch.tensor(values, dtype=torch.float64), counted) == found


def test_what_is_not_counted_is_whitened_by_the_others_and_does_not_move_them() -> None:
    counted = torch.tensor([True, True, False, True, False])
    moved = torch.where(counted, REWARDS, torch.tensor([0, 0, 100.0, 0, math.nan], dtype=torch.float64))
    found, among_themselves = white(moved, counted), white(REWARDS[counted], ALL[:3])
    assert [found[i] for i in (0, 1, 3)] == among_themselves
    assert math.isfinite(found[2])
    assert math.isnan(found[4])


@pytest.mark.parametrize("equal", [[0.1, 0.1, 0.1], [0.1]])
def test_rewards_that_are_all_alike_tell_nothing(equal: list[float]) -> None:
    assert white(torch.tensor(equal, dtype=torch.float64), ALL[: len(equal)]) == [0.0] * len(equal)
    unknown = torch.tensor([math.nan, math.nan], dtype=torch.float64)
    assert all(math.isnan(value) for value in white(unknown, ~unknown.isnan()))


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.5),  # on target it stays
        (6.6, 0.5 * (1 + 0.1 * 0.1)),  # ten per cent above
        (5.4, 0.5 * (1 - 0.1 * 0.1)),
        (60.0, 0.5 * 1.02),  # the error is bounded
        (-1.0, 0.5 * 0.98),  # an estimate may be negative
    ],
)
def test_the_controller_by_hand(kl: float, expected: float) -> None:
    assert next_kl_penalty(0.5, kl, target=6.0, gain=0.1) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("start", [0.01, 0.2, 5.0])
def test_the_controller_comes_to_rest_where_the_kl_is_its_target(start: float) -> None:
    """A policy that is always at its optimum for β, where it keeps a KL of 1/(2β²) as a Gaussian shift does."""
    penalty = start
    for _ in range(2000):
        penalty = next_kl_penalty(penalty, 1 / (2 * penalty**2), target=2.0, gain=0.1)
    assert penalty == pytest.approx(0.5, rel=1e-6)
