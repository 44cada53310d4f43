"""Which checkpoints stay: the newest, and the best by the monitored value in either direction."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_aligner.config.schema import CheckpointCallbackParams, ExpManagerConfig, OptimConfig
from nemo_aligner.engine.checkpoints.checkpoint_folder import read_state
from nemo_aligner.errors import ConfigError, StoppedEarly, TrainingError
from nemo_aligner.stages.checkpoint_names import log_dir
from nemo_aligner.stages.checkpoints import Checkpoints
from nemo_aligner.stages.run_checks import check_monitor, check_training_settings
from nemo_aligner.stages.supervised.monitors import monitors
from tests.fakes import OneProcess

VALUES = [3.0, 1.0, 5.0, 2.0, 4.0]  # of steps 1 to 5


class Written:
    """A save whose parts are written after it was asked for once, and which cannot be given its name twice."""

    def __init__(self, appear: Callable[[], None]) -> None:
        self._appear, self._asked = appear, 0

    def done(self) -> bool:
        self._asked += 1
        return self._asked > 1

    def finish(self) -> None:
        self._appear()


class Saver:
    """A model that saves nothing but its state."""

    def save_training_state(self, folder: Path, state: dict[str, Any]) -> None:
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"format": 1, **state}))

    def save_in_background(self, folder: Path, state: dict[str, Any]) -> Written:
        return Written(lambda: self.save_training_state(folder, state))


def checkpoints(folder: Path, *, validates: bool = True, resume: bool = True, **params: Any) -> Checkpoints:
    given = CheckpointCallbackParams(**{"monitor": "val_loss", **params})
    exp = ExpManagerConfig(
        explicit_log_dir=str(folder), name="m", checkpoint_callback_params=given, resume_if_exists=resume
    )
    return Checkpoints(exp, OneProcess(), metrics=monitors(()), validates=validates)  # type: ignore[arg-type]


def save(made: Checkpoints, values: list[float], monitor: str = "val_loss", first: int = 1) -> None:
    for step, value in enumerate(values, first):
        state = {"step": step, "consumed_samples": 4 * step}
        made.save(Saver(), state, {monitor: value, "global_step": step})  # type: ignore[arg-type]


def steps(made: Checkpoints) -> list[int]:
    return sorted(json.loads(path.read_text())["step"] for path in made.root.glob("*/state.json"))


@pytest.mark.parametrize(
    ("mode", "top_k", "kept"),
    [
        ("min", 1, [2, 5]),
        ("max", 1, [3, 5]),
        ("min", 2, [2, 4, 5]),
        ("max", 2, [3, 5]),
        ("min", 0, [5]),
        ("max", -1, [1, 2, 3, 4, 5]),
    ],
)
def test_the_best_by_mode_and_the_newest_are_kept(tmp_path: Path, mode: str, top_k: int, kept: list[int]) -> None:
    made = checkpoints(tmp_path, mode=mode, save_top_k=top_k)
    save(made, VALUES)
    assert steps(made) == kept


def test_the_default_is_the_least_validation_loss(tmp_path: Path) -> None:
    made = checkpoints(tmp_path, save_top_k=1)
    save(made, [1.0, 2.0, 3.0])
    assert steps(made) == [1, 3]


def test_one_checkpoint_is_the_last_and_it_is_the_newest(tmp_path: Path) -> None:
    made = checkpoints(tmp_path, save_top_k=-1)
    save(made, VALUES)
    [last] = made.root.glob("*-last")
    assert json.loads((last / "state.json").read_text())["step"] == 5
    assert last == made.newest()


def test_a_value_that_is_not_there_or_no_number_is_the_worst_of_all(tmp_path: Path) -> None:
    for mode in ("min", "max"):
        made = checkpoints(tmp_path / mode, mode=mode, save_top_k=1)
        save(made, [math.nan, 7.0, math.nan, 8.0])
        assert steps(made) == [2, 4] if mode == "min" else [4]
        save(made, [1.0], monitor="loss", first=5)
        assert steps(made) == ([2, 5] if mode == "min" else [4, 5])


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("place", range(4))
def test_no_number_is_never_the_best_wherever_it_stands(tmp_path: Path, mode: str, place: int) -> None:
    made = checkpoints(tmp_path, mode=mode, save_top_k=2)
    values = [1.0, 2.0, 3.0]
    values.insert(place, math.nan)
    save(made, [*values, math.nan])
    best = sorted((1.0, 2.0, 3.0), reverse=mode == "max")[:2]
    assert steps(made) == sorted([*(values.index(value) + 1 for value in best), 5])


def test_equals_are_kept_by_the_later_step(tmp_path: Path) -> None:
    made = checkpoints(tmp_path, save_top_k=1)
    save(made, [2.0, 2.0, 9.0])
    assert steps(made) == [2, 3]


def test_damaged_checkpoints_go_first_and_those_of_others_are_left_alone(tmp_path: Path) -> None:
    made = checkpoints(tmp_path, mode="min", save_top_k=1)
    save(made, [3.0])
    (made.root / "m--others").mkdir()  # called like ours
    state = {"format": 1, "run": "other", "step": 9, "monitored": 0.0}
    (made.root / "m--others" / "state.json").write_text(json.dumps(state))
    (made.root / "m--damaged").mkdir()
    (made.root / "m--damaged" / "state.json").write_text("{")
    save(made, [4.0], first=2)
    assert not (made.root / "m--damaged").exists()
    assert steps(made) == [1, 2, 9]


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_what_a_kill_kept_a_save_from_dropping_is_dropped_when_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    made = checkpoints(tmp_path, mode="min", save_top_k=0)
    for step in (1, 2):
        Saver().save_training_state(made.root / f"m--{step}", {"step": step, "run": "m", "monitored": 0.0})
        (made.root / f"m--{step}" / "shards").mkdir()
    changes = 0

    def killed(change: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            nonlocal changes
            changes += 1
            if changes == at:
                raise SystemExit(137)
            return change(*arguments, **named)

        return counted

    with monkeypatch.context() as patch:
        for name in ("rename", "unlink", "rmdir"):
            patch.setattr(os, name, killed(getattr(os, name)))
        with pytest.raises(SystemExit):
            save(made, [3.0], first=3)
    newest = made.newest()
    assert newest is not None
    assert read_state(newest)["step"] == 3
    made.drop_others(newest)
    assert list(made.root.iterdir()) == [newest]


@pytest.mark.parametrize("monitor", ["val_loss", "loss"])
def test_without_validation_the_newest_stand_in_for_the_best_by_a_validation_value(
    tmp_path: Path, monitor: str
) -> None:
    made = checkpoints(tmp_path, validates=False, save_top_k=2, monitor=monitor)
    save(made, [1.0, 2.0, 3.0, 4.0], monitor="loss")
    assert steps(made) == ([3, 4] if monitor == "val_loss" else [1, 2, 4])


@pytest.mark.parametrize(
    ("params", "says"),
    [({"mode": "best"}, r"params\.mode: 'best' is not min or max"), ({"monitor": "f1"}, r"params\.monitor: 'f1'")],
)
def test_what_cannot_be_monitored_is_refused(tmp_path: Path, params: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        checkpoints(tmp_path, **params)


def test_a_run_that_does_not_resume_begins_anew_and_keeps_the_log_of_others(tmp_path: Path) -> None:
    made = checkpoints(tmp_path)
    save(made, VALUES)
    assert made.logged_before_any == 0
    anew = checkpoints(tmp_path, resume=False)
    assert anew.newest() is None
    assert anew.logged_before_any is None


def test_the_log_folder_is_the_explicit_one_or_lies_below_exp_dir() -> None:
    assert log_dir(ExpManagerConfig(name="m", explicit_log_dir="/x", exp_dir="/y")) == Path("/x")
    assert log_dir(ExpManagerConfig(name="m", exp_dir="/y")) == Path("/y/m")
    assert log_dir(ExpManagerConfig(name="m")) == Path("nemo_experiments/m")


class Loader(Saver):
    """What it was loaded from last."""

    def load_training_state(self, folder: Path) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text())
        self.step = state["step"]
        return state


@pytest.mark.parametrize(("mode", "best"), [("min", 2), ("max", 3)])
def test_save_best_model_goes_back_to_the_best_step_and_only_then(tmp_path: Path, mode: str, best: int) -> None:
    for asked in (True, False):
        made = checkpoints(tmp_path / str(asked), mode=mode, save_top_k=1, save_best_model=asked)
        save(made, VALUES)
        model = Loader()
        made.restore_best(model)  # type: ignore[arg-type]
        assert getattr(model, "step", None) == (best if asked else None)


def test_checkpoints_are_called_as_filename_says(tmp_path: Path) -> None:
    made = checkpoints(tmp_path, save_top_k=-1, filename="run-{val_loss:.2f}-{step}-{consumed_samples}")
    save(made, [1.0, 2.345])
    names = {path.name for path in made.root.iterdir()}
    assert names == {"run-val_loss=1.00-step=1-consumed_samples=4", "run-val_loss=2.35-step=2-consumed_samples=8-last"}
    again = checkpoints(tmp_path, save_top_k=1, filename="{global_step}")
    save(again, [9.0], first=3)
    assert {path.name for path in made.root.iterdir()} == {
        "run-val_loss=1.00-step=1-consumed_samples=4", "global_step=3-last"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("filename", "says"),
    [
        ("{step}-{f1:.3f}", "{f1} is not logged; one of consumed_samples, epoch, "),
        ("{step}-{val_loss:.3q}", "'.3q' is not how a number is written; {val_loss:.3f} would be"),
        ("{val_loss:.3f}", "{step} has to be in it"),
        ("a/{step}", "a slash is not for names"),
        ("{step}-{", "braces are for fields"),
    ],
)
def test_a_filename_that_names_nothing_or_the_same_thing_twice_is_refused(filename: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_monitor(CheckpointCallbackParams(filename=filename), monitors(()))
    assert str(caught.value).startswith("exp_manager.checkpoint_callback_params.filename: ")
    assert says in str(caught.value)


@pytest.mark.parametrize(("interval", "callback"), [(0, True), (1, False)])
def test_the_best_of_no_checkpoints_is_refused(interval: int, callback: bool) -> None:
    exp = ExpManagerConfig(
        create_checkpoint_callback=callback, checkpoint_callback_params=CheckpointCallbackParams(save_best_model=True)
    )
    with pytest.raises(ConfigError, match=r"save_best_model: the best of the checkpoints, and none is saved"):
        check_training_settings(exp, OptimConfig(), monitors(()), interval)


def test_in_the_background_nothing_is_dropped_before_the_newer_one_is_there(tmp_path: Path) -> None:
    made = checkpoints(tmp_path, save_top_k=0, async_save=True)
    save(made, [1.0])
    assert steps(made) == []
    made.settle(wait=False)
    assert steps(made) == [], "not written yet"
    made.settle(wait=False)
    assert steps(made) == [1]
    save(made, [2.0], first=2)
    assert steps(made) == [1]
    save(made, [3.0], first=3)
    assert steps(made) == [2], "one at a time"
    made.settle()
    assert steps(made) == [3]
    made.settle()


@pytest.mark.parametrize(
    ("end", "there"),
    [(None, True), (StoppedEarly, True), (TrainingError, True), (OSError, False), (KeyboardInterrupt, False)],
)
def test_however_the_steps_end_on_all_ranks_what_is_being_written_appears(
    tmp_path: Path, end: type[BaseException] | None, there: bool
) -> None:
    """After a fault of one rank alone, none may wait for the others."""
    made = checkpoints(tmp_path, async_save=True)
    with contextlib.nullcontext() if end is None else pytest.raises(end), made:
        save(made, [1.0])
        if end is not None:
            raise end
    assert bool(steps(made)) == there


def test_checkpoints_in_the_background_are_refused_where_there_are_none() -> None:
    exp = ExpManagerConfig(
        create_checkpoint_callback=False, checkpoint_callback_params=CheckpointCallbackParams(async_save=True)
    )
    with pytest.raises(ConfigError, match=r"params\.async_save: no checkpoint is saved, with exp_manager\.create_ch"):
        check_training_settings(exp, OptimConfig(), monitors(()), 1)
