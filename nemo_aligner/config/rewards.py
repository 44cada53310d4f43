"""Where rewards come from: the reward model, functions of one's own, or several of them with weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from nemo_aligner.config.schema import at_least
from nemo_aligner.errors import ConfigError
from nemo_aligner.records import part_name

REWARD_MODEL = "reward_model"
"""What the reward model is called among several sources."""

KEY = "reward_function"
_NAME = re.compile(r"[A-Za-z_]\w*")
_TARGET = re.compile(r"(?P<place>.+):(?P<function>[A-Za-z_]\w*)")


@dataclass(frozen=True)
class RewardFunction:
    """One function as the config asks for it; `target` is package.module:function or path/to/file.py:function."""

    name: str
    target: str
    weight: float = 1.0
    arguments: Mapping[str, Any] = field(default_factory=dict)  # constants for parameters of the function
    fields: Mapping[str, str] = field(default_factory=dict)  # {parameter: field of the row}; others are called alike
    time_limit_s: float = 10.0
    batch_size: int = 1


@dataclass(frozen=True)
class RewardPlan:
    """The sources of a run's rewards: functions, and the weight of the reward model where it is among them."""

    functions: tuple[RewardFunction, ...] = ()
    model_weight: float | None = 1.0

    @property
    def weights(self) -> dict[str, float]:
        """Of each source by its name; the reward model last."""
        own = {function.name: function.weight for function in self.functions}
        return own if self.model_weight is None else {**own, REWARD_MODEL: self.model_weight}

    @property
    def uses_model(self) -> bool:
        return self.model_weight is not None

    def check_model(self, given: str | None, key: str) -> None:
        """The archive `given` under `key` must be there where a reward model is asked for, and only there.

        Raises ConfigError.
        """
        if self.uses_model and given is None:
            raise ConfigError(f"required, but not given; {KEY} gives rewards without a reward model", key)
        if not self.uses_model and given is not None:
            raise ConfigError(
                f"{given} would give no reward, as {KEY} does not name it; add {REWARD_MODEL}: <weight> there, or "
                "leave this out",
                key,
            )


@dataclass
class RewardSources:
    """The keys that labeler, actor, evaluation and reward server share."""

    reward_function: Any = None  # null = the reward model; package.module:function, file.py:function, or several
    reward_time_limit_s: float = 10.0  # of each response; the process that judges it longer is killed
    reward_workers: int = 2  # processes that run reward functions, beside each data-parallel rank

    @property
    def reward_plan(self) -> RewardPlan:
        """Raises ConfigError for what says no source of rewards."""
        at_least(1, reward_workers=self.reward_workers)
        _check_positive(self.reward_time_limit_s, "reward_time_limit_s")
        given = self.reward_function
        if given is None:
            return RewardPlan()
        if isinstance(given, str):
            target = _target(given, KEY)
            return RewardPlan((self._function(target["function"], {"function": given}, KEY),), None)
        if not isinstance(given, Mapping) or not given:
            raise ConfigError(f"{given!r} is neither package.module:function nor {{name: ..., name: ...}}", KEY)
        model_weight = None
        functions = []
        for name, block in given.items():
            key = f"{KEY}.{name}"
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise ConfigError(f"{name!r} is no name: letters, digits and _", KEY)
            if name == REWARD_MODEL:
                model_weight = _model_weight(block, key)
            else:
                functions.append(self._function(name, {"function": block} if isinstance(block, str) else block, key))
        called = {part_name(name): name for name in given}
        for name in given:
            if called[part_name(name)] != name:
                raise ConfigError(
                    f"{name} and {called[part_name(name)]} would both be logged as {part_name(name)}", KEY
                )
        return RewardPlan(tuple(functions), model_weight)

    def _function(self, name: str, block: Any, key: str) -> RewardFunction:
        known = {"function", *(f.name for f in fields(RewardFunction))} - {"name", "target"}
        if not isinstance(block, Mapping) or "function" not in block:
            raise ConfigError(f"{block!r} is neither package.module:function nor {{function: ..., weight: ...}}", key)
        for unknown in block.keys() - known:
            raise ConfigError(f"no such key; there are {', '.join(sorted(known))}", f"{key}.{unknown}")
        settings = {"time_limit_s": self.reward_time_limit_s, **block}
        target = settings.pop("function")
        _target(target, key)
        function = RewardFunction(name, target, **settings)
        _check_weight(function.weight, f"{key}.weight")
        _check_positive(function.time_limit_s, f"{key}.time_limit_s")
        if not isinstance(function.batch_size, int) or function.batch_size < 1:
            raise ConfigError(f"{function.batch_size!r} is not a whole number from 1 on", f"{key}.batch_size")
        for part in ("arguments", "fields"):
            if not isinstance(getattr(function, part), Mapping):
                raise ConfigError(f"{getattr(function, part)!r} is not {{parameter: ...}}", f"{key}.{part}")
        return function


def split_target(target: str) -> tuple[str, str]:
    """(module or file, function) of a target that `RewardSources` let through."""
    place, _, function = target.rpartition(":")
    return place, function


def _target(given: Any, key: str) -> re.Match[str]:
    found = _TARGET.fullmatch(given) if isinstance(given, str) else None
    if found is None:
        raise ConfigError(f"{given!r} is neither package.module:function nor path/to/file.py:function", key)
    return found


def _model_weight(block: Any, key: str) -> float:
    if isinstance(block, Mapping):
        for unknown in block.keys() - {"weight"}:
            raise ConfigError("no such key; a reward model has a weight alone", f"{key}.{unknown}")
        block = block.get("weight", 1.0)
    _check_weight(block, key)
    return float(block)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_weight(value: Any, key: str) -> None:
    if not _is_number(value):
        raise ConfigError(f"{value!r} is not a number", key)


def _check_positive(value: Any, key: str) -> None:
    if not _is_number(value) or value <= 0:
        raise ConfigError(f"{value!r} is not a number above 0", key)
