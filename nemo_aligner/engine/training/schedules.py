"""Learning-rate schedules under NeMo's names: pure functions of the number of optimizer steps done.

Notation: t steps done (0 at the first update), lr the peak, m min_lr, W warmup_steps, H hold_steps, C constant_steps,
T max_steps (the run's, unless the schedule says otherwise), p = (t − W − H)/(T − W − H − C) within 0..1 the part of the
decay done.

    t < W                          lr·(t + 1)/(W + 1), never 0; not for NoamAnnealing, StepLR, ExponentialLR
    CosineAnnealing                m + (lr − m)·(1 + cos(π·p))/2
    SquareAnnealing                max(m, lr·(1 − p)²)
    WarmupAnnealing                m + (lr − m)·(1 − p)
    Polynomial[Hold]DecayAnnealing m + (lr − m)·(1 − p)^power
    Warmup[Hold]Policy             lr
    InverseSquareRootAnnealing     max(m, lr·sqrt((W + 1)/(t + 1)))
    NoamAnnealing                  lr·d_model^−½·min((t + 1)^−½, (t + 1)·W^−3/2), from W on at least m
                                   (Vaswani et al. 2017, arXiv 1706.03762, section 5.3)
    NoamHoldAnnealing              lr for W ≤ t < W + H, then max(m, lr·(W/(t − H))^decay_rate)
                                   (Kim et al. 2022, arXiv 2206.00888)
    StepLR                         lr·gamma^⌊t/step_size⌋
    ExponentialLR                  lr·gamma^t
    t > T                          m; not for NoamAnnealing, StepLR, ExponentialLR
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_aligner.errors import ConfigError

log = logging.getLogger(__name__)

_BLOCK = "model.optim.sched"
_NOT_USED = {"last_epoch", "monitor", "reduce_on_plateau", "cycle"}  # NeMo YAMLs carry them
_WARMUP = {"min_lr", "warmup_steps", "warmup_ratio"}
_HOLD = _WARMUP | {"hold_steps", "hold_ratio"}


@dataclass(frozen=True)
class _Numbers:
    """The schedule's arguments, checked; lengths in optimizer steps."""

    lr: float
    min_lr: float
    warmup: int
    hold: int
    decay: int
    total: int
    power: float = 1.0
    gamma: float = 0.1
    step_size: float = 1.0
    d_model: float = 1.0
    decay_rate: float = 0.5

    def between(self, kept: float) -> float:
        """min_lr plus the part `kept` of what lr lies above it."""
        return self.min_lr + (self.lr - self.min_lr) * kept

    def left(self, t: int) -> float:
        """1 − p."""
        return 1.0 - min(1.0, max(0, t - self.warmup - self.hold) / self.decay)


def _noam(n: _Numbers, t: int) -> float:
    step = t + 1
    rising = step * n.warmup**-1.5 if n.warmup else math.inf
    value = n.lr * n.d_model**-0.5 * min(step**-0.5, rising)
    return value if t < n.warmup else max(n.min_lr, value)


def _noam_hold(n: _Numbers, t: int) -> float:
    if t < n.warmup + n.hold:
        return n.lr
    return max(n.min_lr, n.lr * (n.warmup / (t - n.hold)) ** n.decay_rate)


@dataclass(frozen=True)
class _Kind:
    """What NeMo's schedule of one name takes, and its rate after the warm-up."""

    formula: Callable[[_Numbers, int], float]
    takes: set[str]
    needs: tuple[str, ...] = ()
    has_phases: bool = True  # linear warm-up before, min_lr after the end


_KINDS = {
    "CosineAnnealing": _Kind(
        lambda n, t: n.between(0.5 * (1 + math.cos(math.pi * (1 - n.left(t))))),
        _WARMUP | {"constant_steps", "constant_ratio"},
    ),
    "SquareAnnealing": _Kind(lambda n, t: max(n.min_lr, n.lr * n.left(t) ** 2), _WARMUP),
    "WarmupAnnealing": _Kind(lambda n, t: n.between(n.left(t)), _WARMUP),
    "WarmupPolicy": _Kind(lambda n, t: n.lr, _WARMUP),
    "WarmupHoldPolicy": _Kind(lambda n, t: n.lr, _HOLD),
    "PolynomialDecayAnnealing": _Kind(lambda n, t: n.between(n.left(t) ** n.power), _WARMUP | {"power"}),
    "PolynomialHoldDecayAnnealing": _Kind(lambda n, t: n.between(n.left(t) ** n.power), _HOLD | {"power"}),
    "InverseSquareRootAnnealing": _Kind(
        lambda n, t: max(n.min_lr, n.lr * math.sqrt((n.warmup + 1) / (t + 1))), _WARMUP
    ),
    "NoamAnnealing": _Kind(_noam, _WARMUP | {"d_model"}, ("d_model",), has_phases=False),
    "NoamHoldAnnealing": _Kind(_noam_hold, _HOLD | {"decay_rate"}),
    "StepLR": _Kind(
        lambda n, t: n.lr * n.gamma ** (t // n.step_size), {"step_size", "gamma"}, ("step_size",), has_phases=False
    ),
    "ExponentialLR": _Kind(lambda n, t: n.lr * n.gamma**t, {"gamma"}, ("gamma",), has_phases=False),
}


def make_schedule(lr: float, sched: Mapping[str, Any] | None, max_steps: int) -> Callable[[int], float]:
    """`t -> learning rate` for a run of `max_steps` optimizer steps; `sched` None means constant.

    sched: {name, warmup_steps, ...} as in `model.optim.sched`. Raises ConfigError for a name or an argument that is not
    known, and for values that are no numbers or out of range.
    """
    if sched is None:
        return lambda t: lr
    kind, given = _checked(sched)
    numbers = _numbers(lr, given, max_steps)
    if sched["name"] == "NoamHoldAnnealing" and numbers.warmup == 0:
        raise ConfigError(
            f"{sched['name']} needs at least 1: its decay is measured in warm-ups", f"{_BLOCK}.warmup_steps"
        )

    def schedule(t: int) -> float:
        if kind.has_phases and t < numbers.warmup:
            return lr * (t + 1) / (numbers.warmup + 1)
        if kind.has_phases and t > numbers.total:
            return numbers.min_lr
        return kind.formula(numbers, t)

    return schedule


def check_schedule(sched: Mapping[str, Any] | None) -> None:
    """Raises ConfigError for what `make_schedule` would refuse in a run of any length."""
    if sched is not None:
        _checked(sched)


def _checked(sched: Mapping[str, Any]) -> tuple[_Kind, dict[str, float]]:
    """The schedule's formula, and the numbers given for it."""
    name = sched.get("name")
    if name not in _KINDS:
        raise ConfigError(f"{name!r} is not one of {', '.join(_KINDS)}", f"{_BLOCK}.name")
    kind = _KINDS[name]
    given = {key: value for key, value in sched.items() if key != "name" and key not in _NOT_USED and value is not None}
    takes = kind.takes | {"max_steps"}
    for key in given:
        if key not in takes:
            raise ConfigError(f"{name} has no such argument; it takes {', '.join(sorted(takes))}", f"{_BLOCK}.{key}")
    for key in kind.needs:
        if key not in given:
            raise ConfigError(f"{name} needs it", f"{_BLOCK}.{key}")
    return kind, {key: _number(key, value) for key, value in given.items()}


def _number(key: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{value!r} is not a number", f"{_BLOCK}.{key}") from None
    positive = key in ("max_steps", "step_size", "d_model")
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        raise ConfigError(f"{value!r} is not {'above 0' if positive else '0 or more'}", f"{_BLOCK}.{key}")
    return number


def _steps(given: Mapping[str, float], part: str, total: int) -> int:
    """`<part>_steps`, or `<part>_ratio` of the whole schedule."""
    if f"{part}_steps" in given and f"{part}_ratio" in given:
        raise ConfigError(f"give {part}_steps or {part}_ratio, not both", f"{_BLOCK}.{part}_steps")
    return int(given.get(f"{part}_steps", given.get(f"{part}_ratio", 0.0) * total))


def _numbers(lr: float, given: Mapping[str, float], max_steps: int) -> _Numbers:
    """Parts that do not fit a short run shrink, so that the peak is reached and lr never jumps to min_lr."""
    total = int(given.get("max_steps", max_steps))
    asked = _steps(given, "warmup", total)
    warmup = min(asked, max(0, total - 1))
    if warmup < asked:
        log.info("%s: warmup_steps %d is longer than the run, taken as %d", _BLOCK, asked, warmup)
    constant, hold = _steps(given, "constant", total), _steps(given, "hold", total)
    # a decay of one step is what NeMo's own recipes ask for (constant_steps = max_steps − 1) to mean "constant"
    if constant > max(0, total - warmup - 1):
        log.info("%s: warm-up and constant_steps %d leave no decay, taken as 0", _BLOCK, constant)
        constant = 0
    min_lr = given.get("min_lr", 0.0)
    if min_lr > lr:
        log.warning("%s: min_lr %g lies above model.optim.lr %g: the rate rises to it", _BLOCK, min_lr, lr)
    others = {key: given[key] for key in ("power", "gamma", "step_size", "d_model", "decay_rate") if key in given}
    decay = max(1, total - warmup - constant - hold)
    return _Numbers(lr, min_lr, warmup, hold, decay, total, **others)
