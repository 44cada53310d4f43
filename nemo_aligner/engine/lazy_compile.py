"""Megatron imported without torch's compiler, whose import takes longer than all of Megatron's.

Megatron decorates its fused functions with `torch.compile`, which imports the compiler at once; few runs ever call one
of them, and none does on a CPU. Here the decorator waits for a function's first call.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


def compiled_at_first_call(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """`torch.compile` of a function, or a decorator with its options, put off until the function is called."""
    if function is None:
        return functools.partial(compiled_at_first_call, **options)

    @functools.cache
    def compiled() -> Callable[..., Any]:
        import torch

        return torch.compile(function, **options)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call


class _FindsMegatron(MetaPathFinder):
    """Finds megatron.core where Python would; the decorator that it takes from torch at its import is the one above."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "megatron.core" or (spec := PathFinder.find_spec(name, path)) is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def without_compiler(module: ModuleType) -> None:
            import torch

            compiler, torch.compile = torch.compile, compiled_at_first_call  # type: ignore[assignment]
            try:
                execute(module)
            finally:
                torch.compile = compiler

        spec.loader.exec_module = without_compiler  # type: ignore[method-assign]
        return spec


def put_off_compiler() -> None:
    """Before megatron.core is imported; once."""
    sys.meta_path.insert(0, _FindsMegatron())
