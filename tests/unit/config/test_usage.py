"""`--help` says what every key means: it shows the YAML as it is written."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_aligner.config.usage import usage

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "examples/nlp/gpt").rglob("*.py")
    if "nemo_aligner.commands" in path.read_text()
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


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """A folder of YAMLs, each but the first beginning from another; beside it one of groups."""
    for name, text in {
        "conf/own": "a: 1 # first\n\n",
        "conf/other": "defaults:\n  - own\n  - _self_\n  - group: b\nb: é\n",
        "conf/third": "defaults: [other]\n",
        "shared/optim/cosine": "",
        "shared/optim/constant": "",
        "shared/model/tiny": "",
    }.items():
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "conf"


OWN = "# own.yaml\n\na: 1 # first"
OTHER = "# other.yaml\n\ndefaults:\n  - own\n  - _self_\n  - group: b\nb: é"
THIRD = "# third.yaml\n\ndefaults: [other]"
HOW = """\
Override a key with key=value (key=[1,2], key=null), drop one with ~key, take a group of conf/ with +trainer=cpu:
  model: tiny
  optim: constant, cosine
--cfg job prints the configuration as it would be used; --hydra-help, what else the command line takes."""


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--help"], [OWN]),
        (["a=2", "-h", "b=3"], [OWN]),
        (["--help", "--config-name=other"], [OTHER, OWN]),
        (["--help", "-cn", "other.yaml"], [OTHER, OWN]),
        (["--config-name", "third", "--help"], [THIRD, OTHER, OWN]),
        ([], None),
        (["a=2", "--config-name=other"], None),
        (["--hel"], None),
        (["--help", "--config-name=none"], None),
        (["--help", "--config-path=/conf"], None),
        (["--help", "-cp", "/conf"], None),
        (["--help", "--config-dir", "/conf"], None),
        (["--help", "-cd=/conf"], None),
    ],
)
def test_help_is_the_scripts_own_words_then_how_keys_are_given_then_the_yamls(
    conf: Path, arguments: list[str], shown: list[str] | None
) -> None:
    found = usage(arguments, "\n Trains.\n", conf, "own", conf.parent / "shared")
    assert found == (None if shown is None else "\n\n".join(["Trains.", HOW, *shown]))


def test_a_script_without_words_of_its_own_has_help_too(conf: Path) -> None:
    assert usage(["-h"], None, conf, "own", conf.parent / "shared") == "\n\n".join(["", HOW, OWN])


@pytest.mark.processes
@pytest.mark.parametrize("flags", [["--cfg", "job"], ["--help", f"--config-path={ROOT / 'examples/nlp/gpt/conf'}"]])
def test_other_flags_are_hydras(flags: list[str]) -> None:
    command = [sys.executable, "examples/nlp/gpt/train_gpt_sft.py", *flags]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "answer_only_loss: true\n" in done.stdout
