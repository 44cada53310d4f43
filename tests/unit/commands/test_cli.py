"""`aligner` finds every command by its name, imports no other, and completes what is typed."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from nemo_aligner.commands import cli, plan
from nemo_aligner.planning.config import PlanConfig

ROOT = Path(__file__).resolve().parents[3]


def test_every_command_has_a_module_with_a_main_and_a_summary() -> None:
    for name, module in cli.COMMANDS.items():
        spec = importlib.util.find_spec(module)
        assert spec is not None, name
        assert spec.origin is not None
        assert re.search(r"^def main\(", Path(spec.origin).read_text(), re.M), module
        assert cli.summary(module), module
    assert set(cli.CONFIGURED) <= set(cli.COMMANDS)


def test_every_module_of_the_folder_is_a_command() -> None:
    found = {path.stem for path in (ROOT / "nemo_aligner/commands").glob("*.py")} - {"__init__", "cli"}
    assert found == {module.rpartition(".")[2] for module in cli.COMMANDS.values() if ".commands." in module}


def test_the_planner_explains_each_of_its_keys_with_its_default() -> None:
    found = {key.name: key for key in plan.plan_keys()}
    assert [*found] == [field.name for field in dataclasses.fields(PlanConfig)]
    assert (found["gpus_per_node"].default, found["gpus"].default, found["model"].default) == ("8", "null", "???")
    assert all(key.comment for key in found.values())


@pytest.mark.parametrize("name", sorted({*cli.COMMANDS} - {*cli.CONFIGURED, "plan", "loop"}))
def test_every_option_is_explained(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Parsed(Exception):
        pass

    def parsed(parser: argparse.ArgumentParser, *_: object) -> None:
        assert [action.dest for action in parser._actions if not action.help] == []
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(sys, "argv", ["aligner", name])
    with pytest.raises(Parsed):
        cli.main()


@pytest.mark.processes
def test_help_of_no_command_imports_what_is_slow() -> None:
    program = """
import contextlib, io, sys
from nemo_aligner.commands import cli
def said(*arguments):
    sys.argv = ["aligner", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        cli.main()
    assert out.getvalue()
said("--help")
print(*{"hydra", "yaml", "numpy"} & set(sys.modules))
for command in cli.COMMANDS:
    said(command, "--help")
print(*{"torch", "megatron", "transformers", "datasets", "lightning"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("\n\n", "")


def test_the_command_is_what_the_project_installs() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"] == {
        "aligner": "nemo_aligner.__main__:main"
    }


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["aligner", *arguments])
    cli.main()
    return capsys.readouterr().out


@pytest.mark.parametrize("arguments", [(), ("-h",), ("--help",)])
def test_help_names_every_command_and_what_it_does(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(monkeypatch, capsys, *arguments)
    for name, module in cli.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(cli.summary(module))}$", text, re.M)


def test_the_version_is_that_of_the_installation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "version", {"nemo-aligner": "1.2"}.__getitem__)
    assert said(monkeypatch, capsys, "--version") == "nemo-aligner 1.2\n"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("lable", "error: aligner lable: no such command, did you mean label"),
        ("x", "error: aligner x: no such command; see --help"),
    ],
)
def test_another_name_is_refused_with_the_nearest(name: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["aligner", name])
    with pytest.raises(SystemExit, match=f"^{line}$"):
        cli.main()


@pytest.mark.parametrize(
    ("line", "offered", "not_offered"),
    [
        ("aligner sa", "sample", "data.n="),
        ("aligner sample data.m", "data.micro_batch_size=", "sample"),
        ("aligner sft +trainer=", "+trainer=cpu", "model."),
        ("aligner loop ", "rs", "sample"),
        ("aligner loop rest PR", "PROMPTS_PATH=", "sample"),
    ],
)
def test_what_is_typed_is_completed(
    line: str, offered: str, not_offered: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    words = said(monkeypatch, capsys, "-sc", "query=bash").split()
    assert offered in words
    assert not_offered not in words


@pytest.mark.processes
@pytest.mark.parametrize(
    "words",
    [["--help"], ["sample", "--help"], ["plan", "model=llama3_8b", "gpus=8", "gpu_memory_gb=80"]],
)
def test_a_reader_that_leaves_early_ends_a_command_without_a_word(words: list[str]) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "nemo_aligner", *words]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")
