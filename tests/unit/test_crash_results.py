"""scripts/bench/crash.py finds what it looks for: lines that are lost, doubled or others, and what is left over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.bench.crash_results import compare, results
from scripts.bench.crash_trap.sitecustomize import changed_path

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("own", "counts"),
    [
        (["a", "b", "b", "c"], (0, 0, 0)),
        (["a", "b", "b"], (1, 0, 0)),
        (["a", "b", "b", "c", "c", "a"], (0, 2, 0)),
        (["a", "b", "b", "x"], (0, 0, 1)),
        (["a", "b", "b", "c", "x"], (0, 0, 1)),
        (["b", "a", "b", "c"], (0, 0, 1)),
        (["a", "a", "b", "x"], (1, 1, 1)),
        ([], (4, 0, 0)),
    ],
)
def test_lines_are_told_apart(own: list[str], counts: tuple[int, int, int]) -> None:
    found = compare({"file": ["a", "b", "b", "c"]}, {"file": own})
    assert (found.lost, found.duplicated, found.different) == counts
    assert bool(found) == bool(found.found) == any(counts)


def test_files_that_are_missing_and_left_over_are_differences() -> None:
    found = compare({"one": ["a"]}, {"other": ["a"]})
    assert (found.different, found.found) == (2, ["one: not there", "other: left over"])


@pytest.mark.parametrize(("model", "is_alike"), [("out/checkpoints/model.nemo", True), ("inputs/model.nemo", False)])
def test_bytes_of_an_archive_of_the_run_itself_are_not_compared(tmp_path: Path, model: str, is_alike: bool) -> None:
    out, temporary = tmp_path / "out", tmp_path / "tmp"
    out.mkdir()
    temporary.mkdir()
    config = {"gpt_model_file": str(tmp_path / model), "trainer": {"devices": 1}}

    def of_archive(sum_of_it: str) -> dict[str, list[str]]:
        (out / "o.jsonl.meta.json").write_text(json.dumps({"archive_sha256": sum_of_it, "config": config}))
        return dict(results(out, temporary))

    assert (of_archive("a") == of_archive("b")) is is_alike


def test_what_differs_between_two_whole_runs_is_not_compared_and_all_else_is(tmp_path: Path) -> None:
    def written(name: str, seconds: float, devices: int, loss: float) -> dict[str, list[str]]:
        out, temporary = tmp_path / name, tmp_path / f"{name}_tmp"
        (out / "o.jsonl_temp").mkdir(parents=True)
        temporary.mkdir()
        meta = {"created": name, "config": {"seed": 1, "trainer": {"devices": devices}}}
        (out / "o.jsonl.meta.json").write_text(json.dumps(meta))
        (out / "metrics.jsonl").write_text(json.dumps({"step": 1, "timers/a": seconds, "loss": loss}))
        (out / "o.jsonl_temp" / f"rank_{devices}.json").write_text('{"index": 1}\n{"index": 0}\n')
        return dict(results(out, temporary))

    whole = written("a", 1.0, 1, 2.0)
    assert compare(whole, written("b", 9.0, 2, 2.0)).found == []
    found = compare(whole, written("c", 1.0, 1, 2.5))
    assert found.different == 1
    (tmp_path / "d_tmp").mkdir()
    (tmp_path / "d_tmp" / "left").mkdir()
    assert compare({}, dict(results(tmp_path / "none", tmp_path / "d_tmp"))).found == ["$TMPDIR/left: left over"]


def test_changes_of_files_are_told_from_reading() -> None:
    assert changed_path("open", ("/a", "r", os.O_RDONLY)) is None
    assert changed_path("open", ("/a", "w", os.O_WRONLY | os.O_CREAT)) == "/a"
    assert changed_path("os.rename", ("/a", "/b", -1, -1)) == "/b"
    assert changed_path("open", (3, "w", os.O_WRONLY)) is None
    assert changed_path("os.listdir", ("/a",)) is None
    folder = os.open("/", os.O_RDONLY)
    try:
        assert changed_path("os.remove", ("a", folder)) == "/a"
    finally:
        os.close(folder)


@pytest.mark.processes
def test_a_process_stands_still_before_the_change_it_was_to_be_killed_at(tmp_path: Path) -> None:
    write = "from pathlib import Path\nfor name in 'abc': Path({!r}, name).write_text('')"
    trap, out = tmp_path / "trap", tmp_path / "out"
    trap.mkdir()
    out.mkdir()
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT / "scripts/bench/crash_trap"),
        "CRASH_TRAP": str(trap), "CRASH_BELOW": str(out), "CRASH_AT": "3",
    }  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", write.format(str(out))], env=environment) as process:
        while not (trap / "met").exists():
            time.sleep(0.01)
        time.sleep(0.05)
        assert sorted(path.name for path in out.iterdir()) == ["a", "b"]
        assert (trap / "changes").stat().st_size == 3
        process.send_signal(signal.SIGKILL)
