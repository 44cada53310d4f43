"""A Python without the requirements is told in one line which one to use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = sorted(
    path.relative_to(ROOT)
    for folder in ("examples/nlp/gpt", "examples/nlp/gpt/offline", "scripts")
    for path in (ROOT / folder).glob("*.py")
    if "nemo_aligner.config" in path.read_text()
)


@pytest.mark.processes
@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_a_python_without_the_requirements_is_told_which_one_has_them(script: Path, tmp_path: Path) -> None:
    bare = [sys.executable, "-S", "-E", str(ROOT / script)]  # without its site-packages
    done = subprocess.run(bare, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {sys.executable} has no hydra, omegaconf, torch, megatron; ")
    assert done.stderr.endswith(f"source {ROOT}/.venv/bin/activate\n")
    assert done.stderr.count("\n") == 1
