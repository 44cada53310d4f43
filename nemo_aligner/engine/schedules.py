"""Learning-rate schedules under NeMo's names: pure functions of the number of optimizer steps done.

Notation: t steps done (0 at the first update), W warmup_steps, C constant_steps, T max_steps, lr the peak, m min_lr.
All share one shape: warm-up, then a decay over D = T − W − C steps, then (or before: Hold policies) a constant part.

    warm-up           lr·(t + 1)/(W + 1)          never 0, reaches lr at t = W
    CosineAnnealing   m + (lr − m)·(1 + cos(π·p))/2
    SquareAnnealing   m + (lr − m)·(1 − p)²
    PolynomialDecay   m + (lr − m)·(1 − p)^power
    WarmupAnnealing   lr·(1 − p), at least m
    InverseSquareRoot lr·sqrt(max(W, 1)/max(t, 1, W)), at least m
    NoamAnnealing     lr·d^−½·min((t+1)^−½, (t+1)·max(W, 1)^−3/2), at least m      (arXiv 1706.03762, section 5.3)
    WarmupPolicy      lr after the warm-up
with p = (t − W)/D the part of the decay done.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_aligner.errors import ConfigError

log = logging.getLogger(__name__)

_COMMON = {"name", "warmup_steps", "warmup_ratio", "min_lr", "max_steps", "last_epoch", "monitor", "reduce_on_plateau"}
_CONSTANT = {"constant_steps", "constant_ratio"}
_ACCEPTED: dict[str, set[str]] = {
    "CosineAnnealing": _CONSTANT,
    "SquareAnnealing": set(),
    "WarmupAnnealing": set(),
    "WarmupPolicy": set(),
    "WarmupHoldPolicy": {"hold_steps", "hold_ratio"},
    "PolynomialDecayAnnealing": {"power", "cycle"},
    "PolynomialHoldDecayAnnealing": {"power", "cycle", "hold_steps", "hold_ratio"},
    "InverseSquareRootAnnealing": set(),
    "NoamAnnealing": {"d_model"},
    "StepLR": {"step_size", "gamma"},
    "ExponentialLR": {"gamma"},
}


@dataclass(frozen=True)
class Phases:
    """Lengths of a schedule's parts in optimizer steps."""

    warmup: int
    hold: int  # at lr, before the decay
    decay: int
    min_lr: float


def make_schedule(lr: float, sched: Mapping[str, Any] | None, max_steps: int) -> Callable[[int], float]:
    """`t -> learning rate` for a run of `max_steps` updates; `sched` None means constant.

    Raises ConfigError for a name or an argument that is not known.
    """
    if sched is None:
        return lambda t: lr
    name = sched.get("name")
    if name not in _ACCEPTED:
        raise ConfigError(f"{name!r} is not one of {', '.join(_ACCEPTED)}", "model.optim.sched.name")
    unknown = sorted(set(sched) - _COMMON - _ACCEPTED[name])
    if unknown:
        valid = ", ".join(sorted((_COMMON | _ACCEPTED[name]) - {"name"}))
        raise ConfigError(f"{name} has no such argument; it takes {valid}", f"model.optim.sched.{unknown[0]}")
    phases = _phases(sched, max_steps)
    after = _after_warmup(name, lr, phases, sched)

    def schedule(t: int) -> float:
        if t < phases.warmup and name != "NoamAnnealing":
            return lr * (t + 1) / (phases.warmup + 1)
        return after(t)

    return schedule


def _steps(sched: Mapping[str, Any], part: str, max_steps: int) -> int:
    """`<part>_steps`, or `<part>_ratio` of the run."""
    steps, ratio = sched.get(f"{part}_steps"), sched.get(f"{part}_ratio")
    if steps is not None and ratio is not None:
        raise ConfigError(f"give {part}_steps or {part}_ratio, not both", f"model.optim.sched.{part}_steps")
    return int(steps if steps is not None else (ratio or 0.0) * max_steps)


def _phases(sched: Mapping[str, Any], max_steps: int) -> Phases:
    """Parts that do not fit a short run shrink: the constant part first, so that lr never jumps to min_lr."""
    total = int(sched.get("max_steps") or max_steps)
    warmup = min(_steps(sched, "warmup", total), max(0, total - 1))
    constant = _steps(sched, "constant", total)
    # one step of decay at least is asked for by warmup + constant = max_steps - 1, the common way to say "constant"
    fits = max(0, total - warmup - 1)
    if constant > fits:
        log.info("the schedule is longer than the run's %d steps: constant_steps %d is taken as 0", total, constant)
        constant = 0
    hold = min(_steps(sched, "hold", total), max(0, total - warmup))
    return Phases(warmup, hold, max(1, total - warmup - constant - hold), float(sched.get("min_lr") or 0.0))


def _after_warmup(name: str, lr: float, phases: Phases, sched: Mapping[str, Any]) -> Callable[[int], float]:
    low = phases.min_lr

    def part(t: int) -> float:
        return min(1.0, max(0, t - phases.warmup - phases.hold) / phases.decay)

    power = {"SquareAnnealing": 2.0, "WarmupAnnealing": 1.0}.get(name, float(sched.get("power", 1.0)))
    formulas: dict[str, Callable[[int], float]] = {
        "CosineAnnealing": lambda t: low + (lr - low) * 0.5 * (1 + math.cos(math.pi * part(t))),
        "SquareAnnealing": lambda t: low + (lr - low) * (1 - part(t)) ** power,
        "PolynomialDecayAnnealing": lambda t: low + (lr - low) * (1 - part(t)) ** power,
        "PolynomialHoldDecayAnnealing": lambda t: low + (lr - low) * (1 - part(t)) ** power,
        "WarmupAnnealing": lambda t: max(low, lr * (1 - part(t))),
        "WarmupPolicy": lambda t: lr,
        "WarmupHoldPolicy": lambda t: lr if part(t) == 0 else max(low, lr * (1 - part(t))),
        "InverseSquareRootAnnealing": lambda t: max(
            low, lr * math.sqrt(max(phases.warmup, 1) / max(t, 1, phases.warmup))
        ),
        "NoamAnnealing": lambda t: max(
            low,
            lr * float(sched.get("d_model", 1)) ** -0.5 * min((t + 1) ** -0.5, (t + 1) * max(phases.warmup, 1) ** -1.5),
        ),
        "StepLR": lambda t: lr * float(sched.get("gamma", 0.1)) ** (t // int(sched.get("step_size", 1))),
        "ExponentialLR": lambda t: lr * float(sched.get("gamma", 1.0)) ** t,
    }
    return formulas[name]
