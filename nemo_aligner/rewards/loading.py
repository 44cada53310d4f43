"""Reward functions inside their worker process: found, described, called, and their answers checked.

Nothing here imports more than the standard library, so that a worker starts at once.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import numbers
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

PROMPTS, RESPONSES = "prompts", "responses"

Function = Callable[..., Any]


def load(place: str, name: str) -> Function:
    """The function `name` of a module, or of a file where `place` ends in .py. Raises what importing raises."""
    module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    function = getattr(module, name, None)
    if function is None:
        there = ", ".join(sorted(n for n, value in vars(module).items() if inspect.isfunction(value))) or "none"
        raise AttributeError(f"{place} has no function {name!r}; it has {there}")
    if not callable(function):
        raise TypeError(f"{name!r} of {place} is {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    sys.path.insert(0, str(path.resolve().parent))  # what lies beside it may be imported, as in a script
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def describe(function: Function, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What the function wants, and the sum of the file that it stands in.

    `needs`: parameters that a row must have a field for; `takes`: those it may have one for; `any`: whether it takes
    every other field too. Raises TypeError for a function that takes no responses, or lacks a parameter of `arguments`.
    """
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = {p.name for p in named}
    if any(p.kind is p.POSITIONAL_ONLY for p in parameters):
        raise TypeError("it has positional-only parameters, and is called with all by name")
    for name in (RESPONSES, *arguments):
        if name not in names and not takes_any:
            raise TypeError(f"it has no parameter {name!r}; it has {', '.join(sorted(names)) or 'none'}")
    own = [p for p in named if p.name not in (PROMPTS, RESPONSES, *arguments)]
    return {
        "needs": [p.name for p in own if p.default is p.empty],
        "takes": [p.name for p in own if p.default is not p.empty],
        "any": takes_any,
        "prompts": takes_any or PROMPTS in names,
        "sum": _sum_of_source(function),
    }


def _sum_of_source(function: Function) -> str | None:
    """SHA-256 of the file with the function; None where it has none, as one written in C."""
    try:
        path = inspect.getsourcefile(inspect.unwrap(function))
        return None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except (TypeError, OSError):
        return None


def checked(answer: Any, count: int) -> list[float | None]:
    """`count` rewards, as plain floats and None. Raises ValueError or TypeError for anything else."""
    if hasattr(answer, "tolist"):  # arrays and tensors
        answer = answer.tolist()
    if isinstance(answer, str | bytes | Mapping) or not isinstance(answer, Sequence):
        raise TypeError(f"it returned {_shown(answer)}, not a list of {count} rewards")
    if len(answer) != count:
        raise ValueError(f"it returned {len(answer)} rewards for {count} response{'s' * (count != 1)}")
    return [_number(value) for value in answer]


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, numbers.Real) and callable(getattr(value, "item", None)):  # of an array or a tensor
        value = value.item()
    if not isinstance(value, numbers.Real):
        raise TypeError(f"it returned {_shown(value)} for a reward, not a number or None")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"it returned {number} for a reward; None says that it cannot tell")
    return number


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
