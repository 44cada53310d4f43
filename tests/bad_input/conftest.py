"""Commands leave no logging to the next."""

from __future__ import annotations

from tests.unit.conftest import logging_as_before  # noqa: F401
