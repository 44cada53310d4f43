"""Unit tests take seconds: one that hangs fails, and the others go on."""

from __future__ import annotations

from pathlib import Path

import pytest

LIMIT_S = 60


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(LIMIT_S))
