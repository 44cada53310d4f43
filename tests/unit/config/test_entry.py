"""How a script starts: its YAML with what the command line says, in the folder it is run in; faults are one line."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_aligner.config.entry import _with_overrides, one_line_errors, script
from nemo_aligner.errors import AlignerError, ConfigError, StoppedEarly

YAML = "a: 1\nb: text\ntrainer:\n  devices: 1\ndefaults:\n  - _self_\n"


class Script:
    """Scripts with a YAML of their own; what each was given, and how it ended."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.conf, self.work = folder / "conf", folder / "work"
        self.conf.mkdir()
        self.work.mkdir()
        (self.conf / "own.yaml").write_text(YAML)
        (self.conf / "other.yaml").write_text("a: 7\ndefaults:\n  - own\n  - _self_\n")
        self._monkeypatch, self._capsys = monkeypatch, capsys
        monkeypatch.chdir(self.work)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "")
        monkeypatch.delenv("RANK", raising=False)
        self.said = ""

    def __call__(
        self, *arguments: str, aliases: Any = None, fault: BaseException | None = None
    ) -> tuple[int | str | None, Any]:
        """Exit status and the config that the script got."""
        given: list[Any] = []

        @script("own", self.conf, aliases)
        def main(cfg: DictConfig) -> None:
            given.append(OmegaConf.to_container(cfg, resolve=True))
            if fault is not None:
                raise fault

        self._monkeypatch.setattr("sys.argv", ["script", *arguments])
        status: int | str | None = 0
        try:
            main()
        except SystemExit as leaving:
            status = leaving.code
        out, self.said = self._capsys.readouterr()
        assert "Traceback" not in out + self.said
        return status, (given or [None])[0]


def test_what_the_disk_says_of_itself_is_one_line_and_other_faults_keep_their_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fault = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/some/file")
    with pytest.raises(SystemExit) as leaving, one_line_errors():
        raise fault
    assert leaving.value.code == 1
    assert capsys.readouterr().err == "error: /tmp/some/file: No space left on device\n"
    with pytest.raises(ConnectionRefusedError), one_line_errors():
        raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    return Script(tmp_path, monkeypatch, capsys)


DEFAULTS = {"a": 1, "b": "text", "trainer": {"devices": 1}}


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        ([], {}),
        (["a=2", "b=x"], {"a": 2, "b": "x"}),
        (["a=2", "~b"], {"a": 2, "b": None}),
        (["~b", "a=2"], {"a": 2, "b": None}),
        (["--config-name=other"], {"a": 7}),
        (["--config-name=other", "b=x"], {"a": 7, "b": "x"}),
        (["b=x", "--config-name=other"], {"a": 7, "b": "x"}),
        (["--config-name", "other", "b=x"], {"a": 7, "b": "x"}),
        (["a=${multiply:3,4}"], {"a": 12}),
    ],
)
def test_a_script_gets_its_yaml_with_the_overrides_wherever_its_flags_stand(
    own: Script, arguments: list[str], changes: dict[str, Any]
) -> None:
    expected = {key: value for key, value in {**DEFAULTS, **changes}.items() if value is not None}
    assert own(*arguments) == (0, expected)
    assert list(own.work.iterdir()) == [], "nothing is made in the folder it is run in"


def test_a_group_that_scripts_share_is_found_from_any_folder(own: Script) -> None:
    status, found = own("+trainer=cpu")
    assert status == 0
    assert found["trainer"]["accelerator"] == "cpu"


def test_older_names_of_keys_need_no_plus(own: Script) -> None:
    status, found = own("old.a=3", aliases={"old": "new"})
    assert (status, found["old"]) == (0, {"a": 3})
    assert own("old.a=3")[0] == 1


def test_help_is_an_answer_without_a_run(own: Script, capsys: pytest.CaptureFixture[str]) -> None:
    own._capsys = capsys
    monkeypatch = own._monkeypatch
    monkeypatch.setattr("sys.argv", ["script", "--help"])
    script("own", own.conf)(lambda cfg: pytest.fail("it runs"))()
    found = capsys.readouterr().out
    assert found.startswith(f"{(__doc__ or '').strip()}\n")
    assert found.endswith("\na=1\nb=text\ntrainer.devices=1\n")
    assert "trainer: cpu, gpu, gpu_node" in found


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trainer.devises=2"], "error: trainer.devises: no such key, did you mean trainer.devices\n"),
        (["a"], "error: a: not key=value\n"),
    ],
)
def test_an_override_that_cannot_be_is_one_line(own: Script, arguments: list[str], line: str) -> None:
    assert own(*arguments) == (1, None)
    assert own.said == line


def test_what_hydra_finds_wrong_is_one_line_too(own: Script) -> None:
    assert own("--config-name=none")[0] == 1
    assert own.said.startswith("error: Cannot find primary config 'none'")
    assert own.said.count("\n") == 1


STOPPED = "stopped early: SIGTERM at step 3; run the same command again to go on\n"


@pytest.mark.parametrize(
    ("fault", "status", "line"),
    [
        (ConfigError("3 is\nbelow  4", "data.n"), 1, "error: data.n: 3 is below 4\n"),
        (AlignerError("no disk"), 1, "error: no disk\n"),
        (StoppedEarly("SIGTERM at step 3"), 75, STOPPED),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
@pytest.mark.parametrize(("rank", "begins"), [(None, ""), ("0", ""), ("3", "[rank 3] ")])
def test_a_fault_is_one_line_and_a_status(
    fault: BaseException, status: int, line: str, rank: str | None, begins: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as caught, one_line_errors():
        raise fault
    assert (caught.value.code, capsys.readouterr().err) == (status, begins + line)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_where_nothing_is_to_save_is_exit_status_75_too(
    own: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    before = signal.getsignal(number)

    @script("own", own.conf)
    def main(cfg: DictConfig) -> None:
        os.kill(os.getpid(), number)
        pytest.fail("it goes on")

    monkeypatch.setattr("sys.argv", ["script"])
    with pytest.raises(SystemExit) as leaving:
        main()
    assert leaving.value.code == 75
    assert capsys.readouterr().err == f"stopped early: {number.name}; run the same command again to go on\n"
    assert signal.getsignal(number) == before


def test_a_fault_of_the_run_is_told_so(own: Script) -> None:
    assert own(fault=StoppedEarly("SIGTERM at step 3")) == (75, DEFAULTS)
    assert own.said == STOPPED


def test_a_fault_that_is_none_of_the_users_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), one_line_errors():
        _ = 1 // 0


def test_of_a_fault_of_the_config_the_key_is_kept_and_hints_go(own: Script) -> None:
    (own.conf / "own.yaml").write_text("a: ${nowhere}\n")
    assert own() == (1, None)
    assert own.said == "error: Interpolation key 'nowhere' not found full_key: a\n"


def test_a_fault_with_a_cause_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    cause = OmegaConfBaseException("the cause\nobject_type=X")
    with pytest.raises(SystemExit), one_line_errors():
        raise OmegaConfBaseException("the fault\n    full_key: a\n  reference_type=Y\n\n") from cause
    assert capsys.readouterr().err == "error: the fault full_key: a the cause\n"


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ([], ["+"]),
        (["a=1", "b=2"], ["+", "a=1", "b=2"]),
        (["--cfg", "job", "a=1"], ["--cfg", "job", "+", "a=1"]),
        (["--config-name=x", "~a", "b=2"], ["--config-name=x", "+", "~a", "b=2"]),
        (["--config-name=x"], ["--config-name=x", "+"]),
        (["a=1", "--cfg=job"], ["+", "a=1", "--cfg=job"]),
    ],
)
def test_overrides_of_our_own_stand_with_those_of_the_command_line(arguments: list[str], found: list[str]) -> None:
    assert _with_overrides(arguments, ["+"]) == found
