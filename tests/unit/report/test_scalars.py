"""Curves are all that was logged, once."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from nemo_aligner.report.scalars import POINTS, read_scalars
from tests.results import write_rows


def log_events(folder: Path, points: list[tuple[str, int, float]], begin: float = 1000.0) -> None:
    writer = EventFileWriter(str(folder))
    for place, (tag, step, value) in enumerate(points):
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        writer.add_event(Event(step=step, wall_time=begin + place, summary=summary))
    writer.close()


def test_event_files_of_a_run_that_went_on_after_a_kill_are_one_curve(tmp_path: Path) -> None:
    log_events(tmp_path, [("train/loss", 1, 3.0), ("train/loss", 2, 2.5), ("train/loss", 3, 9.0)])
    (first,) = tmp_path.iterdir()
    first.rename(tmp_path / "events.out.tfevents.0")  # files are read in the order of their names
    log_events(tmp_path, [("train/loss", 3, 2.0), ("val/loss", 3, 2.25)], begin=2000.0)
    found = read_scalars(tmp_path)
    assert found is not None
    assert {tag: (own.steps, own.values) for tag, own in found.curves.items()} == {
        "train/loss": ([1, 2, 3], [3.0, 2.5, 2.0]),
        "val/loss": ([3], [2.25]),
    }
    assert found.seconds == pytest.approx(1001.0)


def test_without_event_files_metrics_jsonl_is_read_up_to_a_line_that_is_being_written(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "metrics.jsonl", [{"step": 1, "a": 2.0}, {"step": 2, "a": None, "b": 1}])
    with path.open("a") as stream:
        stream.write('{"step": 3, "a"')
    found = read_scalars(tmp_path)
    assert found is not None
    assert {tag: (own.steps, own.values) for tag, own in found.curves.items()} == {"a": ([1], [2.0]), "b": ([2], [1.0])}


def test_a_long_curve_is_thinned_and_keeps_its_ends(tmp_path: Path) -> None:
    write_rows(tmp_path / "metrics.jsonl", ({"step": step, "a": float(step)} for step in range(3 * POINTS)))
    found = read_scalars(tmp_path)
    assert found is not None
    curve = found.curves["a"]
    assert (curve.every, curve.steps[0], curve.steps[-1], len(curve.steps)) == (3, 0, 3 * POINTS - 1, POINTS + 1)


def test_a_folder_without_either_has_none(tmp_path: Path) -> None:
    assert read_scalars(tmp_path) is None
