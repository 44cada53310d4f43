"""What every engine of the generation benchmark is asked to do, and how engines are told: shared by all workers.

A worker is a process that loads its model, prints a JSON line, and then answers every line "run" on its standard input
with another JSON line. Only the standard library is imported here, so that every environment can.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load(path: str) -> Any:
    """For generation.py one {"prompt": ids, "lengths": [...]} for each prompt: so many responses of exactly these
    lengths; for training.py what training_workloads.py makes."""
    return json.loads(Path(path).read_text())


def useful_tokens(work: list[dict[str, Any]]) -> int:
    return sum(sum(item["lengths"]) for item in work)


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""Seconds that pass, or those that this process computes: the latter hold on a busy machine."""


def memory_kb(name: str) -> int:
    """A line of this process's /proc/self/status, such as VmRSS (resident now) or VmHWM (at most)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def forget_loading() -> None:
    """Loading is no part of the workload: what it freed goes back to the system, and the peak starts anew."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def serve(
    engine: str,
    loaded_in: float,
    run: Callable[[], dict[str, Any]],
    aside: Callable[[], dict[str, Any]] = dict,
    clock: str = "wall",
) -> None:
    """Answer the parent until it closes the pipe. `run` does the whole workload and says what it made.

    `aside` measures something else in the same round, outside the time of the workload. `run` may say `seconds` itself,
    where only a part of what it does counts.
    """
    say({"engine": engine, "load_s": loaded_in})
    for line in sys.stdin:
        if line.strip() == "run":
            begin = CLOCKS[clock]()
            made = run()
            seconds = CLOCKS[clock]() - begin
            peak = memory_kb("VmHWM") / 2**20
            say({"engine": engine, "seconds": seconds, "peak_gb": peak, **made, **aside()})


def say(message: dict[str, Any]) -> None:
    print("RESULT " + json.dumps(message), flush=True)
