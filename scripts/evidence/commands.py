"""The product's commands, as a user starts them, and what each has cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

from nemo_aligner.children import dying_with_parent
from nemo_aligner.errors import AlignerError, StoppedEarly

COSTS = "costs.jsonl"
"""In the folder of a run: a line for each command that it took, {stage, cpu_s, wall_s}."""

PREFIX = (sys.executable, "-m", "nemo_aligner")

_running: set[subprocess.Popen[bytes]] = set()
_lock = threading.RLock()  # a signal may come to the thread that holds it
_stopped = threading.Event()


class CommandError(AlignerError):
    """A command ended with another status than 0; it names the command's log."""


def run(folder: Path, stage: str, *arguments: object, **environment: object) -> None:
    """`aligner ARGUMENT...`, its output appended to `<folder>/<stage>.log`. Raises CommandError, StoppedEarly."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{stage}.log"
    began = time.perf_counter()
    with log.open("ab") as stream:
        process = _start(stream, arguments, environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    with _lock:
        _running.discard(process)
    if _stopped.is_set():
        raise StoppedEarly(f"{stage} of {folder}")
    if process.returncode:
        said = log.read_text(errors="replace").splitlines()
        error = next((line for line in reversed(said) if line.startswith("error: ")), said[-1] if said else "nothing")
        raise CommandError(f"aligner {arguments[0]} ended with {process.returncode}; {log} says: {error}")
    cost = {"stage": stage, "cpu_s": usage.ru_utime + usage.ru_stime, "wall_s": time.perf_counter() - began}
    with (folder / COSTS).open("a") as stream:
        stream.write(json.dumps(cost) + "\n")


def _start(stream: IO[bytes], arguments: tuple[object, ...], environment: dict[str, object]) -> subprocess.Popen[bytes]:
    with _lock:
        if _stopped.is_set():
            raise StoppedEarly("before the next command")
        process = subprocess.Popen(
            [*PREFIX, *map(str, arguments)], stdout=stream, stderr=stream, stdin=subprocess.DEVNULL,
            env={**os.environ, **{name: str(value) for name, value in environment.items()}},
            preexec_fn=dying_with_parent(),
        )  # fmt: skip
        _running.add(process)
        return process


def stop() -> None:
    """Ask every command that runs to leave, and start no other."""
    _stopped.set()
    with _lock:
        for process in _running:
            process.terminate()


class Server:
    """`aligner serve ARGUMENT...` on `port`, its log in `folder`; it ends with the block that it is entered for."""

    def __init__(self, folder: Path, port: int, *arguments: object) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "serve.log"
        self.arguments = ("serve", f"inference.port={port}", *arguments)
        self.deaths = 0

    def __enter__(self) -> Server:
        with self.log.open("ab") as stream:
            self.process = _start(stream, self.arguments, {})
        return self

    def keep(self) -> None:
        """Start it again where it has died, as its clients go on asking. Raises CommandError for the third death."""
        if self.process.poll() is not None and not _stopped.is_set():
            self.deaths += 1
            if self.deaths == 3:
                raise CommandError(f"the reward server ends again and again; see {self.log}")
            self.__enter__()

    def __exit__(self, *fault: object) -> None:
        self.process.terminate()
        self.process.wait()


def costs_of(folder: Path) -> list[dict[str, float]]:
    """The lines of `COSTS`; none where there is no such file."""
    path = folder / COSTS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
