"""Kills at random moments, as scripts/bench/crash.py gives them, leave nothing lost, doubled or different."""

from __future__ import annotations

import json
from pathlib import Path

from tests.functional.conftest import run


def test_ten_kills_of_the_sampler_and_of_sft_change_nothing(tmp_path: Path) -> None:
    """scripts/bench/crash.py without --jobs kills all the others too."""
    report = tmp_path / "crash.json"
    done = run(
        "python", "scripts/bench/crash.py", "--kills", "10", "--seed", "3", "--jobs", "sampler,sft",
        "--json", str(report), check=False,
    )  # fmt: skip
    found = json.loads(report.read_text())
    counts = {name: found[name] for name in ("kills", "lost", "duplicated", "different")}
    assert counts == {"kills": 10, "lost": 0, "duplicated": 0, "different": 0}, done.stdout
    assert done.returncode == 0
