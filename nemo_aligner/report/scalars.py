"""Scalars of a run's event files, read by TensorBoard's own reader, or of metrics.jsonl where there are none."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

log = logging.getLogger(__name__)

POINTS = 1000
"""Of one curve in a page; a longer one is thinned evenly, its last point kept."""


@dataclass
class Curve:
    """One scalar by step; `every` of its points, the first, stands for those up to the next."""

    steps: list[int] = field(default_factory=list)
    values: list[float | None] = field(default_factory=list)
    every: int = 1


@dataclass
class Scalars:
    """All curves of one log folder, and the seconds between its first and last event."""

    curves: dict[str, Curve] = field(default_factory=dict)
    seconds: float = 0.0


def read_scalars(folder: Path) -> Scalars | None:
    """Of the event files in `folder` itself; of metrics.jsonl where it has none; None where it has neither."""
    if any(folder.glob("events.out.tfevents.*")):
        return _from_events(folder)
    if (folder / "metrics.jsonl").is_file():
        return _from_lines(folder / "metrics.jsonl")
    return None


def _from_events(folder: Path) -> Scalars:
    # what is imported here takes half a second
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, TENSORS, EventAccumulator
    from tensorboard.util import tensor_util

    # 0: every event, instead of a random sample of them
    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0, TENSORS: 0}).Reload()
    found, times = Scalars(), []
    for tag in events.Tags()["scalars"]:
        points = events.Scalars(tag)
        times += [points[0].wall_time, points[-1].wall_time]
        found.curves[tag] = _curve((point.step, point.value) for point in points)
    for tag in events.Tags()["tensors"]:  # where newer writers keep scalars
        tensors = [(event, tensor_util.make_ndarray(event.tensor_proto)) for event in events.Tensors(tag)]
        if all(value.size == 1 and value.dtype.kind in "fiu" for _, value in tensors):
            times += [event.wall_time for event, _ in tensors]
            found.curves[tag] = _curve((event.step, float(value.item())) for event, value in tensors)
    found.seconds = max(times) - min(times) if times else 0.0
    return found


def _from_lines(path: Path) -> Scalars:
    points: dict[str, list[tuple[int, float]]] = {}
    for row in whole_lines(path):
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                points.setdefault(name, []).append((int(row["step"]), float(value)))
    return Scalars({name: _curve(own) for name, own in points.items()})


def _curve(points: Iterable[tuple[int, float]]) -> Curve:
    """In the order of the steps; of a step that was logged again, after a kill, the later value."""
    by_step = dict(points)
    steps = sorted(by_step)
    every = math.ceil(len(steps) / POINTS) if len(steps) > POINTS else 1
    kept = steps[::every]
    if steps and kept[-1] != steps[-1]:
        kept.append(steps[-1])
    return Curve(kept, [by_step[step] if math.isfinite(by_step[step]) else None for step in kept], every)


def whole_lines(path: Path) -> Iterator[dict]:
    """Objects of a file that is being appended to: a last line without its end is not there yet."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                yield row
            else:
                log.warning("%s:%d: not a JSON object, left out", path, number)
