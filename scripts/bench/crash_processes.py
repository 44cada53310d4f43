"""Starting a command, waiting for a moment of its life, and killing a process of it.

A moment is a time, or the k-th change of a file below the command's own folders (crash_trap/sitecustomize.py):

    <trap>/changes    one byte for every change so far
    <trap>/met        the change before which the command was stopped
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_TRAP = Path(__file__).resolve().parent / "crash_trap"
_MARK = "CRASH_COMMAND"
_started: list[Command] = []


@dataclass
class Command:
    """A command that runs, with all processes that it started, however far they went from it."""

    process: subprocess.Popen[bytes]
    mark: str
    log: Path
    trap: Path

    def members(self) -> list[int]:
        """Its processes that live, the first one first."""
        found = (pid for pid in _pids() if _is_marked(pid, self.mark))
        return sorted(found, key=lambda pid: (pid != self.process.pid, pid))

    def runs(self) -> bool:
        return self.process.poll() is None

    def changes(self) -> int:
        """How often it has changed a file so far."""
        path = self.trap / "changes"
        return path.stat().st_size if path.exists() else 0

    def met(self) -> str | None:
        """The change before which a process of it stands still, if it came so far."""
        path = self.trap / "met"
        pid, _, change = path.read_text().partition(" ") if path.exists() else ("", "", "")
        return change.strip() if pid and _stands_still(int(pid)) else None

    def said(self) -> str:
        """The end of what it printed."""
        return self.log.read_text(errors="replace")[-1500:]


def start(
    command: Sequence[str], folder: Path, below: Sequence[Path], environment: Mapping[str, str], *, at: int = 0
) -> Command:
    """Start `command` in the clone; with `at`, it stops before the `at`-th change of a path that begins as `below`."""
    mark = uuid.uuid4().hex
    trap = folder / f"trap_{mark}"
    trap.mkdir(parents=True)
    log = folder / f"log_{mark}"
    own = {
        **os.environ,
        "PYTHONPATH": f"{_TRAP}:{ROOT}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "CRASH_TRAP": str(trap),
        "CRASH_BELOW": ":".join(map(str, below)),
        "CRASH_AT": str(at),
        _MARK: mark,
        **environment,
    }
    with log.open("wb") as stream:
        process = subprocess.Popen(command, cwd=ROOT, env=own, stdout=stream, stderr=stream, start_new_session=True)
    _started.append(Command(process, mark, log, trap))
    return _started[-1]


def wait_for_moment(command: Command, seconds: float | None) -> str | None:
    """Until `seconds` have passed, or with None until the command stands before its change; None where it ended."""
    end = None if seconds is None else time.monotonic() + seconds
    while command.runs():
        if end is None:
            met = command.met()
            if met is not None:
                return f"before {met}"
        elif time.monotonic() >= end:
            return f"after {seconds:.1f} s"
        time.sleep(0.005)
    return None


@dataclass(frozen=True)
class Blow:
    """Which signal goes to whom."""

    name: str
    number: signal.Signals
    target: str  # one, first, all


BLOWS = (
    Blow("SIGKILL of one process", signal.SIGKILL, "one"),
    Blow("SIGKILL of the first process", signal.SIGKILL, "first"),
    Blow("SIGKILL of all", signal.SIGKILL, "all"),
    Blow("SIGTERM of one process", signal.SIGTERM, "one"),
    Blow("SIGTERM of the first process", signal.SIGTERM, "first"),
)


def strike(command: Command, blow: Blow, rng: random.Random) -> None:
    """Send the signal, and let go on what stands still."""
    members = command.members()
    if not members:
        return
    victims = {"one": [rng.choice(members)], "first": members[:1], "all": members}[blow.target]
    for victim in victims:
        _send(victim, blow.number)
    let_go(command)


def let_go(command: Command) -> None:
    """Let what stands still go on."""
    for member in command.members():
        _send(member, signal.SIGCONT)


def wait(command: Command, seconds: float) -> bool:
    """Whether the command ends within `seconds`; it is killed where it does not."""
    try:
        command.process.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        end(command)
        return False


def left_running(command: Command, seconds: float = 30.0) -> list[str]:
    """Command lines of its processes that live on so long after its end; they are killed."""
    until = time.monotonic() + seconds
    while command.members() and time.monotonic() < until:
        time.sleep(0.1)
    left = [_command_line(pid) for pid in command.members()]
    end(command)
    return left


def end(command: Command) -> None:
    """Kill what there is of it."""
    for pid in command.members():
        _send(pid, signal.SIGKILL)
    if command.runs():
        command.process.kill()
    command.process.wait()


def end_all() -> None:
    """Kill what there is of all commands, whatever ended the run that started them."""
    for command in _started:
        end(command)


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _is_marked(pid: int, mark: str) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        return f"{_MARK}={mark}".encode() in environment.split(b"\0")
    except OSError:  # it has ended, or is another user's
        return False


def _stands_still(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()[:200]
    except OSError:
        return f"process {pid}"
