"""When the supervised loop validates, saves and logs, what on, and what of it goes into the archive."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from nemo_aligner.config.schema import CheckpointCallbackParams
from nemo_aligner.config.supervised import LoopConfig
from nemo_aligner.engine.interfaces import Microbatch, StepMetrics
from nemo_aligner.errors import ConfigError, StoppedEarly, TrainingError
from nemo_aligner.stages.batches import BatchPlan
from nemo_aligner.stages.supervised.loop import check_not_empty, reward_notes, train
from tests.fakes import OneProcess
from tests.unit.stages.supervised.test_loop import EXAMPLES, Recorder, changed, experiment, task


def rows_of(folder: Path, name: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if any(key.startswith(f"{name}/") for key in line)]


@pytest.mark.parametrize(
    ("interval", "steps"),
    [(1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (4, [4, 6]), (99, [6]), (1.0, [3, 6]), (0.5, [1, 2, 3, 4, 5, 6])],
)
def test_validation_runs_at_its_interval_and_at_the_end_over_the_validation_examples(
    tmp_path: Path, interval: float, steps: list[int]
) -> None:
    model = Recorder()
    train(task(max_epochs=2, skip_validation=False, val_check_interval=interval), model, experiment(tmp_path))
    assert model.validated == [(step, [100, 101]) for step in steps]
    assert [(row["step"], row["val/loss"]) for row in rows_of(tmp_path, "val")] == [(s, -s) for s in steps]


@pytest.mark.parametrize(
    ("limit", "used"), [(1.0, 11), (None, 11), (0.5, 5), (0.01, 1), (1, 4), (2, 8), (3, 11), (99, 11)]
)
def test_a_limit_of_validation_batches_is_a_share_or_a_number_of_global_batches(
    tmp_path: Path, limit: float | None, used: int
) -> None:
    model = Recorder()
    short = changed(validation=EXAMPLES, loop=LoopConfig(limit_val_batches=limit, max_steps=1))
    train(short, model, experiment(tmp_path))
    assert model.validated == [(1, [100 + i for i in range(used)])]


@pytest.mark.parametrize(("limit", "batches"), [(1.0, 3), (2, 2), (9, 3)])
def test_validation_has_batches_of_its_own_always_the_same(tmp_path: Path, limit: float, batches: int) -> None:
    model, plan = Recorder(), BatchPlan(len(EXAMPLES), 3, seed=5, shuffle=True, drop_last=True)
    loop = LoopConfig(limit_val_batches=limit, max_steps=2, val_check_interval=1)
    own = changed(validation=EXAMPLES, loop=loop, validation_plan=plan, validation_micro_batch_size=1)
    train(own, model, experiment(tmp_path))
    used = sorted(100 + i for step in range(batches) for i in plan.indices(step))
    assert model.validated == [(1, used), (2, used)]
    assert model.validated_together == 1


@pytest.mark.parametrize(
    "switch",
    [{}, {"skip_validation": True}, {"limit_val_batches": 0}, {"limit_val_batches": 0.0}, {"val_check_interval": 0}],
)
def test_no_validation_where_it_is_switched_off_or_there_is_nothing_to_validate_on(
    tmp_path: Path, switch: dict[str, Any]
) -> None:
    model = Recorder()
    loop = LoopConfig(**{"val_check_interval": 1, **switch})
    train(changed(validation=EXAMPLES if switch else [], loop=loop), model, experiment(tmp_path))
    assert model.validated == []
    assert rows_of(tmp_path, "val") == []


@pytest.mark.parametrize(("mode", "kept"), [("min", [6]), ("max", [2, 6])])
def test_the_best_checkpoint_is_that_of_the_validation_before_it(tmp_path: Path, mode: str, kept: list[int]) -> None:
    """The validation loss falls with every step, so the least is the newest."""
    params = CheckpointCallbackParams(monitor="val_loss", mode=mode, save_top_k=1)
    loop = {"max_epochs": 2, "skip_validation": False, "val_check_interval": 2, "save_interval": 2}
    train(task(**loop), Recorder(), experiment(tmp_path, checkpoint_callback_params=params))
    states = [json.loads(path.read_text()) for path in (tmp_path / "checkpoints").glob("*/state.json")]
    assert sorted(state["step"] for state in states) == kept
    assert all(state["monitored"] == -state["step"] for state in states)


class Archived(Recorder):
    """Its archive is the step that it is of; losses go down and up."""

    losses = (9.0, 1.0, 5.0, 0.5, 6.0, 7.0)  # of steps 1 to 6

    def __init__(self, stops_at: int = 0, dies_at: int = 0) -> None:
        super().__init__()
        self.step, self.dies_at = 0, dies_at
        if stops_at:
            self.cluster.any = lambda flag: self.step >= stops_at  # type: ignore[method-assign]

    def train_step(self, microbatches: list[Microbatch], objective: Any) -> StepMetrics:
        self.step += 1
        if self.step == self.dies_at:
            raise KeyboardInterrupt
        return StepMetrics(self.losses[self.step - 1], 1.0, 0.1)

    def evaluate(self, microbatches: list[Microbatch], objective: Any) -> StepMetrics:
        return StepMetrics(self.losses[self.step - 1], 0.0, 0.0)

    def load_training_state(self, folder: Path) -> dict[str, Any]:
        state = super().load_training_state(folder)
        self.step = state["step"]
        return state

    def save_nemo(self, path: Path, notes: dict[str, Any] | None = None) -> None:
        path.write_text(str(self.step))


@pytest.mark.parametrize("end", [{"stops_at": 1}, {"stops_at": 3}, {"stops_at": 4}, {"dies_at": 3}, {"dies_at": 5}])
@pytest.mark.parametrize(
    ("monitor", "validates", "saves", "best"),
    [("val_loss", 2, 2, 4), ("val_loss", 3, 1, 3), ("val_loss", 2, 3, 6), ("val_loss", 4, 4, 4), ("loss", 4, 5, 5)],
)
def test_the_best_is_one_whose_own_step_was_validated_wherever_the_run_was_stopped_or_killed(
    tmp_path: Path, monitor: str, validates: int, saves: int, best: int, end: dict[str, int]
) -> None:
    params = CheckpointCallbackParams(monitor=monitor, save_top_k=1, save_best_model=True)
    loop = {"max_epochs": 2, "skip_validation": False, "val_check_interval": validates, "save_interval": saves}

    def archived(folder: Path, model: Archived) -> list[str]:
        train(task(**loop), model, experiment(folder, checkpoint_callback_params=params))
        return [path.read_text() for path in (folder / "checkpoints").glob("m.nemo")]

    assert archived(tmp_path / "whole", Archived()) == [str(best)]
    with pytest.raises((StoppedEarly, KeyboardInterrupt)):
        archived(tmp_path / "parts", Archived(**end))
    assert archived(tmp_path / "parts", Archived()) == [str(best)]
    kept = [sorted(path.name for path in (tmp_path / part / "checkpoints").iterdir()) for part in ("whole", "parts")]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(("interval", "saved"), [(0, []), (1, [1, 2, 3]), (2, [2, 3]), (3, [3]), (99, [3])])
def test_checkpoints_are_written_at_their_interval_and_at_the_end(
    tmp_path: Path, interval: int, saved: list[int]
) -> None:
    params = CheckpointCallbackParams(monitor="loss", save_top_k=-1)
    exp = experiment(tmp_path, checkpoint_callback_params=params)
    train(task(save_interval=interval), Recorder(), exp)
    states = [json.loads(path.read_text()) for path in (tmp_path / "checkpoints").glob("*/state.json")]
    assert sorted(state["step"] for state in states) == saved
    for state in states:
        assert state["consumed_samples"] == min(11, 4 * state["step"])
        assert state["epoch"] == state["step"] // 3
        assert state["steps"] == 3


def test_no_checkpoints_and_no_archive_where_they_are_turned_off(tmp_path: Path) -> None:
    params = CheckpointCallbackParams(monitor="loss", save_nemo_on_train_end=False)
    exp = experiment(tmp_path, checkpoint_callback_params=params, create_checkpoint_callback=False)
    train(task(save_interval=1), Recorder(), exp)
    assert not (tmp_path / "checkpoints").exists()


def test_every_step_logs_loss_rate_and_gradient_norm(tmp_path: Path) -> None:
    train(task(), Recorder(), experiment(tmp_path))
    assert rows_of(tmp_path, "train") == [
        {"step": step, "train/loss": 1 / step, "train/lr": 0.1, "train/grad_norm": 1.0} for step in (1, 2, 3)
    ]


@pytest.mark.parametrize("monitor", ["val_loss", "train_loss", "loss", "lr", "grad_norm", "epoch", "consumed_samples"])
def test_what_may_be_monitored_has_a_value(tmp_path: Path, monitor: str) -> None:
    params = CheckpointCallbackParams(monitor=monitor, save_top_k=1)
    exp = experiment(tmp_path, checkpoint_callback_params=params)
    train(task(skip_validation=False, val_check_interval=1, max_epochs=2), Recorder(), exp)
    [last] = (tmp_path / "checkpoints").glob("*-last")
    expected = {
        "val_loss": -6.0, "train_loss": 1 / 6, "loss": 1 / 6, "lr": 0.1, "grad_norm": 1.0, "epoch": 2,
        "consumed_samples": 22,
    }  # fmt: skip
    assert json.loads((last / "state.json").read_text())["monitored"] == pytest.approx(expected[monitor])


@pytest.mark.parametrize(
    ("batches", "limit", "per_epoch"),
    [(3, 2, 2), (3, 3, 3), (3, 4, 3), (3, 0.34, 2), (3, 0.33, 1), (3, 0.001, 1), (3, 1.0, 3)],
)
def test_training_batches_are_limited_by_share_or_number_in_each_epoch(
    batches: int, limit: float, per_epoch: int
) -> None:
    assert task(max_epochs=2).plan.steps_per_epoch == batches
    assert task(max_epochs=2, limit_train_batches=limit).steps == 2 * per_epoch


def test_ranks_train_on_their_own_part_of_every_batch(tmp_path: Path) -> None:
    parts = []
    for rank in range(2):
        model = Recorder()
        model.cluster = OneProcess(rank, 2)
        train(task(), model, experiment(tmp_path / str(rank)))
        parts.append(model.seen)
    whole = Recorder()
    train(task(), whole, experiment(tmp_path / "whole"))
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == whole.seen


def test_mean_and_unbiased_std_of_the_held_out_rewards_go_into_the_archive(tmp_path: Path) -> None:
    rewards = [1.0, 4.0, -2.0, 0.5, 3.0, 2.5]  # of three pairs
    mean = sum(rewards) / 6
    terms = {
        "accuracy": 1.0,
        "rewards_all_mean": mean,
        "rewards_all_square": sum(r * r for r in rewards) / 6,
    }
    found = reward_notes(True, "binary_ranking", StepMetrics(0.0, 0.0, 0.0, terms), 3, True)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 5)
    assert found["reward_standardization"] == pytest.approx({"mean": mean, "std": std})
    assert (found["append_eod"], found["reward_model_type"]) == (True, "binary_ranking")
    same = {"accuracy": 0.0, "rewards_all_mean": 2.0, "rewards_all_square": 4.0 - 1e-12}
    assert reward_notes(False, "t", StepMetrics(0.0, 0.0, 0.0, same), 1, True)["reward_standardization"]["std"] == 0.0


@pytest.mark.parametrize("held_out", [True, False])
def test_the_archives_notes_are_of_all_validation_examples_or_of_the_training_ones(
    tmp_path: Path, held_out: bool
) -> None:
    noted: list[int] = []

    def note(metrics: StepMetrics, count: int, is_held_out: bool) -> dict[str, Any]:
        assert is_held_out == held_out
        noted.append(count)
        return {}

    model = Recorder()
    loop = LoopConfig(max_steps=1, limit_val_batches=1, skip_validation=True)
    validation = EXAMPLES[:7] if held_out else []
    noting = changed(validation=validation, loop=loop, metric_names=frozenset({"accuracy"}), archive_notes=note)
    train(noting, model, experiment(tmp_path))
    assert noted == [7 if held_out else 11]
    assert model.validated == [(1, [100 + i for i in range(noted[0])])]


@pytest.mark.parametrize("held_out", [True, False])
def test_figures_of_training_pairs_are_not_called_held_out(held_out: bool, caplog: pytest.LogCaptureFixture) -> None:
    terms = {"accuracy": 0.0, "rewards_all_mean": 2.0, "rewards_all_square": 4.0}
    with caplog.at_level(logging.INFO):
        reward_notes(False, "t", StepMetrics(0.0, 0.0, 0.0, terms), 1, held_out)
    assert caplog.messages[0].startswith("held-out pairs: 1," if held_out else "training pairs: 1,")


def test_a_run_that_was_made_longer_says_so_and_one_that_is_done_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        for epochs in (1, 1, 2):
            train(changed(loop=LoopConfig(max_epochs=epochs, skip_validation=True)), Recorder(), experiment(tmp_path))
    told = [message for message in caplog.messages if "steps are done" in message or "resuming" in message]
    assert [message.partition(": ")[2] or message.partition(" from ")[0] for message in told] == [
        "3 steps are done, nothing is left to train",
        "resuming at step 3 of 6",
    ]
    assert "the run was begun for 3 steps: from here on its schedule is that of 6" in caplog.messages


def test_nothing_left_to_train_on_is_named(tmp_path: Path) -> None:
    check_not_empty(EXAMPLES, "a.jsonl")
    with pytest.raises(TrainingError, match=r"a\.jsonl: no row is left"):
        check_not_empty([], "a.jsonl")


def test_a_time_limit_of_another_form_is_named_by_its_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^exp_manager\.max_time_per_run: '1h'"):
        train(task(), Recorder(), experiment(tmp_path, max_time_per_run="1h"))
