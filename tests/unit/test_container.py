"""The Dockerfiles' lines: run in an empty folder as far as pip is not needed, and consistent with the tree."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import tomllib
from pathlib import Path

import pytest

from scripts.bench.container import Image, Line, needs_root, read, sources
from scripts.beside_torch import constraints, name_of, requirements

ROOT = Path(__file__).resolve().parents[2]
FILES = ["Dockerfile", "Dockerfile.gpu"]


@pytest.mark.parametrize("file", FILES)
def test_what_needs_root_is_done_before_the_user_who_is_not(file: str) -> None:
    lines = read(ROOT / file)
    user = max(i for i, line in enumerate(lines) if line.name == "USER")
    assert lines[user].text != "root"
    assert [line for line in lines[user:] if needs_root(line)] == []
    assert all(needs_root(line) for line in lines[:user] if line.name == "RUN")
    owner = lines[user].text
    assert any(
        f"useradd --create-home {owner}" in line.text and f"install -d -o {owner}" in line.text for line in lines
    )
    assert Line("COPY", f"--chown={owner} . .") in lines


@pytest.mark.parametrize("file", FILES)
def test_every_file_of_the_tree_that_a_line_names_is_copied(file: str) -> None:
    copied = set(sources())
    named = {name for line in read(ROOT / file) for name in re.findall(r"(?:scripts|examples)/[\w/]+\.\w+", line.text)}
    assert named
    assert named <= copied
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not [name for name in copied if name.split("/")[0] in ignored]


def test_beside_torch_is_everything_else_in_its_pinned_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {*requirements(), "torch==2.13.0"} == {
        *project["dependencies"],
        *(line for extra in ("server", "hf", "quickstart") for line in project["optional-dependencies"][extra]),
    }
    *rest, torch = constraints("2.12.1+cu130", ["sympy>=1.13.3", "jinja2", 'nvidia-cublas==13.0; extra == "x"'])
    assert torch == "torch==2.12.1+cu130"
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    assert {name_of(pin) for pin in set(pins) - set(rest)} == {"torch", "sympy", "jinja2"}
    assert {name_of(line) for line in requirements()} <= {name_of(line) for line in rest} | {"jinja2"}
    with pytest.raises(SystemExit, match=r"torch 2\.10\.0 is older than 2\.11"):
        constraints("2.10.0", [])


@pytest.mark.processes
def test_the_lines_of_the_cpu_image_lead_to_a_script_that_answers(tmp_path: Path) -> None:
    """pip has nothing to do, as the environment is there: this one, under the stamp that says so."""
    image = Image(tmp_path, {"PATH": os.environ["PATH"], "HOME": str(tmp_path)})
    for line in read(ROOT / "Dockerfile"):
        if not needs_root(line):
            image.run(line)
        if line.name == "COPY":
            environment = tmp_path / "opt/nemo-aligner/.venv"
            environment.mkdir()
            for name in ("bin", "lib", "pyvenv.cfg"):
                (environment / name).symlink_to(Path(sys.prefix) / name)
            files = [ROOT / name for name in ("pyproject.toml", "constraints.txt", "scripts/test.sh")]
            stamp = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
            (environment / "installed").write_text(f"{stamp}  -\n")
    assert image.shell("pwd -P").strip() == str((tmp_path / "work").resolve())
    script = f"{tmp_path}/opt/nemo-aligner/examples/nlp/gpt/train_gpt_reinforce_actor.py"
    assert image.shell("command -v python").strip() == f"{tmp_path}/opt/nemo-aligner/.venv/bin/python"
    assert "gpt_rs_actor.yaml" in image.shell(f"python {script} --help")
