"""What an import and an export take of memory, as processes of their own."""

from __future__ import annotations

import json
from pathlib import Path

from tests.functional.conftest import run


def test_memory_follows_the_largest_file_and_not_the_model(tmp_path: Path) -> None:
    sizes = ("--megabytes", "200", "--shard-megabytes", "20")
    run("python", "scripts/bench/large_checkpoints.py", *sizes, "--folder", str(tmp_path))
    found = json.loads((tmp_path / "large_checkpoints.json").read_text())
    assert found["model_mb"] > 180
    for step in ("import", "export"):
        # less than twice the largest file, and what allocators keep; the whole model would be 200
        assert 0 < found[step]["grown_mb"] < 2 * found["largest_file_mb"] + 80, found
