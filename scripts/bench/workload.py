"""What every engine of the generation benchmark is asked to do, and how it is told: shared by all workers.

A worker is a process that loads its model, prints a JSON line, and then answers every line "run" on its standard input
with another JSON line. Only the standard library is imported here, so that every environment can.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load(path: str) -> list[dict[str, Any]]:
    """One {"prompt": ids, "lengths": [...]} for each prompt: so many responses of exactly these lengths."""
    return json.loads(Path(path).read_text())


def useful_tokens(work: list[dict[str, Any]]) -> int:
    return sum(sum(item["lengths"]) for item in work)


def serve(
    engine: str, loaded_in: float, run: Callable[[], dict[str, Any]], aside: Callable[[], dict[str, Any]] = dict
) -> None:
    """Answer the parent until it closes the pipe. `run` does the whole workload and says what it made.

    `aside` measures something else in the same round, outside the time of the workload.
    """
    say({"engine": engine, "load_s": loaded_in})
    for line in sys.stdin:
        if line.strip() == "run":
            begin = time.perf_counter()
            made = run()
            seconds = time.perf_counter() - begin
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            say({"engine": engine, "seconds": seconds, "peak_gb": peak, **made, **aside()})


def say(message: dict[str, Any]) -> None:
    print("RESULT " + json.dumps(message), flush=True)
