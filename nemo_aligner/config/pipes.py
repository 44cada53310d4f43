"""What a command says may be read by one that leaves early, such as `head`."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_NOBODY_READS = 141
"""As of a program that SIGPIPE ends."""


@contextmanager
def as_long_as_somebody_reads() -> Iterator[None]:
    """Where the reader of stdout is gone, the command ends without a word."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        if not _nobody_reads():
            raise  # of another pipe
        # what is left to write at the end goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_NOBODY_READS)


def _nobody_reads() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
