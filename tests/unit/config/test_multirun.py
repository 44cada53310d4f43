"""A multirun: what is swept names a job's folder, and no two jobs write the same place."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_aligner.config import multirun
from nemo_aligner.config.multirun import output_in, run_job, sweep_overrides
from nemo_aligner.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
NAMED = "hydra.job.config.override_dirname.exclude_keys="


@pytest.mark.parametrize(
    ("arguments", "fixed"),
    [
        (["-m", "data.n=1,2", "seed=3"], "['seed']"),
        (["-m", "+a=b", "~c", "++d.e='x,y'", "f=range(3)"], "['a','c','d.e']"),
        (["-m", "data.n=[1,2],[3]", "data.file_names=[a,b]"], "['data.file_names']"),
        (["-m", "--config-name=x", "n=choice(1,2)"], "[]"),
        (["-m", "a=1", "b={"], "['a']"),
    ],
)
def test_what_is_the_same_for_all_jobs_is_not_in_their_names(arguments: list[str], fixed: str) -> None:
    assert sweep_overrides("own", arguments)[-1] == NAMED + fixed


@pytest.mark.parametrize(
    ("key", "value", "override"),
    [
        ("output_file", "out.jsonl", ["++output_file='sweep/n=1/out.jsonl'"]),
        ("output_file", "a/b's.jsonl", ["++output_file='sweep/n=1/a/b\\'s.jsonl'"]),
        ("output_file", None, []),
        ("exp_manager.explicit_log_dir", None, ["++exp_manager.explicit_log_dir='sweep/n=1'"]),
        ("exp_manager.explicit_log_dir", "rm", ["++exp_manager.explicit_log_dir='sweep/n=1/rm'"]),
    ],
)
def test_a_relative_output_lies_in_the_jobs_folder(key: str, value: str | None, override: list[str]) -> None:
    assert output_in(Path("sweep/n=1"), key, value) == override


def test_an_absolute_output_is_refused_as_every_job_would_write_it() -> None:
    with pytest.raises(ConfigError, match=r"^output_file: every job of a multirun would write /a/b; give a relative"):
        output_in(Path("sweep/n=1"), "output_file", "/a/b")


@pytest.mark.parametrize(
    ("output", "environment", "line"),
    [
        (None, {}, "-m: this command serves until it is stopped"),
        ("output_file", {"RANK": "1"}, "-m: each job starts its own processes"),
        ("output_file", {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}, "-m: each job starts its own processes"),
    ],
)
def test_where_jobs_cannot_run_one_after_another_they_are_refused(
    output: str | None, environment: dict[str, str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    job: Any = SimpleNamespace(sweep=SimpleNamespace(dir="sweep", subdir="n=1"))
    monkeypatch.setattr(multirun.HydraConfig, "get", lambda: job)
    with pytest.raises(ConfigError, match=f"^{line}"):
        run_job({}, output, [])  # type: ignore[arg-type]


ATTENDS = "import sys; from nemo_aligner.config.multirun import _attended; sys.exit(_attended(sys.argv[1:]))"


def attending(script: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", ATTENDS, "bash", "-c", script]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.mark.processes
@pytest.mark.parametrize(("script", "status"), [("exit 3", 3), ("kill -KILL $$", 137)])
def test_a_multirun_ends_as_its_job_did(script: str, status: int) -> None:
    assert attending(script).wait(timeout=30) == status


@pytest.mark.processes
def test_a_job_told_to_stop_saves_and_says_how_it_ended() -> None:
    process = attending("trap 'exit 75' TERM; echo ready; while true; do sleep 0.02; done")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75


def is_over(job: Path) -> bool:
    try:
        return "State:\tZ" in (job / "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.processes
def test_a_job_dies_with_the_multirun() -> None:
    process = attending("echo $$; while true; do sleep 0.02; done")
    assert process.stdout is not None
    job = Path("/proc") / process.stdout.readline().strip()
    process.kill()
    process.wait(timeout=30)
    assert process.stdout.read() == "", "the job held the pipe open for as long as it lived"
    until = time.monotonic() + 10  # the kernel closes what a process had open before it is gone
    while not is_over(job) and time.monotonic() < until:
        time.sleep(0.01)
    assert is_over(job)
