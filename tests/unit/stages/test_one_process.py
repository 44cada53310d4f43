"""A command that one process runs among others begins and ends as one of its own would."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from nemo_aligner.stages.one_process import run

PROGRAM = """
import os, sys
from pathlib import Path
Path(os.environ["NOTE"]).write_text(repr((__name__, sys.argv[1:], sys.orig_argv[1:], os.environ.get("LEFT"))))
os.environ["LEFT"] = "by a command"
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module `noted`, and what it notes of itself."""
    (tmp_path / "noted.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("argv", "orig_argv"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    return tmp_path / "note"


def test_every_command_has_its_own_arguments_and_environment(program: Path) -> None:
    before = dict(os.environ)
    for word in ("a b", "x=1"):
        run([f"NOTE={program}", "-m", "noted", "0", word])
        assert program.read_text() == repr(("__main__", ["0", word], ["-m", "noted", "0", word], None))
        assert dict(os.environ) == before


def test_a_command_that_fails_ends_the_process_with_its_status(program: Path) -> None:
    with pytest.raises(SystemExit, match=r"^75$"):
        run([f"NOTE={program}", "-m", "noted", "75"])
