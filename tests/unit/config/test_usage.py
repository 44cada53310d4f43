"""`--help` says what every key means, with its default, as the YAML does."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_aligner.config.folders import CONF
from nemo_aligner.config.keys import Key, keys_of
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


def yaml_of(script: str) -> tuple[Path, str]:
    """Folder and name of the YAML of a script's command, and what the command says of itself."""
    [module] = re.findall(r"from nemo_aligner\.commands\.(\w+) import main", (ROOT / script).read_text())
    [(name, folder)] = re.findall(r'@script\("(\w+)", CONF / "(\w+)"', command(module))
    return CONF / folder, name


def command(module: str) -> str:
    return (ROOT / f"nemo_aligner/commands/{module}.py").read_text()


def shows(text: str, conf: Path, name: str) -> bool:
    """Whether each key is there with its default, followed by its comment, folded as it may be."""
    plain = " ".join(text.split())
    return all(" ".join(f"{key.name}={key.default} {key.comment}".split()) in plain for key in valued(conf, name))


def valued(conf: Path, name: str) -> list[Key]:
    return [key for key in keys_of(conf, name) if key.default is not None]


def test_every_script_is_found() -> None:
    sample = "reward_server_of_your_own.py"  # the standard library alone
    found = [path for path in (ROOT / "examples/nlp/gpt").rglob("*.py") if path.name != sample]
    assert len(SCRIPTS) == len(found) > 0


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_what_the_script_does_and_every_key_with_default_and_meaning(
    script: str, flag: str, answer: Answers
) -> None:
    conf, name = yaml_of(script)
    text = answer(script, flag)
    [module] = re.findall(r"commands\.(\w+) import", (ROOT / script).read_text())
    assert text.startswith(command(module).split('"""')[1])
    assert shows(text, conf, name)
    for said in ("key=value", "--cfg job", f"# {name}.yaml\n", "  trainer: cpu, gpu, gpu_node\n"):
        assert said in text


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_key_is_left_unexplained(script: str) -> None:
    assert [key.name for key in valued(*yaml_of(script)) if not key.comment] == []


def test_help_shows_the_keys_of_the_yamls_that_a_yaml_begins_from(answer: Answers) -> None:
    text = answer("examples/nlp/gpt/offline/evaluate_policy.py", "--help")
    assert "\ninference.temperature=1.0 " in text
    assert "\npolicy_files=??? " in text
    assert "data.max_seq_length=4096 " in text, "its own default"
    assert "data.max_seq_length=2048" not in text


@pytest.mark.parametrize("name", ["--config-name=gpt_reinforce_actor", "-cn=gpt_reinforce_actor.yaml"])
def test_help_is_about_the_yaml_that_is_chosen(name: str, answer: Answers) -> None:
    text = answer("examples/nlp/gpt/train_gpt_reinforce_actor.py", "trainer.devices=2", name, "--help")
    assert shows(text, CONF / "gpt", "gpt_reinforce_actor")
    assert "\nname=megatron_gpt_reinforce_actor " in text


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """A folder of YAMLs, each but the first beginning from another; beside it one of groups."""
    for name, text in {
        "conf/own": "a: 1 # first\nmodel:\n  optim:\n    lr: 2\n\n",
        "conf/other": "defaults:\n  - own\n  - _self_\n  - group: b\nb: é\n",
        "conf/third": "defaults: [other]\n",
        "shared/optim/cosine": "",
        "shared/optim/constant": "",
        "shared/model/tiny": "",
        "shared/trainer/cpu": "",
    }.items():
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "conf"


OWN, OTHER, THIRD = (f"# {name}.yaml" for name in ("own", "other", "third"))
A, B = f"{'a=1':44}first\nmodel.optim.lr=2", "b=é"
HOW = """\
Override a key with key=value (key=[1,2], key=null), drop one with ~key, take a group of conf/ with +trainer=cpu:
  optim@model.optim: constant, cosine
-m key=4,8 runs it with each value, one after another, and puts what each writes into a folder of multirun/; --cfg job
prints the configuration as it would be used; --hydra-help, what else the command line takes. Keys (???: required):"""


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--help"], [OWN, HOW, A]),
        (["a=2", "-h", "b=3"], [OWN, HOW, A]),
        (["--help", "--config-name=other"], [OTHER, OWN, HOW, f"{A}\n{B}"]),
        (["--help", "-cn", "other.yaml"], [OTHER, OWN, HOW, f"{A}\n{B}"]),
        (["--config-name", "third", "--help"], [THIRD, OTHER, OWN, HOW, f"{A}\n{B}"]),
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
def test_help_is_the_scripts_own_words_then_the_yamls_then_how_keys_are_given_then_the_keys(
    conf: Path, arguments: list[str], shown: list[str] | None
) -> None:
    found = usage(arguments, "\n Trains.\n", conf, "own", conf.parent / "shared")
    assert found == (None if shown is None else "\n\n".join(["Trains.", *shown]))


def test_a_script_without_words_of_its_own_has_help_too(conf: Path) -> None:
    assert usage(["-h"], None, conf, "own", conf.parent / "shared") == "\n\n".join(["", OWN, HOW, A])


@pytest.mark.processes
@pytest.mark.parametrize("flags", [["--cfg", "job"], ["--help", f"--config-path={ROOT / 'examples/nlp/gpt/conf'}"]])
def test_other_flags_are_hydras(flags: list[str]) -> None:
    command = [sys.executable, "examples/nlp/gpt/train_gpt_sft.py", *flags]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "answer_only_loss: true\n" in done.stdout
