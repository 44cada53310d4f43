"""Scalars of a run on disk."""

from __future__ import annotations

import contextlib
import gc
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_aligner import metrics
from nemo_aligner.errors import OutputError, StoppedEarly
from nemo_aligner.metrics import MetricsLogger, Progress, Timers


def test_what_was_logged_after_the_checkpoint_is_cut_off_when_the_run_goes_on(tmp_path: Path) -> None:
    first = MetricsLogger(tmp_path, tensorboard=False)
    first.log(1, "train", {"loss": 2.0})
    position = first.position
    first.log(2, "train", {"loss": 1.0})
    first.close()
    second = MetricsLogger(tmp_path, tensorboard=False, resumed_at=position)
    second.log(2, "train", {"loss": 0.5})
    second.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": 0.5}]


def test_a_full_disk_ends_in_one_line_that_names_the_folder(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    logger = MetricsLogger(tmp_path, tensorboard=False)
    with pytest.raises(OutputError, match=f"cannot write metrics into {tmp_path}: No space left"):
        logger.log(1, "train", {"loss": 2.0})


def test_a_log_that_others_wrote_is_gone_on_with_where_the_run_does_not_resume(tmp_path: Path) -> None:
    for step in (1, 2):
        logger = MetricsLogger(tmp_path, tensorboard=False)
        logger.log(step, "train", {"loss": 0.0})
        assert logger.position == (tmp_path / "metrics.jsonl").stat().st_size
        logger.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


class Kept:
    """A logger elsewhere."""

    def __init__(self, continues: bool) -> None:
        self.continues, self.rows, self.status = continues, list[tuple[int, dict[str, float]]](), ""
        self.tables: list[tuple[int, str, Any]] = []
        self.notes: dict[str, str] = {}

    def log(self, step: int, scalars: dict[str, float]) -> None:
        self.rows.append((step, scalars))

    def log_table(self, step: int, name: str, rows: Any) -> None:
        self.tables.append((step, name, rows))

    def note(self, name: str, value: str) -> None:
        self.notes[name] = value

    def archived(self, path: Path) -> None:
        pass

    def close(self, status: str) -> None:
        self.status = status


def test_a_logger_that_goes_on_gets_what_was_cut_off_once_and_a_new_one_gets_all(tmp_path: Path) -> None:
    first = MetricsLogger(tmp_path, tensorboard=False)
    first.log(1, "train", {"loss": 1.0})
    position = first.position
    first.log(2, "train", {"loss": 2.0})
    first.log(2, "val", {"loss": 2.5})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3, "tra')  # torn by a kill
    old, new = Kept(True), Kept(False)
    second = MetricsLogger(tmp_path, tensorboard=False, sinks=[old, new], resumed_at=position, samples=2)
    again = [(2, "train"), (2, "val"), (3, "train"), (3, "val")]
    samples = [{"input": f"q{i}", "reward": i} for i in range(3)]
    for step, prefix in again:
        second.log(step, prefix, {"loss": 0.0}, samples if prefix == "val" else ())
    second.note("archive_sha256", "abc")
    second.close("aborted")
    assert new.tables == [(step, "table/val", samples[:2]) for step in (2, 3)]
    assert old.tables == new.tables[1:]
    assert old.notes == new.notes == {"archive_sha256": "abc"}
    assert new.rows == [(step, {f"{prefix}/loss": 0.0}) for step, prefix in again]
    assert old.rows == new.rows[2:]
    assert old.status == new.status == "aborted"


def test_tensorboard_gets_every_value_at_its_step(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = MetricsLogger(tmp_path, tensorboard=True)
    for step in (1, 5):
        logger.log(step, "train", {"loss": step / 2, "lr": 1})
    logger.close()
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert sorted(found.Tags()["scalars"]) == ["train/loss", "train/lr"]
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(1, 0.5), (5, 2.5)]


def test_tensorboard_has_no_gap_and_nothing_twice_after_a_kill(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    first = MetricsLogger(tmp_path, tensorboard=False)
    first.log(1, "train", {"loss": 1.0})  # a kill took what TensorBoard's writer had of it
    first.log(2, "train", {"loss": 2.0})
    position = first.position
    first.log(3, "train", {"loss": 3.0})
    first.close()
    with SummaryWriter(str(tmp_path)) as writer:
        for step in (2, 3):
            writer.add_scalar("train/loss", float(step), step, walltime=1e9 + step)
    [events] = tmp_path.glob("events.*")
    with events.open("ab") as stream:
        stream.write(b"\x18\0\0\0")  # torn
    second = MetricsLogger(tmp_path, tensorboard=True, resumed_at=position)
    second.log(3, "train", {"loss": 3.5})
    second.close()
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 3.5)]
    assert found.Scalars("train/loss")[1].wall_time == 1e9 + 2


@pytest.mark.parametrize("is_killed_at_the_end", [False, True])
def test_tensorboard_shows_config_samples_letter_by_letter_and_what_was_noted_each_once_after_a_kill(
    is_killed_at_the_end: bool, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def log(logger: MetricsLogger, step: int) -> None:
        rows = [
            {"input": "*a*\n<b>", "output": f"step {step}", "reward": 0.125},
            {"input": "q", "output": "", "kl": None},
        ]
        logger.log(step, "val", {"loss": 1.0}, rows)

    first = MetricsLogger(tmp_path, tensorboard=True, config={"seed": 1}, samples=1)
    log(first, 1)
    position = first.position
    log(first, 2)
    first.close()
    second = MetricsLogger(tmp_path, tensorboard=True, config={"seed": 2}, samples=2, resumed_at=position)
    log(second, 2)
    second.archived(tmp_path / "m.nemo", "abc")
    end = second.position
    second.close()
    if is_killed_at_the_end:  # with nothing left to log
        third = MetricsLogger(tmp_path, tensorboard=True, config={"seed": 2}, samples=2, resumed_at=end)
        third.archived(tmp_path / "m.nemo", "abc")
        third.close()
    found = EventAccumulator(str(tmp_path))
    found.Reload()

    def texts(tag: str) -> list[tuple[int, str]]:
        return [(event.step, event.tensor_proto.string_val[0].decode()) for event in found.Tensors(tag)]

    assert texts("config") == [(0, '    {\n     "seed": 2\n    }\n')]
    sample = "**reward 0.125**\n\ninput\n\n    *a*\n    <b>\n\n\noutput\n\n    step {}\n"
    assert texts("table/val") == [
        (1, sample.format(1)),
        (2, sample.format(2) + "\n\n**kl None**\n\ninput\n\n    q\n\n\noutput\n\n"),
    ]
    assert texts("archive_sha256") == [(2, "abc")]
    assert [(event.step, event.value) for event in found.Scalars("val/loss")] == [(1, 1.0), (2, 1.0)]


@pytest.mark.parametrize("damage", ["{", "[]", '{"train/loss": 1.0}', '{"step": 1, "train/loss": null}'])
def test_a_damaged_line_that_a_resumed_run_would_show_again_is_named(tmp_path: Path, damage: str) -> None:
    content = '{"step": 1, "train/loss": 1.0}\n' + damage + "\n"
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(OutputError, match=rf"^{tmp_path}/metrics\.jsonl:2: damaged; remove that line$"):
        MetricsLogger(tmp_path, tensorboard=True, resumed_at=len(content))


def test_phases_add_up_and_count_what_fails_too(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now[0]))
    timers = Timers()
    for seconds in (2.0, 3.0):
        with timers.phase("generate"):
            now[0] += seconds

    def fail() -> None:
        with timers.phase("train"), timers.phase("inner"):
            now[0] += 0.5
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert timers.seconds == {"generate": 5.0, "train": 0.5, "inner": 0.5}


def test_progress_counts_from_what_was_done_and_only_one_rank_shows_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [10.0]
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with Progress("training", 10, show=True, done=4, unit="step") as bar:
        now[0] = 10.5
        bar.advance(3, 700, loss=0.123456)
        bar.advance(2, 300, loss=0.123456)
    said = capsys.readouterr().err
    assert "training" in said
    assert "9/10" in said
    assert "tokens/s=2000" in said, "over all tokens since the start"
    assert "loss=0.1235" in said
    assert "step" in said
    with Progress("training", 10, show=False) as hidden:
        hidden.advance(3, 700)
    assert capsys.readouterr().err == ""


def test_a_log_file_gets_a_line_a_minute_with_rate_and_eta_and_one_at_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with Progress("training", 1000, show=True, done=100, unit="step") as bar:
        for second in range(1, 151):
            now[0] = float(second)
            bar.advance(2, loss=1 / second)
    assert capsys.readouterr().err.splitlines() == [
        "training:  22% 220/1000 [01:00<06:30,  2.00step/s, loss=0.01667]",
        "training:  34% 340/1000 [02:00<05:30,  2.00step/s, loss=0.008333]",
        "training:  40% 400/1000 [02:30<05:00,  2.00step/s, loss=0.006667]",
    ]


def test_a_terminal_gets_one_bar_that_is_redrawn(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("training", 3, show=True) as bar:
        for _ in range(3):
            bar.advance(1, loss=0.5)
    *redrawn, end = capsys.readouterr().err.split("\n")
    assert [end, len(redrawn)] == ["", 1]
    assert redrawn[0].count("\r") >= 2
    assert "3/3" in redrawn[0].rpartition("\r")[2]
    with Progress("training", 3, show=False) as hidden:
        hidden.advance(3)
    assert capsys.readouterr().err == ""


def test_a_bar_ends_before_what_is_said_of_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(StoppedEarly), Progress("labeling", 10, show=True) as bar:
        bar.advance(2)
        raise StoppedEarly
    print("stopped early", file=sys.stderr)
    gc.collect()
    assert capsys.readouterr().err.endswith("\nstopped early\n")


def test_progress_counts_samples_from_nothing_unless_told_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("labeling", 10, show=True) as bar:
        bar.advance(2)
    said = capsys.readouterr().err
    assert "2/10" in said
    assert "sample" in said
    assert "tokens/s" not in said
