"""`--help` says what every key means: it shows the YAML as it is written."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "examples/nlp/gpt").rglob("*.py")
    if "script(" in path.read_text()
)


class Answers:
    """What a script prints when it is run with some arguments."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, script: str, *arguments: str) -> str:
        self._monkeypatch.setattr("sys.argv", [script, *arguments])
        runpy.run_path(str(ROOT / script), run_name="__main__")
        return self._capsys.readouterr().out


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Answers:
    return Answers(monkeypatch, capsys)


def lines_of(script: str, name: str) -> list[str]:
    return (ROOT / script).parent.joinpath("conf", f"{name}.yaml").read_text().strip().splitlines()


def shows(text: str, lines: list[str]) -> bool:
    return "\n".join(lines) in text


def test_every_script_is_found() -> None:
    sample = "reward_server_of_your_own.py"  # the standard library alone
    found = [path for path in (ROOT / "examples/nlp/gpt").rglob("*.py") if path.name != sample]
    assert len(SCRIPTS) == len(found) > 0


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_what_the_script_does_and_its_yaml_with_all_comments(
    script: str, flag: str, answer: Answers
) -> None:
    source = (ROOT / script).read_text()
    [name] = re.findall(r'@script\("(\w+)"', source)
    text = answer(script, flag)
    assert text.startswith(source.split('"""')[1])
    assert shows(text, lines_of(script, name))
    for said in ("key=value", "--cfg job", "  trainer: cpu, gpu, gpu_node\n"):
        assert said in text


def test_help_shows_the_yamls_that_a_yaml_begins_from(answer: Answers) -> None:
    script = "examples/nlp/gpt/offline/evaluate_policy.py"
    assert shows(answer(script, "--help"), lines_of(script, "megatron_random_sampler"))


@pytest.mark.parametrize("name", ["--config-name=gpt_reinforce_actor", "-cn=gpt_reinforce_actor.yaml"])
def test_help_is_about_the_yaml_that_is_chosen(name: str, answer: Answers) -> None:
    script = "examples/nlp/gpt/train_gpt_reinforce_actor.py"
    text = answer(script, "trainer.devices=2", name, "--help")
    for part in ("gpt_reinforce_actor", "gpt_rs_actor"):
        assert shows(text, lines_of(script, part))


@pytest.mark.processes
@pytest.mark.parametrize("flags", [["--cfg", "job"], ["--help", f"--config-path={ROOT / 'examples/nlp/gpt/conf'}"]])
def test_other_flags_are_hydras(flags: list[str]) -> None:
    command = [sys.executable, "examples/nlp/gpt/train_gpt_sft.py", *flags]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "answer_only_loss: true\n" in done.stdout
