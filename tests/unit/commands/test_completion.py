"""Completion on TAB in the shells themselves, installed as docs/commands.md says; one that is not here is skipped."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.commands.test_cli import ROOT

pytestmark = pytest.mark.processes

_ANSWER_S = 60.0


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """One where `aligner` is found, as an installation has it."""
    program = tmp_path / "aligner"
    program.write_text(f'#!{sys.executable}\nimport runpy\nrunpy.run_module("nemo_aligner", run_name="__main__")\n')
    program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "TERM": "dumb"}


def shell(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} here")
    return found


def said(command: list[str], environment: dict[str, str], folder: Path) -> list[str]:
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=_ANSWER_S)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_bash_asks_the_command_itself(environment: dict[str, str], tmp_path: Path) -> None:
    typed = "COMP_LINE='aligner sample data.n'; COMP_CWORD=2; COMP_POINT=21; hydra_bash_completion"
    command = f'eval "$(aligner -sc install=bash)"; complete -p aligner; {typed}; echo "${{COMPREPLY[@]}}"'
    assert said(["bash", "-c", command], environment, tmp_path) == [
        "complete -o default -o nospace -F hydra_bash_completion aligner",
        "data.n= data.num_samples=",
    ]


def test_fish_offers_commands_keys_and_files_one_by_one(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "a_model.gguf").touch()
    offered = {
        "aligner sa": ["sample"],
        "aligner sample data.n": ["data.n=", "data.num_samples="],
        "aligner loop r": ["rest", "rs"],
        "aligner sample a_mod": [],
        "aligner sample gpt_model_file=./a_mod": ["gpt_model_file=./a_model.gguf"],
        "aligner import --input a_mod": ["a_model.gguf"],
    }
    asked = "; ".join(f"complete -C '{line}'; echo ." for line in offered)
    fish = [shell("fish"), "--no-config", "-c", f"aligner -sc install=fish | source; {asked}"]
    found = "\n".join(said(fish, environment, tmp_path)).split(".\n", len(offered) - 1)
    assert [text.removesuffix(".").split() for text in found] == list(offered.values())


def test_zsh_completes_what_is_typed(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "a_model.gguf").touch()
    terminal, own = pty.openpty()
    process = subprocess.Popen(
        [shell("zsh"), "-f", "-i"], stdin=own, stdout=own, stderr=own, env=environment, cwd=tmp_path,
        start_new_session=True,
    )  # fmt: skip
    os.close(own)
    try:
        os.write(terminal, b"autoload -Uz compinit && compinit -u -D; autoload -Uz bashcompinit && bashcompinit\n")
        os.write(terminal, b'eval "$(aligner -sc install=zsh)"; echo rea""dy\n')
        wait_for(terminal, "ready")
        for typed, whole in (
            ("aligner sam", "aligner sample"),
            ("aligner sample data.nu", "aligner sample data.num_samples="),
            ("aligner loop res", "aligner loop rest"),
            ("aligner import --input a_mod", "aligner import --input a_model.gguf"),
        ):
            os.write(terminal, f"{typed}\t".encode())
            wait_for(terminal, whole)
            os.write(terminal, b"\x15")  # away with the line
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


def wait_for(terminal: int, text: str) -> None:
    """Read what a terminal shows until it shows `text`."""
    shown, end = "", time.monotonic() + _ANSWER_S
    while text not in re.sub(r"\x1b\[\?\d+[hl]", "", shown):
        ready, _, _ = select.select([terminal], [], [], max(0.0, end - time.monotonic()))
        assert ready, f"{text!r} does not come: {shown!r}"
        shown += os.read(terminal, 1 << 16).decode(errors="replace")
