"""Stops a process before the k-th change of a file that a command makes, so that it can be killed right there.

Python imports this by its name, where the folder is on PYTHONPATH; crash_processes.py reads and writes the files.
All processes of a command count together: each change is one byte appended to one file, whose length is the count.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"open": 0, "os.rename": 1, "os.remove": 0, "os.rmdir": 0, "os.mkdir": 0, "os.link": 1, "os.truncate": 0}
"""Audit events of changes, and which of their arguments is the name that changes."""


def changed_path(event: str, arguments: tuple[Any, ...]) -> str | None:
    """The absolute path that an audit event is about to change; None for all other events."""
    place = _CHANGES.get(event)
    if place is None or (event == "open" and not (arguments[2] or 0) & _WRITING):
        return None
    name = arguments[place]
    if not isinstance(name, str | bytes | os.PathLike):  # a descriptor: its name changed when it was opened
        return None
    path = os.fsdecode(name)
    if os.path.isabs(path):
        return path
    folder = arguments[1] if event in ("os.remove", "os.rmdir") and arguments[1] >= 0 else None
    return os.path.join(os.getcwd() if folder is None else os.readlink(f"/proc/self/fd/{folder}"), path)


def _arm(folder: str, below: tuple[str, ...], at: int) -> None:
    count = os.open(f"{folder}/changes", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        path = changed_path(event, arguments)
        if path is None or not path.startswith(below):
            return
        os.write(count, b".")
        if os.lseek(count, 0, os.SEEK_CUR) == at:
            met = os.open(f"{folder}/met", os.O_WRONLY | os.O_CREAT, 0o600)
            os.write(met, f"{os.getpid()} {event} {path}\n".encode())
            os.kill(os.getpid(), signal.SIGSTOP)

    sys.addaudithook(watch)


if "CRASH_TRAP" in os.environ:
    _arm(os.environ["CRASH_TRAP"], tuple(os.environ["CRASH_BELOW"].split(":")), int(os.environ["CRASH_AT"]))
