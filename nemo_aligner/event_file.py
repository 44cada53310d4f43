"""TensorBoard's file, with every value in it as soon as it is logged.

SummaryWriter of torch and TensorBoard holds values back for two minutes, which a kill takes along, and writes them from
a thread of its own, whose fault, such as a full disk, is a traceback that stops nothing.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATTERN = "events.out.tfevents.*"
_numbers = itertools.count()


class EventFile:
    """A new file of scalars and texts in an existing folder. Raises OSError when the disk does not take them."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event = Event
        name = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        self._file = (folder / PATTERN.replace("*", name)).open("wb")
        self._writer = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add(self, step: int, scalars: Mapping[str, float], wall_time: float | None = None) -> None:
        """Values by their names at `step`; `wall_time` in seconds since 1970, None = now."""
        event = self._dated(step, wall_time)
        for name, value in scalars.items():
            event.summary.value.add(tag=name, simple_value=value)
        self._write(event)

    def add_text(self, step: int, name: str, markdown: str, wall_time: float | None = None) -> None:
        """A text at `step`; `wall_time` as in `add`."""
        from tensorboard.plugins.text.summary_v2 import text_pb

        event = self._dated(step, wall_time)
        event.summary.CopyFrom(text_pb(name, markdown))
        self._write(event)

    def _dated(self, step: int, wall_time: float | None) -> Any:
        return self._event(wall_time=time.time() if wall_time is None else wall_time, step=step)

    def _write(self, event: object) -> None:
        self._writer.write(event.SerializeToString())  # type: ignore[attr-defined]
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


@dataclass
class Shown:
    """What the files of a folder show, by (step, name)."""

    times: dict[tuple[int, str], float] = field(default_factory=dict)  # time of day of each
    texts: dict[tuple[int, str], str] = field(default_factory=dict)


def shown_before(folder: Path) -> Shown:
    """Of the files in `folder`; of what stands there twice the later one."""
    found, files = Shown(), sorted(folder.glob(PATTERN))
    if not files:
        return found
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    events = (event for file in files for event in EventFileLoader(str(file)).Load())
    for event in events:
        for value in event.summary.value:
            found.times[event.step, value.tag] = event.wall_time
            if value.metadata.plugin_data.plugin_name == "text":
                found.texts[event.step, value.tag] = value.tensor.string_val[0].decode()
    return found
