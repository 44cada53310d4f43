"""Unit tests take seconds: one that hangs fails, and the others go on. None leaves its logging to the next."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

LIMIT_S = 60


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(LIMIT_S))


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Hydra gives the root logger a handler that writes to the stdout of its test, which is closed afterwards.

    Every line would then be a logging fault with a traceback, and Python 3.11 cannot format one while another thread,
    such as the web server's, compiles a module.
    """
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture
def hashed_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the files that were read for their sums, one for each time."""
    paths: list[str] = []
    digest = hashlib.file_digest

    def noted(stream: Any, name: str) -> Any:
        paths.append(str(stream.name))
        return digest(stream, name)

    monkeypatch.setattr(hashlib, "file_digest", noted)
    return paths
