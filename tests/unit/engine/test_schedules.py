"""Learning-rate schedules: end points, continuity, and the runs that are shorter than their schedule."""

from __future__ import annotations

import itertools
import math

import pytest

from nemo_aligner.engine.schedules import make_schedule
from nemo_aligner.errors import ConfigError


def rates(sched: dict | None, steps: int, lr: float = 1.0) -> list[float]:
    schedule = make_schedule(lr, sched, steps)
    return [schedule(t) for t in range(steps)]


def test_no_schedule_is_constant() -> None:
    assert rates(None, 5, 0.3) == [0.3] * 5


def test_cosine_warms_up_from_above_zero_decays_and_stays_at_the_minimum() -> None:
    found = rates({"name": "CosineAnnealing", "warmup_steps": 3, "constant_steps": 2, "min_lr": 0.1}, 15)
    assert found[:3] == [0.25, 0.5, 0.75]
    decay = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * p / 10)) for p in range(10)]
    assert found[3:13] == pytest.approx(decay)
    assert found[13:] == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize("steps", [1, 2, 5, 12, 200, 1005])
def test_a_run_shorter_than_its_schedule_neither_starts_at_zero_nor_jumps(steps: int) -> None:
    found = rates({"name": "CosineAnnealing", "warmup_steps": 10, "constant_steps": 1000, "min_lr": 1e-3}, steps)
    assert found[0] > 0
    longest = max((abs(a - b) for a, b in itertools.pairwise(found)), default=0.0)
    assert longest <= (0.6 if steps < 20 else 0.15)


def test_the_guides_reinforce_schedule_is_constant_after_the_first_step() -> None:
    sched = {"name": "CosineAnnealing", "warmup_steps": 0, "constant_steps": 312, "min_lr": 1e-6}
    found = rates(sched, 313, 1.001e-6)
    assert found[0] == pytest.approx(1.001e-6)
    assert found[1:] == pytest.approx([1e-6] * 312)


@pytest.mark.parametrize(
    ("sched", "formula"),
    [
        ({"name": "SquareAnnealing"}, lambda t: (1 - t / 10) ** 2),
        ({"name": "PolynomialDecayAnnealing", "power": 3}, lambda t: (1 - t / 10) ** 3),
        ({"name": "WarmupAnnealing"}, lambda t: 1 - t / 10),
        ({"name": "WarmupPolicy"}, lambda t: 1.0),
        ({"name": "InverseSquareRootAnnealing"}, lambda t: 1 / math.sqrt(max(t, 1))),
        ({"name": "StepLR", "step_size": 4, "gamma": 0.5}, lambda t: 0.5 ** (t // 4)),
        ({"name": "ExponentialLR", "gamma": 0.9}, lambda t: 0.9**t),
        ({"name": "NoamAnnealing", "d_model": 4, "warmup_steps": 3},
         lambda t: 0.5 * min((t + 1) ** -0.5, (t + 1) * 3**-1.5)),
    ],
)  # fmt: skip
def test_the_other_schedules_follow_their_formulas(sched: dict, formula) -> None:  # type: ignore[no-untyped-def]
    assert rates(sched, 10) == pytest.approx([formula(t) for t in range(10)])


def test_unknown_names_and_arguments_are_refused_with_their_key() -> None:
    with pytest.raises(ConfigError, match=r"model\.optim\.sched\.name: 'Cosine' is not one of CosineAnnealing"):
        make_schedule(1.0, {"name": "Cosine"}, 10)
    with pytest.raises(ConfigError, match=r"model\.optim\.sched\.warmup: CosineAnnealing has no such argument"):
        make_schedule(1.0, {"name": "CosineAnnealing", "warmup": 3}, 10)
