"""Processes that run one command line after another, so that what they have imported and loaded is there for the next.

A command is sent as its number of words and the words, each ended by a NUL; words of the form NAME=value in front are
its environment, as in a shell:

    3 NUL WORLD_SIZE=2 NUL -m NUL nemo_aligner NUL
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO

program: list[str] | None = None
"""What Python is started with for another rank that stands by; None: a rank ends with its command."""


def stand_by(arguments: Sequence[str]) -> None:
    """Say that this process runs one command after another, and so do ranks that it starts, with `python arguments`."""
    global program
    program = [*arguments]


def send(stream: IO[bytes], words: Sequence[str]) -> None:
    """Raises OSError where nobody reads any more."""
    stream.write(b"".join(f"{word}\0".encode("utf-8", "surrogateescape") for word in (str(len(words)), *words)))
    stream.flush()


def receive(stream: IO[bytes]) -> list[str] | None:
    """The next command; None at the end, also in the middle of one: who sent it is gone."""
    count = _word(stream)
    if count is None:
        return None
    words = [_word(stream) for _ in range(int(count))]
    return None if None in words else [word for word in words if word is not None]


def _word(stream: IO[bytes]) -> str | None:
    found = bytearray()
    while (byte := stream.read(1)) != b"\0":
        if not byte:
            return None
        found += byte
    return found.decode("utf-8", "surrogateescape")
