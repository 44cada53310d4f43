"""Learning-rate schedules: end points, continuity, and the runs that are shorter than their schedule."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable

import pytest
import torch

from nemo_aligner.engine.training.schedules import check_schedule, make_schedule
from nemo_aligner.errors import ConfigError
from nemo_aligner.quiet_nemo import quiet_nemo


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
        ({"name": "InverseSquareRootAnnealing"}, lambda t: 1 / math.sqrt(t + 1)),
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


@pytest.mark.parametrize(
    "sched",
    [
        {"name": "CosineAnnealing"},
        {"name": "WarmupHoldPolicy", "hold_steps": 3},
        {"name": "PolynomialHoldDecayAnnealing", "hold_steps": 3},
        {"name": "InverseSquareRootAnnealing"},
        {"name": "NoamHoldAnnealing", "hold_steps": 3},
    ],
)
def test_the_warm_up_is_linear_and_ends_at_the_peak(sched: dict) -> None:
    found = rates({**sched, "warmup_steps": 3}, 40)
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert max(found) == pytest.approx(1.0)


def test_hold_keeps_the_peak_before_a_linear_decay() -> None:
    found = rates({"name": "PolynomialHoldDecayAnnealing", "warmup_steps": 1, "hold_steps": 4}, 10)
    assert found == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_noam_hold_falls_by_the_power_of_warm_ups_passed() -> None:
    found = rates({"name": "NoamHoldAnnealing", "warmup_steps": 4, "hold_steps": 10, "decay_rate": 1.0}, 31)
    assert found[4:15] == pytest.approx([1.0] * 11)
    assert found[18] == pytest.approx(1 / 2)
    assert found[30] == pytest.approx(1 / 5)


@pytest.mark.parametrize("part", ["warmup", "constant"])
def test_a_ratio_is_that_part_of_the_run(part: str) -> None:
    sched = {"name": "CosineAnnealing", "min_lr": 0.1}
    assert rates({**sched, f"{part}_ratio": 0.25}, 40) == rates({**sched, f"{part}_steps": 10}, 40)


def test_max_steps_of_the_schedule_wins_over_the_run() -> None:
    sched = {"name": "WarmupAnnealing", "min_lr": 0.1}
    found = rates({**sched, "max_steps": 5}, 10)
    assert found[:5] == rates(sched, 5)
    assert found[5:] == pytest.approx([0.1] * 5)


def test_keys_of_nemo_that_mean_nothing_here_are_accepted() -> None:
    sched = {"name": "CosineAnnealing", "warmup_steps": 2}
    extra = {"monitor": "val_loss", "reduce_on_plateau": False, "last_epoch": -1, "constant_ratio": None}
    assert rates({**sched, **extra}, 10) == rates(sched, 10)


@pytest.mark.parametrize(
    ("sched", "key", "told"),
    [
        ({"name": "WarmupPolicy", "constant_steps": 3}, "constant_steps", "warmup_steps"),
        ({"name": "CosineAnnealing", "min_lr": "low"}, "min_lr", "not a number"),
        ({"name": "CosineAnnealing", "warmup_steps": -1}, "warmup_steps", "0 or more"),
        ({"name": "StepLR", "step_size": 0}, "step_size", "above 0"),
        ({"name": "StepLR", "step_size": 2, "max_steps": 0}, "max_steps", "above 0"),
        ({"name": "NoamAnnealing", "d_model": 0}, "d_model", "above 0"),
        ({"name": "CosineAnnealing", "min_lr": float("nan")}, "min_lr", "nan is not 0 or more"),
        ({"name": "CosineAnnealing", "warmup_steps": [1]}, "warmup_steps", "not a number"),
        ({"name": "ExponentialLR"}, "gamma", "needs it"),
        ({"name": "StepLR"}, "step_size", "needs it"),
        ({"name": "NoamAnnealing"}, "d_model", "needs it"),
        ({"name": "NoamHoldAnnealing"}, "warmup_steps", "at least 1"),
        ({"name": "CosineAnnealing", "warmup_steps": 1, "warmup_ratio": 0.1}, "warmup_steps", "not both"),
    ],
)
def test_wrong_values_are_refused_by_their_key(sched: dict, key: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as raised:
        make_schedule(1.0, sched, 10)
    assert raised.value.key == f"model.optim.sched.{key}"


PEAK, LOW, STEPS, WARM, HELD, CONSTANT = 2.0, 0.3, 40, 4, 5, 6


def done(t: int, held: int = 0, constant: int = 0) -> float:
    """The part of the decay that is done after t steps."""
    return min(1.0, max(0.0, (t - WARM - held) / (STEPS - WARM - held - constant)))


DEFINITIONS: dict[str, tuple[dict, Callable[[int], float]]] = {
    "CosineAnnealing": (
        {"constant_steps": CONSTANT},
        lambda t: LOW + (PEAK - LOW) * (1 + math.cos(math.pi * done(t, constant=CONSTANT))) / 2,
    ),
    "SquareAnnealing": ({}, lambda t: max(LOW, PEAK * (1 - done(t)) ** 2)),
    "WarmupAnnealing": ({}, lambda t: LOW + (PEAK - LOW) * (1 - done(t))),
    "PolynomialDecayAnnealing": ({"power": 3}, lambda t: LOW + (PEAK - LOW) * (1 - done(t)) ** 3),
    "PolynomialHoldDecayAnnealing": (
        {"power": 3, "hold_steps": HELD},
        lambda t: LOW + (PEAK - LOW) * (1 - done(t, HELD)) ** 3,
    ),
    "WarmupPolicy": ({}, lambda t: PEAK),
    "WarmupHoldPolicy": ({"hold_steps": HELD}, lambda t: PEAK),
    "InverseSquareRootAnnealing": ({}, lambda t: max(LOW, PEAK * math.sqrt((WARM + 1) / (t + 1)))),
    "NoamHoldAnnealing": (
        {"hold_steps": HELD},
        lambda t: PEAK if t < WARM + HELD else max(LOW, PEAK * math.sqrt(WARM / (t - HELD))),
    ),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_after_the_warm_up_each_schedule_is_its_formula_to_its_last_step_and_the_minimum_after_it(name: str) -> None:
    arguments, formula = DEFINITIONS[name]
    schedule = make_schedule(PEAK, {"name": name, "warmup_steps": WARM, "min_lr": LOW, **arguments}, STEPS)
    assert [schedule(t) for t in range(WARM)] == pytest.approx([PEAK * (t + 1) / (WARM + 1) for t in range(WARM)])
    expected = [formula(t) for t in range(WARM, STEPS + 1)]
    assert [schedule(t) for t in range(WARM, STEPS + 1)] == pytest.approx(expected)
    assert [schedule(STEPS + 1), schedule(10 * STEPS)] == [LOW, LOW]


def test_noam_rises_from_below_the_minimum_and_falls_to_it() -> None:
    low = 0.2
    schedule = make_schedule(PEAK, {"name": "NoamAnnealing", "d_model": 4, "warmup_steps": 9, "min_lr": low}, 20)
    plain = [PEAK * 4**-0.5 * min((t + 1) ** -0.5, (t + 1) * 9**-1.5) for t in range(60)]
    assert plain[0] < low
    assert plain[59] < low
    assert [schedule(t) for t in range(60)] == pytest.approx([x if t < 9 else max(low, x) for t, x in enumerate(plain)])
    at_once = make_schedule(PEAK, {"name": "NoamAnnealing", "d_model": 4}, 20)
    assert [at_once(t) for t in range(5)] == pytest.approx([PEAK / 2 * (t + 1) ** -0.5 for t in range(5)])


def test_schedules_of_torch_go_on_past_the_run_and_know_no_minimum() -> None:
    stairs = make_schedule(PEAK, {"name": "StepLR", "step_size": 3}, 4)
    assert [stairs(t) for t in (0, 2, 3, 5, 6, 9)] == pytest.approx([PEAK * 0.1**n for n in (0, 0, 1, 1, 2, 3)])
    falling = make_schedule(PEAK, {"name": "ExponentialLR", "gamma": 0.5}, 4)
    assert [falling(t) for t in (0, 1, 5, 9)] == pytest.approx([PEAK * 0.5**t for t in (0, 1, 5, 9)])


NOT_ABOVE_THE_PEAK = ("CosineAnnealing", "SquareAnnealing", "InverseSquareRootAnnealing")
"""Of these NeMo refuses a minimum above the peak, or does not keep to it."""


@pytest.mark.parametrize(
    ("name", "low"),
    [(n, low) for n in DEFINITIONS for low in (0.0, LOW, PEAK + 1) if low < PEAK or n not in NOT_ABOVE_THE_PEAK],
)
def test_a_run_with_room_for_every_phase_has_the_rates_of_nemos_own_schedule(name: str, low: float) -> None:
    with quiet_nemo():
        from nemo.core.optim.lr_scheduler import AVAILABLE_SCHEDULERS
    # with constant_steps the cosine of NeMo begins at 0
    arguments = {"warmup_steps": WARM, "min_lr": low, **({} if name == "CosineAnnealing" else DEFINITIONS[name][0])}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    with quiet_nemo():
        nemos = AVAILABLE_SCHEDULERS[name](optimizer, max_steps=STEPS, **arguments)
        expected = []
        for _ in range(STEPS + 3):
            expected += nemos.get_last_lr()
            optimizer.step()
            nemos.step()
    ours = make_schedule(PEAK, {"name": name, **arguments}, STEPS)
    assert [ours(t) for t in range(STEPS + 3)] == pytest.approx(expected)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_warm_up_longer_than_the_run_reaches_the_peak_at_the_last_step(
    steps: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        found = rates({"name": "CosineAnnealing", "warmup_steps": 50, "min_lr": 0.1}, steps)
    assert found == pytest.approx([(t + 1) / steps for t in range(steps)])
    assert f"warmup_steps 50 is longer than the run, taken as {steps - 1}" in caplog.text


def test_a_warm_up_that_fits_is_taken_as_it_is_and_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert rates({"name": "WarmupAnnealing", "warmup_steps": 3}, 4) == pytest.approx([0.25, 0.5, 0.75, 1.0])
        assert rates({"name": "CosineAnnealing", "warmup_steps": 1, "constant_steps": 2}, 4)[1:] == [1.0, 0.0, 0.0]
    assert not caplog.records


def test_constant_steps_that_leave_no_decay_are_taken_as_none(caplog: pytest.LogCaptureFixture) -> None:
    sched = {"name": "CosineAnnealing", "warmup_steps": 1, "min_lr": 0.1}
    with caplog.at_level(logging.INFO):
        assert rates({**sched, "constant_steps": 9}, 10) == rates(sched, 10)
        assert "constant_steps 9 leave no decay, taken as 0" in caplog.text
        caplog.clear()
        assert rates({**sched, "constant_steps": 8}, 10) != rates(sched, 10)
        assert not caplog.records
        assert rates({**sched, "constant_steps": 1}, 2) == rates(sched, 2)
        assert "constant_steps 1 leave no decay, taken as 0" in caplog.text


def test_a_minimum_above_the_rate_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert rates({"name": "WarmupAnnealing", "min_lr": 1.0}, 4) == [1.0] * 4
    assert not caplog.records
    assert make_schedule(1.0, {"name": "WarmupAnnealing", "min_lr": 2.0}, 4)(4) == 2.0
    assert "min_lr 2 lies above model.optim.lr 1" in caplog.text


def test_a_ratio_of_the_schedules_own_length_is_rounded_down() -> None:
    sched = {"name": "PolynomialHoldDecayAnnealing", "max_steps": 10}
    assert rates({**sched, "hold_ratio": 0.49}, 40) == rates({**sched, "hold_steps": 4}, 40)
    assert rates({**sched, "warmup_ratio": 0.49}, 40) == rates({**sched, "warmup_steps": 4}, 40)


def test_a_block_is_checked_without_a_run() -> None:
    check_schedule(None)
    check_schedule({"name": "NoamHoldAnnealing", "warmup_ratio": 0.1})
    with pytest.raises(ConfigError, match=r"model\.optim\.sched\.power: CosineAnnealing has no such argument"):
        check_schedule({"name": "CosineAnnealing", "power": 2})
    with pytest.raises(ConfigError, match="it takes constant_ratio, constant_steps, max_steps, min_lr, warmup_ratio, "):
        check_schedule({"name": "CosineAnnealing", "power": 2})
