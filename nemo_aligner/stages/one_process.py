"""Run the stages of a loop one after another in one process, which imports once and keeps what it has loaded.

    python -m nemo_aligner.stages.one_process --answers 3     for loops/online_rs.sh: it says "done" there after each
    python -m nemo_aligner.stages.one_process                 for the first rank, of another one

Commands come on the standard input (engine/processes/standing.py), as Python would be started with them: `-m module
arguments`. One that fails ends the process, with its exit status.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import re
import runpy
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from nemo_aligner.engine.checkpoints import resident
from nemo_aligner.engine.processes import standing

_ENVIRONMENT = re.compile(r"([A-Z_]+)=(.*)", re.DOTALL)


def run(words: Sequence[str]) -> None:
    """Run a command as a process of its own would. Raises SystemExit where it ends with another status than 0."""
    with _own_environment():
        while found := _ENVIRONMENT.fullmatch(words[0]):
            os.environ[found[1]], words = found[2], words[1:]
        option, module, *arguments = words
        assert option == "-m", "a command of another form than is sent here"
        # what a multirun, and a rank that starts others, go by
        sys.orig_argv = [sys.executable, *words]
        sys.argv = [module, *arguments]
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            if end.code:
                raise
    gc.collect()  # models refer to themselves
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()


@contextlib.contextmanager
def _own_environment() -> Iterator[None]:
    """What a command sets in its environment ends with it."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _commands() -> BinaryIO:
    """The standard input, in whose place commands find an empty one."""
    commands = os.fdopen(os.dup(0), "rb")
    with open(os.devnull) as empty:
        os.dup2(empty.fileno(), 0)
    return commands


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """A rank that has nothing to do is told to stop along with the others, who may still have something to save."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, help="descriptor; not for the other ranks")
    answers = parser.parse_args().answers
    commands = _commands()
    resident.stay_from_now_on()
    standing.stand_by(["-m", "nemo_aligner.stages.one_process"])
    while True:
        with contextlib.nullcontext() if answers else _deaf():
            words = standing.receive(commands)
        if words is None:
            return
        run(words)
        if answers:
            os.write(answers, b"done\n")


if __name__ == "__main__":
    main()
