"""A Python without the requirements is told in one line which one to use."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_aligner.config import requirements

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = sorted(
    path.relative_to(ROOT)
    for folder in ("examples/nlp/gpt", "examples/nlp/gpt/offline", "scripts")
    for path in (ROOT / folder).glob("*.py")
    if "nemo_aligner.commands" in path.read_text()
)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the package seems to lie, in a Python without torch and megatron."""
    monkeypatch.setattr(requirements, "__file__", str(tmp_path / "nemo_aligner" / "config" / "requirements.py"))
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("torch", "megatron") else found(name)
    )
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/test.sh").touch()
    return tmp_path


@pytest.mark.parametrize("ready", [False, True])
def test_what_a_python_lacks_is_named_with_the_environment_that_has_it(clone: Path, ready: bool) -> None:
    make = f"bash {clone}/scripts/test.sh --setup-only makes its environment; then "
    if ready:
        (clone / ".venv" / "bin").mkdir(parents=True)
        (clone / ".venv" / "bin" / "python").touch()
        make = ""
    with pytest.raises(SystemExit) as caught:
        requirements.check_python()
    line = f"error: {sys.executable} has no torch, megatron; {make}source {clone}/.venv/bin/activate"
    assert caught.value.code == line


def test_what_a_python_lacks_where_the_package_was_installed_without_it_is_named_too(clone: Path) -> None:
    (clone / "scripts/test.sh").unlink()
    with pytest.raises(SystemExit) as caught:
        requirements.check_python()
    line = f"error: {sys.executable} has no torch, megatron; {sys.executable} -m pip install nemo-aligner brings"
    assert str(caught.value.code).startswith(line)


def test_a_python_that_lacks_nothing_goes_on() -> None:
    requirements.check_python()


@pytest.mark.processes
@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_a_python_without_the_requirements_is_told_which_one_has_them(script: Path, tmp_path: Path) -> None:
    bare = [sys.executable, "-S", "-E", str(ROOT / script)]  # without its site-packages
    done = subprocess.run(bare, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {sys.executable} has no hydra, omegaconf, torch, megatron; ")
    assert done.stderr.endswith(f"source {ROOT}/.venv/bin/activate\n")
    assert done.stderr.count("\n") == 1
