"""When a stage must stop before its end: the time limit, SIGTERM, SIGUSR1 (Slurm's warning), or Ctrl-C."""

from __future__ import annotations

import logging
import re
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from nemo_aligner.engine.interfaces import Cluster
from nemo_aligner.engine.processes.launch import signal_siblings
from nemo_aligner.errors import ConfigError

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_FORM = re.compile(r"^(?:(\d+):)?(\d+):(\d+):(\d+)$")


def parse_duration(text: str, key: str) -> float:
    """Seconds of `D:H:M:S` or `H:M:S`. Raises ConfigError naming `key`."""
    match = _FORM.match(str(text).strip())
    if match is None:
        raise ConfigError(f"{text!r} is not of the form D:H:M:S or H:M:S, such as 00:03:55:00", key)
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


class _ToldError(BaseException):
    """A signal came; passes by those who catch every Exception."""


class StopSignal:
    """Used as a context manager: notes SIGTERM, SIGUSR1 and SIGINT, and passes them on to our own ranks.

    `also` is called when one comes, within the handler. Raises KeyboardInterrupt at a second SIGINT: who is in a hurry
    need not wait for the work to be saved.
    """

    def __init__(self, also: Callable[[], None] = lambda: None) -> None:
        self._also = also
        self.name: str | None = None  # of the signal that came
        self._breaks = False  # whether a signal ends at once what is under way
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in _SIGNALS:
            self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.name == "SIGINT":
                raise KeyboardInterrupt
            log.warning("stopping as soon as the work is saved; Ctrl-C once more leaves at once")
            signal_siblings(signal.SIGTERM)  # a terminal sends SIGINT to them as well, and two would be a hurry
        else:
            signal_siblings(number)
        self.name = signal.Signals(number).name
        self._also()
        if self._breaks:
            self._breaks = False
            raise _ToldError

    def unless_told(self, work: Callable[[], object]) -> bool:
        """Do `work` of others, which knows no end but its own: a signal ends it at once. Whether it was done."""
        try:
            self._breaks = True
            if self.name is None:
                work()
            self._breaks = False
        except _ToldError:
            pass
        finally:
            self._breaks = False
        return self.name is None


class RunControl:
    """Used as a context manager; ask `stop_reason()` between two pieces of work, on every rank at the same place.

    `on_signal` is called when a signal comes: it shortens what this process waits for.
    """

    def __init__(
        self,
        max_time: str | None,
        cluster: Cluster,
        *,
        key: str = "max_time_per_run",
        on_signal: Callable[[], None] = lambda: None,
    ) -> None:
        self._cluster = cluster
        self._limit = None if max_time is None else parse_duration(max_time, key)
        self._max_time, self._start = max_time, time.monotonic()
        self._signal = StopSignal(on_signal)

    def __enter__(self) -> RunControl:
        self._signal.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._signal.__exit__(kind, value, trace)

    def replica_reason(self) -> str | None:
        """Why this replica should stop, the same answer on each of its ranks; collective in the replica only."""
        reason = self._local_reason()
        told = self._cluster.any_in_replica(reason is not None)
        return (reason or "another rank was told to stop") if told else None

    def _local_reason(self) -> str | None:
        if self._signal.name is not None:
            return self._signal.name
        if self._limit is not None and time.monotonic() - self._start >= self._limit:
            return f"max_time_per_run={self._max_time}"
        return None

    def stop_reason(self) -> str | None:
        """Why the run should stop now, the same answer (None or not) on every rank; collective."""
        reason = self._local_reason()
        return (reason or "another rank was told to stop") if self._cluster.any(reason is not None) else None
