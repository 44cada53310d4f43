"""Reward functions, run in processes of their own: what one does to its process costs one response its reward.

    candidates ─▶ batches ─▶ threads, one process each ─▶ rewards; a process that is killed is started anew

A batch that fails is judged again one by one, so that the one that made it fail is found.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from nemo_aligner.config.rewards import RewardFunction
from nemo_aligner.errors import ConfigError, DataError, RewardError
from nemo_aligner.rewards.interfaces import Candidate, Outcome
from nemo_aligner.rewards.loading import PROMPTS, RESPONSES
from nemo_aligner.rewards.process import FailedCall, Process

log = logging.getLogger(__name__)

GIVE_UP_AFTER = 64
"""So many responses in a row that a function fails on are its own fault, and no longer theirs."""

_GRACE_S = 2.0
"""What a call may still take once we are told to hurry: quick functions come to an end, and a step with them."""

_SLOW = 0.5
"""Of the time limit; who takes longer is named."""

_TOLD = 10
"""Messages of one kind; of those that follow, the 20th, 40th, 80th, ..."""


class Functions:
    """The functions of a run, on `workers` processes of this one. `close` it, or its processes live as long as we do.

    Raises ConfigError where one cannot be loaded.
    """

    def __init__(self, functions: Sequence[RewardFunction], workers: int) -> None:
        self.functions = {function.name: function for function in functions}
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="reward_function")
        self._local = threading.local()
        self._processes: list[Process] = []
        self._lock = threading.Lock()
        self._stopped = False  # nothing is judged any more
        self._hurried_at: float | None = None
        self._failures = dict.fromkeys(self.functions, 0)  # in a row
        self._said: dict[tuple[str, str], int] = {}
        try:
            # in a thread of the pool: a worker dies with the thread that started it
            self._descriptions = self._threads.submit(lambda: self._process().descriptions).result()
        except BaseException:
            self.close()
            raise

    def source(self, name: str) -> FunctionSource:
        return FunctionSource(self, self.functions[name])

    def fingerprint(self) -> dict[str, Any]:
        """What decides the rewards of each function: itself, its file, its constants and fields."""
        return {
            name: {
                "function": function.target,
                "sum": self._descriptions[name]["sum"],
                "arguments": dict(function.arguments),
                "fields": dict(function.fields),
            }
            for name, function in self.functions.items()
        }

    def check_fields(self, fields: Mapping[str, Any], path: str | None = None, line: int | None = None) -> None:
        """A row must have what the functions need. Raises DataError."""
        for name, function in self.functions.items():
            about = self._descriptions[name]
            for parameter in about["needs"]:
                wanted = function.fields.get(parameter, parameter)
                if wanted not in fields:
                    has = ", ".join(map(repr, fields)) or "none"
                    raise DataError(
                        f"no field {wanted!r}, which reward function {name} needs; besides prompt and response the "
                        f"row has {has} (reward_function.{name}.fields names others)", path, line,
                    )  # fmt: skip
            if about["any"]:
                for taken in {PROMPTS, RESPONSES} & fields.keys():
                    raise DataError(
                        f"the field {taken!r} has a name that reward function {name} needs itself", path, line
                    )

    def check_names(self) -> None:
        """Every parameter that the config maps to a field must be one. Raises ConfigError."""
        for name, function in self.functions.items():
            about = self._descriptions[name]
            for parameter in function.fields:
                if not about["any"] and parameter not in (*about["needs"], *about["takes"]):
                    raise ConfigError(
                        f"{function.target} has no parameter {parameter!r} left",
                        f"reward_function.{name}.fields.{parameter}",
                    )

    def submit(self, function: RewardFunction, candidates: Sequence[Candidate]) -> list[Future[list[Outcome]]]:
        size = function.batch_size
        batches = [candidates[start : start + size] for start in range(0, len(candidates), size)]
        return [self._threads.submit(self._judge, function, batch) for batch in batches]

    def hurry(self) -> None:
        self._hurried_at = time.monotonic()

    def _waits_no_longer(self) -> bool:
        """Asked by a call that does not come back at once."""
        late = self._hurried_at is not None and time.monotonic() - self._hurried_at > _GRACE_S
        self._stopped = self._stopped or late
        return self._stopped

    def close(self) -> None:
        self._stopped = True
        self._threads.shutdown(wait=True, cancel_futures=True)  # a thread looks up several times a second
        for process in self._processes:
            process.kill()
        self._processes.clear()

    def _process(self) -> Process:
        """This thread's."""
        if getattr(self._local, "process", None) is None:
            self._local.process = Process(list(self.functions.values()), self._waits_no_longer)
            with self._lock:
                self._processes.append(self._local.process)
        return self._local.process  # type: ignore[no-any-return]

    def _drop_process(self) -> None:
        process = self._local.process
        self._local.process = None
        process.kill()
        with self._lock:
            self._processes.remove(process)

    def _judge(self, function: RewardFunction, batch: Sequence[Candidate]) -> list[Outcome]:
        """Raises RewardError once told to stop, or where the function fails on everything."""
        if self._stopped:
            raise RewardError("told to stop before all responses were judged")
        process, begin = self._process(), time.monotonic()
        try:
            rewards, left = process.call(
                function.name,
                [candidate.prompt for candidate in batch],
                [candidate.response for candidate in batch],
                self._columns(function, batch),
                function.time_limit_s * len(batch),
            )
        except FailedCall as failure:
            return self._failed(process, function, batch, failure)
        spent = (time.monotonic() - begin) / len(batch)
        if spent > _SLOW * function.time_limit_s:
            self._tell(function, "slow", batch[0], f"took {spent:.1f} s, of {function.time_limit_s:g} s that it may")
        if left:
            self._tell(function, "left", batch[0], "left processes behind, which are killed")
            self._drop_process()
        with self._lock:
            self._failures[function.name] = 0
        return [Outcome(reward) for reward in rewards]

    def _failed(
        self, process: Process, function: RewardFunction, batch: Sequence[Candidate], failure: FailedCall
    ) -> list[Outcome]:
        if self._stopped:
            raise RewardError("told to stop before all responses were judged") from None
        if process.is_killed:
            self._drop_process()
        if len(batch) > 1:
            return [outcome for candidate in batch for outcome in self._judge(function, [candidate])]
        self._tell(function, "failed", batch[0], str(failure))
        with self._lock:
            self._failures[function.name] += 1
            hopeless = self._failures[function.name] >= GIVE_UP_AFTER
        if hopeless:
            raise RewardError(
                f"reward function {function.name} ({function.target}) failed on {GIVE_UP_AFTER} responses in a row; "
                f"the last, {batch[0].where}: {failure}"
            )
        return [Outcome(None, str(failure))]

    def _columns(self, function: RewardFunction, batch: Sequence[Candidate]) -> dict[str, list[Any]]:
        """The rows' fields by the function's parameters; None where a row lacks one."""
        about = self._descriptions[function.name]
        names = dict.fromkeys((*about["needs"], *about["takes"]))
        if about["any"]:
            mapped = set(function.fields.values())
            names |= dict.fromkeys(n for c in batch for n in c.fields if n not in mapped)
            names |= dict.fromkeys(function.fields)
        fields = {name: function.fields.get(name, name) for name in names if name not in function.arguments}
        optional = set(about["takes"])
        return {
            name: [candidate.fields.get(wanted) for candidate in batch]
            for name, wanted in fields.items()
            # its own default is better than nothing at all
            if name not in optional or any(wanted in candidate.fields for candidate in batch)
        }

    def _tell(self, function: RewardFunction, kind: str, candidate: Candidate, said: str) -> None:
        with self._lock:
            count = self._said[function.name, kind] = self._said.get((function.name, kind), 0) + 1
        told, remainder = divmod(count, _TOLD)
        if count <= _TOLD or (remainder == 0 and told.bit_count() == 1):
            _say(f"{candidate.where}: reward function {function.name} {said}")


def _say(line: str) -> None:
    """A warning, also of ranks whose log nobody sees."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        log.warning("%s", line)
    else:
        print(f"[rank {rank}] {line}", file=sys.stderr, flush=True)


class FunctionSource:
    """Implements interfaces.Source: one function of several that share processes."""

    def __init__(self, functions: Functions, function: RewardFunction) -> None:
        self._functions, self._function = functions, function

    def submit(self, candidates: Sequence[Candidate]) -> Future[list[Outcome]]:
        return _joined(self._functions.submit(self._function, candidates))

    def hurry(self) -> None:
        self._functions.hurry()

    def close(self) -> None:
        self._functions.close()


def _joined(parts: Sequence[Future[list[Outcome]]]) -> Future[list[Outcome]]:
    """One future of all outcomes, in order; it fails with the first that fails."""
    whole: Future[list[Outcome]] = Future()
    left = len(parts)
    lock = threading.Lock()

    def done(part: Future[list[Outcome]]) -> None:
        nonlocal left
        with lock:
            left -= 1
            if left:
                return
        try:
            whole.set_result([outcome for part in parts for outcome in part.result()])
        except BaseException as fault:  # CancelledError too
            whole.set_exception(fault)

    for part in parts:
        part.add_done_callback(done)
    if not parts:
        whole.set_result([])
    return whole
