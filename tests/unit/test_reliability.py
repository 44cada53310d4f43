"""docs/reliability.md names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")
SECTIONS = re.split(r"(?m)^## ", (ROOT / "docs" / "reliability.md").read_text())[1:]


@pytest.mark.parametrize("section", SECTIONS, ids=[section.splitlines()[0] for section in SECTIONS])
def test_every_promise_names_a_test_that_is_there(section: str) -> None:
    named = NAMED.findall(section)
    assert named
    assert len(named) == section.count("::test_")
    for file, test in named:
        assert f"\ndef {test}(" in (ROOT / file).read_text(), f"{file}::{test}"
