from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nemo_aligner.engine.lazy_compile import compiled_at_first_call


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of each compilation; what is compiled answers with the negative."""
    seen = []

    def compile(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        seen.append(options)
        return lambda *args, **kwargs: -function(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", compile)
    return seen


def test_a_function_is_compiled_once_with_its_options_when_it_is_called(compilations: list[dict[str, Any]]) -> None:
    @compiled_at_first_call
    def plain(x: int, y: int = 1) -> int:
        """Said of it."""
        return x + y

    @compiled_at_first_call(dynamic=True)
    def dynamic(x: int) -> int:
        return x

    assert compilations == []
    assert (plain.__name__, plain.__doc__) == ("plain", "Said of it.")
    assert [plain(1), plain(2, y=3), dynamic(7)] == [-2, -5, -7]
    assert compilations == [{}, {"dynamic": True}]
