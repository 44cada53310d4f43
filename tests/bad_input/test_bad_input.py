"""The corpus of cases/: what is wrong is one line, to the letter, with exit status 1, and nothing is written.

- run: launch_random_sampler data.n=0           a script's main; `-` before its name: without what else it needs
  line: 'data.n: 0 is below 1'
- read: {jsonl: {path: bad.jsonl}}              or a reader of readers.py
  files: {bad.jsonl: '{'}                       put there before; see made.py
  environment: {RANK: x}
  process: true                                 in a process of its own, which also shows that there is no traceback
  line: ...                                     `{here}` is the folder, `{python}` this interpreter,
                                                    `{shapes}` those of conf/model, `{any}` one word
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_aligner.config.entry import one_line_errors
from nemo_aligner.config.folders import model_shapes
from tests.bad_input import made, readers

Case = dict[str, Any]
FOLDER = Path(__file__).with_name("cases")
CASES = [
    pytest.param(case, id=f"{path.stem}-{number}", marks=[pytest.mark.processes] if case.get("process") else [])
    for path in sorted(FOLDER.glob("*.yaml"))
    for number, case in enumerate(yaml.safe_load(path.read_text()), 1)
]


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("right")
    made.right(folder)
    return folder


def state_of(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_nothing_is_written(
    case: Case, right: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "here"
    shutil.copytree(right, here)
    for name, content in case.get("files", {}).items():
        made.put(here / name, content)
    monkeypatch.chdir(here)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HYDRA_FULL_ERROR": "1", **case.get("environment", {})}.items():
        monkeypatch.setenv(name, value)
    before = state_of(here)
    with monkeypatch.context() as patched:  # no longer: pytest has files of its own there
        patched.setattr(tempfile, "tempdir", case.get("temporary", str(here / "temporary")))
        status, said = found(case, monkeypatch, capfd)
    rank = f"[rank {os.environ['RANK']}] " if os.environ.get("RANK", "0") != "0" else ""
    names = {"here": str(here), "python": sys.executable, "shapes": ", ".join(model_shapes())}
    wanted = re.escape(f"{rank}error: {case['line']}\n").replace(r"\{any\}", r"\S+")
    for name, value in names.items():
        wanted = wanted.replace(rf"\{{{name}\}}", re.escape(value))
    assert re.fullmatch(wanted, said), f"{said!r} is not {case['line']!r}"
    assert status == 1
    assert state_of(here) == before


def found(case: Case, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """Exit status, and what was said on stderr."""
    if "read" in case:
        [(reader, given)] = case["read"].items()
        with pytest.raises(SystemExit) as leaving, one_line_errors():
            readers.READERS[reader](**given)
        return leaving.value.code, capfd.readouterr().err
    command = shlex.split(case["run"])
    if case.get("process"):
        name = readers.SCRIPTS[command[0].lstrip("-")]
        done = subprocess.run(
            [sys.executable, str(name), *readers.arguments(command)], capture_output=True, text=True, timeout=120
        )
        return done.returncode, done.stderr
    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(SystemExit) as leaving, one_line_errors():
        readers.run(command)
    return leaving.value.code, capfd.readouterr().err


def test_the_corpus_is_large_and_no_case_is_there_twice() -> None:
    cases = [case for param in CASES for case in param.values]
    assert len(cases) >= 150
    asked = [repr({name: value for name, value in case.items() if name != "line"}) for case in cases]
    assert len(set(asked)) == len(asked)
    assert sum("process" in case for case in cases) >= 5
    assert not [case for case in cases if re.search(r"Traceback|Error\(|object at 0x|NoneType", case["line"])]
