"""A stage stops at its time limit and when it is told to, on every rank, and its siblings hear of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from nemo_aligner.engine.processes import launch
from nemo_aligner.errors import ConfigError
from nemo_aligner.stages import run_control
from nemo_aligner.stages.run_control import RunControl, StopSignal, parse_duration
from tests.fakes import OneProcess

ECHO = """
import signal, sys, time
def told(number, frame):
    print(signal.Signals(number).name, flush=True)
    sys.exit()
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, told)
print("ready", flush=True)
time.sleep(30)
"""


@pytest.fixture
def sibling(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A rank that this process started."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ECHO], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    monkeypatch.setattr(launch, "_siblings", [process])
    yield process
    process.kill()
    process.communicate()


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_a_reason_to_stop_and_reaches_the_sibling_ranks(
    sibling: subprocess.Popen[bytes], number: signal.Signals
) -> None:
    with RunControl(None, OneProcess()) as control:  # type: ignore[arg-type]
        assert control.stop_reason() is None
        assert control.replica_reason() is None
        os.kill(os.getpid(), number)
        assert control.stop_reason() == number.name
        assert control.replica_reason() == number.name
    assert sibling.communicate(timeout=10)[0].decode() == f"{number.name}\n"


@pytest.mark.processes
def test_a_sibling_that_is_gone_takes_no_signal_from_the_others(
    sibling: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    monkeypatch.setattr(launch, "_siblings", [gone, sibling])
    with StopSignal():
        os.kill(os.getpid(), signal.SIGTERM)
    assert sibling.communicate(timeout=10)[0] == b"SIGTERM\n"


class Sibling:
    """A rank by what is asked of it; `status` is None while it runs."""

    def __init__(self, status: int | None) -> None:
        self.status, self.told = status, list[int]()

    def poll(self) -> int | None:
        return self.status

    def send_signal(self, number: int) -> None:
        self.told.append(number)


@pytest.mark.parametrize(
    ("number", "passed"),
    [(signal.SIGTERM, signal.SIGTERM), (signal.SIGUSR1, signal.SIGUSR1), (signal.SIGINT, signal.SIGTERM)],
)
def test_a_signal_is_noted_and_passed_to_every_sibling_that_still_runs(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals, passed: signal.Signals
) -> None:
    siblings = [Sibling(0), Sibling(None), Sibling(-9), Sibling(None)]
    monkeypatch.setattr(launch, "_siblings", siblings)
    with RunControl(None, OneProcess()) as control:  # type: ignore[arg-type]
        os.kill(os.getpid(), number)
        assert control.stop_reason() == control.replica_reason() == number.name
    assert [sibling.told for sibling in siblings] == [[], [passed], [], [passed]]


@pytest.mark.processes
def test_ctrl_c_is_a_reason_to_stop_and_reaches_siblings_as_sigterm(sibling: subprocess.Popen[bytes]) -> None:
    with RunControl(None, OneProcess()) as control:  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGINT)
        assert control.stop_reason() == "SIGINT"
    assert sibling.communicate(timeout=10)[0] == b"SIGTERM\n"


def test_ctrl_c_a_second_time_leaves_at_once_and_sigterm_never_does() -> None:
    with StopSignal() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_work_of_others_ends_at_once_when_the_signal_comes_and_is_not_begun_afterwards() -> None:
    done: list[str] = []

    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        except Exception:
            pytest.fail("it is no Exception")
        finally:
            done.append("cleared up")

    with StopSignal() as stop:
        assert stop.unless_told(lambda: done.append("worked"))
        assert not stop.unless_told(work)
        assert not stop.unless_told(lambda: pytest.fail("begun"))
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(ZeroDivisionError):
            StopSignal().unless_told(lambda: 1 / 0)
    assert done == ["worked", "cleared up"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_who_waits_for_others_is_told_when_the_signal_comes(number: signal.Signals) -> None:
    told: list[str | None] = []
    control = RunControl(None, OneProcess(), on_signal=lambda: told.append(control.stop_reason()))  # type: ignore[arg-type]
    with control:
        assert told == []
        os.kill(os.getpid(), number)
        assert told == [number.name]


def test_handlers_are_as_before_when_the_work_is_done() -> None:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with StopSignal():
        assert all(signal.getsignal(n) != old for n, old in zip(numbers, before, strict=True))
    assert [signal.getsignal(number) for number in numbers] == before
    with pytest.raises(ZeroDivisionError), RunControl(None, OneProcess()):  # type: ignore[arg-type]
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in numbers] == before


def test_what_another_rank_was_told_stops_this_one_too() -> None:
    cluster = OneProcess()
    cluster.any = cluster.any_in_replica = lambda flag: True  # type: ignore[method-assign]
    control = RunControl(None, cluster)  # type: ignore[arg-type]
    assert control.stop_reason() == control.replica_reason() == "another rank was told to stop"


def test_replicas_ask_only_themselves() -> None:
    cluster = OneProcess()
    cluster.any = lambda flag: pytest.fail("a collective of all ranks")  # type: ignore[method-assign]
    assert RunControl("0:0:0", cluster).replica_reason() == "max_time_per_run=0:0:0"  # type: ignore[arg-type]


def test_the_limit_is_reached_at_its_second_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(run_control.time, "monotonic", lambda: now[0])
    control, unlimited = RunControl("0:1:30", OneProcess()), RunControl(None, OneProcess())  # type: ignore[arg-type]
    for seconds, reason in (
        (0.0, None),
        (89.9, None),
        (90.0, "max_time_per_run=0:1:30"),
        (1e9, "max_time_per_run=0:1:30"),
    ):
        now[0] = 1000.0 + seconds
        assert control.stop_reason() == reason
        assert unlimited.stop_reason() is None


@pytest.mark.parametrize(
    ("text", "seconds"), [("00:03:55:00", 14100), ("1:02:03", 3723), ("2:00:00:01", 172801), (" 0:0:0 ", 0)]
)
def test_durations_are_days_hours_minutes_seconds(text: str, seconds: float) -> None:
    assert parse_duration(text, "key") == seconds


@pytest.mark.parametrize("text", ["90", "3:55", "1:2:3:4:5", "1h", "-1:00:00", "0:0:1.5", ""])
def test_a_duration_of_another_form_is_refused_by_its_key(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^exp_manager\.max_time_per_run: .* is not of the form D:H:M:S or H:M:S"):
        RunControl(text, OneProcess(), key="exp_manager.max_time_per_run")  # type: ignore[arg-type]
