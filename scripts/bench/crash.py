"""Kill every command at random moments, start it again, and compare with a run that was not killed.

    .venv/bin/python scripts/bench/crash.py --kills 100 --seed 1 --json crash.json

The commands are those of crash_jobs.py: sampler, labeler, SFT, reward model, actor with its server, evaluation, import
and the online loops. One process of them, the first one, or all get SIGKILL or SIGTERM, at a random time or right
before a random change of a file, which is inside a save, a merge or an import; the reward server's too. Then the same
command is started again, at times on another number of ranks. Every line, tensor and file name must be as if nothing
had been killed, no process and no temporary folder may be left. Exit status 1 where something is not.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crash_jobs import JOBS, Invocation, Job, make_inputs, server
from crash_processes import BLOWS, Command, end_all, left_running, let_go, start, strike, wait, wait_for_moment
from crash_results import Differences, Lines, compare, results

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the clone, where it is not installed
from nemo_aligner.ports import free_port

_PATIENCE_S = 1200.0
"""After this long a command that should end is taken to hang."""

_SERVER_ENDS_S = 45.0
"""A server that lives longer after a kill is taken to have lived through it."""


class Place:
    """Where the runs of one job write: the same paths for all of them, as some results name them."""

    def __init__(self, job: Job, work: Path, inputs: Path) -> None:
        self.job, self._inputs = job, inputs
        self.folder = work / job.name
        self.out, self.temporary = self.folder / "out", self.folder / "tmp"
        self.port = free_port()
        self.server: Command | None = None

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.out.mkdir(parents=True)
        self.temporary.mkdir()

    def start(self, ranks: int, at: int = 0) -> Command:
        """The job's command; with `at`, it stops before its `at`-th change of a file."""
        if self.job.has_server and self.server is None:
            self.start_server()
        return self._start(self.job.run(self._inputs, self.out, ranks, self.port), at)

    def _start(self, invocation: Invocation, at: int = 0) -> Command:
        own = {**invocation.environment, "TMPDIR": str(self.temporary)}
        return start(invocation.command, self.folder, [self.out, self.temporary / "nemo_"], own, at=at)

    def start_server(self) -> None:
        self.server = self._start(server(self._inputs, self.port))

    def renew_server(self) -> list[str]:
        """Start the server again if it ends within some time; what is left running of the one before."""
        assert self.server is not None
        until = time.monotonic() + _SERVER_ENDS_S
        while self.server.runs():
            if time.monotonic() > until:
                return []  # it has lived through it, and has to answer
            time.sleep(0.1)
        left = left_running(self.server)
        self.start_server()
        return left

    def stop_server(self) -> list[str]:
        """Tell the server, if there is one, to leave; what is wrong with how it does."""
        if self.server is None:
            return []
        command, self.server = self.server, None
        until = time.monotonic() + _PATIENCE_S  # it has to have started, to remove what the one before it left
        while command.runs() and not _listens(self.port) and time.monotonic() < until:
            time.sleep(0.1)
        if command.runs():
            command.process.terminate()
        faults = [] if wait(command, _PATIENCE_S) else [f"the server hangs: {command.said()}"]
        return faults + [f"left running of the server: {line}" for line in left_running(command)]

    def results(self) -> Lines:
        return results(self.out, self.temporary)


class Reference:
    """A run of a job that nobody kills: its results, how long it takes and how many changes of files it makes."""

    def __init__(self, place: Place) -> None:
        place.clear()
        begin = time.monotonic()
        command = place.start(1)
        faults = [] if wait(command, _PATIENCE_S) else ["it hangs"]
        self.seconds, self.changes = time.monotonic() - begin, command.changes()
        faults += place.stop_server() + left_running(command)
        if command.process.returncode or faults:
            raise SystemExit(f"error: {place.job.name} fails without a kill: {faults} {command.said()}")
        self.results = place.results()


class Case:
    """One output of one job, whose command is killed several times before it comes to its end."""

    def __init__(self, place: Place, reference: Reference, rng: random.Random, kills: int) -> None:
        self._place, self._reference, self._rng = place, reference, rng
        self.job, self.left = place.job, kills  # kills that are still to come
        self.blows: list[str] = []
        self.result = Differences()

    def run(self) -> None:
        self._place.clear()
        command: Command | None = None
        while self.left and command is None:
            command = self._killed()
        if command is None:
            command = self._place.start(self._ranks())
        self._finish(command)
        for fault in self._place.stop_server():
            self.result.other(fault)
        self.result.add(compare(self._reference.results, self._place.results()))

    def _ranks(self) -> int:
        return self._rng.randint(1, self.job.most_ranks)

    def _killed(self) -> Command | None:
        """Start the command and kill once; the command where it still runs, or came to its end before that."""
        rng, ranks = self._rng, self._ranks()
        is_change = rng.random() < 0.6
        at = rng.randint(1, self._reference.changes) if is_change else 0
        command = self._place.start(ranks, at)
        moment = wait_for_moment(command, None if is_change else rng.uniform(0, self._reference.seconds))
        if moment is None:
            return command
        blow = rng.choice(BLOWS)
        if self._place.server is not None and rng.random() < 0.4:
            strike(self._place.server, blow, rng)
            let_go(command)
            self._tell(f"{blow.name} of the server {moment}", ranks)
            for line in self._place.renew_server():
                self.result.other(f"left running after {self.blows[-1]}: {line}")
            return command
        strike(command, blow, rng)
        self._tell(f"{blow.name} {moment}", ranks)
        self._end(command)
        return None

    def _tell(self, blow: str, ranks: int) -> None:
        self.left -= 1
        self.blows.append(f"{blow} on {ranks} ranks")

    def _end(self, command: Command) -> None:
        if not wait(command, _PATIENCE_S):
            self.result.other(f"hangs after {self.blows[-1]}: {command.said()}")
        for line in left_running(command):
            self.result.other(f"left running after {self.blows[-1]}: {line}")

    def _finish(self, command: Command) -> None:
        if not wait(command, _PATIENCE_S):
            self.result.other(f"hangs: {command.said()}")
        elif command.process.returncode:
            self.result.other(f"ends with {command.process.returncode}: {command.said()}")
        for line in left_running(command):
            self.result.other(f"left running at the end: {line}")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def crash(jobs: list[Job], kills: int, seed: int, work: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """Kill so often; the figures of the report."""
    rng, total = random.Random(seed), Differences()
    make_inputs(work / "inputs", jobs)
    places = {job.name: Place(job, work, work / "inputs") for job in jobs}
    references: dict[str, Reference] = {}
    done: list[dict[str, Any]] = []
    killed = 0
    first = rng.sample(jobs, len(jobs))  # each is killed at least once, where there are kills enough
    while killed < kills:
        job = first.pop() if first else rng.choices(jobs, [job.weight for job in jobs])[0]
        place = places[job.name]
        if job.name not in references:
            references[job.name] = Reference(place)
        case = Case(place, references[job.name], rng, min(kills - killed, rng.randint(1, job.most_kills)))
        case.run()
        killed += len(case.blows)
        total.add(case.result)
        done.append({"job": job.name, "kills": case.blows, "differences": case.result.found})
        tell(f"{killed}/{kills} {job.name}: {'; '.join(case.blows)}: {case.result.found or 'as without'}")
    counts = {"lost": total.lost, "duplicated": total.duplicated, "different": total.different}
    return {"kills": killed, **counts, "seed": seed, "cases": done}


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is running ends with this
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1, help="of jobs, moments, signals and numbers of ranks")
    parser.add_argument("--jobs", default=",".join(JOBS), help=f"some of {','.join(JOBS)}")
    parser.add_argument("--json", type=Path, help="the report: kills, lost, duplicated, different, and every case")
    args = parser.parse_args()
    names = args.jobs.split(",")
    unknown = [name for name in names if name not in JOBS]
    if unknown:
        parser.error(f"--jobs: no {', '.join(unknown)}; there are {', '.join(JOBS)}")
    with tempfile.TemporaryDirectory(prefix="crash_") as work:
        jobs = [JOBS[name] for name in names]
        try:
            report = crash(jobs, args.kills, args.seed, Path(work), lambda line: print(line, flush=True))
        finally:
            end_all()
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1))
    print(", ".join(f"{report[name]} {name}" for name in ("kills", "lost", "duplicated", "different")))
    sys.exit(1 if report["lost"] or report["duplicated"] or report["different"] else 0)


if __name__ == "__main__":
    main()
