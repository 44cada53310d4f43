"""The training loop with a fake model: which examples it sees, when it saves, how it stops."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_aligner import loggers
from nemo_aligner.config.schema import CheckpointCallbackParams, ExpManagerConfig
from nemo_aligner.config.supervised import LoopConfig
from nemo_aligner.data.supervised import Example
from nemo_aligner.engine.interfaces import Microbatch, StepMetrics
from nemo_aligner.errors import CheckpointError, ConfigError, StoppedEarly, TrainingError
from nemo_aligner.stages.batches import BatchPlan, microbatches
from nemo_aligner.stages.supervised.loop import Task, check_not_empty, reward_notes, sft_objective, train
from tests.fakes import ByteTokenizer, OneProcess, RecordingLogger

EXAMPLES = [Example(([100 + i, *range(i % 4), 7],), ([0] + [1] * (i % 4 + 1),)) for i in range(11)]


class Recorder:
    """A model that remembers the first token of every real row it was trained on."""

    max_sequence_length = 64

    def __init__(self) -> None:
        self.cluster, self.tokenizer = OneProcess(), ByteTokenizer()
        self.seen: list[list[int]] = []
        self.validated: list[tuple[int, list[int]]] = []  # (steps before it, first tokens)

    def train_step(self, microbatches: list[Microbatch], objective: Any) -> StepMetrics:
        real = [m for m in microbatches if m.fields["weights"].any()]
        self.seen.append(sorted(int(row[0]) for m in real for row in m.tokens))
        return StepMetrics(1.0 / len(self.seen), 1.0, 0.1)

    def evaluate(self, microbatches: list[Microbatch], objective: Any) -> StepMetrics:
        real = [m for m in microbatches if m.fields["weights"].any()]
        self.validated.append((len(self.seen), sorted(int(row[0]) for m in real for row in m.tokens)))
        return StepMetrics(float(-len(self.seen)), 0.0, 0.0)

    def save_training_state(self, folder: Path, state: dict[str, Any]) -> None:
        folder.mkdir()
        (folder / "state.json").write_text(json.dumps({"format": 1, **state}))

    def load_training_state(self, folder: Path) -> dict[str, Any]:
        return json.loads((folder / "state.json").read_text())

    def archive_hash(self) -> str:
        return "0123456789abcdef" * 4

    def save_nemo(self, path: Path, notes: dict[str, Any] | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("archive")


def task(**loop: Any) -> Task:
    plan = BatchPlan(len(EXAMPLES), 4, seed=3, shuffle=True)
    return Task(EXAMPLES, EXAMPLES[:2], sft_objective, plan, 2, LoopConfig(**{"skip_validation": True, **loop}))


def experiment(folder: Path, **more: Any) -> ExpManagerConfig:
    params = CheckpointCallbackParams(monitor="global_step", mode="max", save_top_k=1)
    options = {"explicit_log_dir": str(folder), "name": "m", "create_tensorboard_logger": False}
    return ExpManagerConfig(**{"checkpoint_callback_params": params, **options, **more})


def test_each_epoch_trains_every_example_once_the_last_small_batch_too(tmp_path: Path) -> None:
    model = Recorder()
    train(task(max_epochs=2), model, experiment(tmp_path))
    assert [len(batch) for batch in model.seen] == [4, 4, 3, 4, 4, 3]
    for epoch in (model.seen[:3], model.seen[3:]):
        assert sorted(i for batch in epoch for i in batch) == [100 + i for i in range(11)]
    assert model.seen[:3] != model.seen[3:], "epochs are shuffled differently"
    assert (tmp_path / "checkpoints" / "m.nemo").exists()


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_resumed_run_sees_the_batches_it_had_not_seen(tmp_path: Path, stop: int) -> None:
    whole, first, second = Recorder(), Recorder(), Recorder()
    train(task(max_epochs=2), whole, experiment(tmp_path / "whole"))

    def stopping(*args: Any) -> StepMetrics:
        metrics = Recorder.train_step(first, *args)
        first.cluster.any = lambda flag: len(first.seen) >= stop  # type: ignore[method-assign]
        return metrics

    first.train_step = stopping  # type: ignore[method-assign]
    with pytest.raises(StoppedEarly, match=f"step {stop} of 6"):
        train(task(max_epochs=2), first, experiment(tmp_path / "parts"))
    train(task(max_epochs=2), second, experiment(tmp_path / "parts"))
    assert first.seen + second.seen == whole.seen


@pytest.mark.parametrize(
    ("loop", "steps"),
    [
        ({"max_steps": 2}, 2),
        ({"max_steps": 99}, 3),
        ({"limit_train_batches": 1}, 1),
        ({"limit_train_batches": 0.5}, 2),
        ({"max_epochs": 3, "max_steps": -1}, 9),
    ],
)
def test_the_number_of_steps_is_the_smallest_of_the_limits(loop: dict[str, Any], steps: int) -> None:
    assert task(**loop).steps == steps


@pytest.mark.parametrize("top_k", [0, 1, 2, -1])
def test_the_best_and_the_newest_checkpoints_are_kept(tmp_path: Path, top_k: int) -> None:
    params = CheckpointCallbackParams(monitor="loss", mode="max", save_top_k=top_k)
    train(task(max_epochs=2, save_interval=1), Recorder(), experiment(tmp_path, checkpoint_callback_params=params))
    steps = sorted(json.loads(p.read_text())["step"] for p in (tmp_path / "checkpoints").glob("*/state.json"))
    # the loss is 1/step, so the earliest are the best by `max`
    expected = {0: [6], 1: [1, 6], 2: [1, 2, 6], -1: [1, 2, 3, 4, 5, 6]}[top_k]
    assert steps == expected
    assert len(list((tmp_path / "checkpoints").glob("*-last"))) == 1


def test_a_monitor_that_is_never_logged_is_refused_with_the_names_that_are(tmp_path: Path) -> None:
    params = CheckpointCallbackParams(monitor="validation_loss")
    with pytest.raises(ConfigError, match=r"monitor: 'validation_loss' is not logged; one of .*val_loss"):
        train(task(), Recorder(), experiment(tmp_path, checkpoint_callback_params=params))


def test_every_rank_has_as_many_micro_batches_and_together_every_example_once() -> None:
    for indices in (range(11), range(5), range(1)):
        parts = [microbatches(EXAMPLES, indices, size=2, dp_rank=r, dp_size=3, pad_id=0) for r in range(3)]
        assert len({len(part) for part in parts}) == 1
        real = [m for part in parts for m in part if m.fields["weights"].all()]
        assert sorted(int(row[0]) for m in real for row in m.tokens) == [100 + i for i in indices]


def test_masks_follow_their_rows_and_nothing_is_predicted_at_the_first_place() -> None:
    [batch] = microbatches([Example(([5, 6, 7],), ([1, 0, 1],))], [0], size=1, dp_rank=0, dp_size=1, pad_id=0)
    assert torch.equal(batch.fields["loss_mask"], torch.tensor([[0.0, 0.0, 1.0]]))


@pytest.mark.parametrize(("stops", "status"), [(None, "success"), (StoppedEarly, "aborted"), (ValueError, "failed")])
def test_loggers_of_other_packages_get_what_metrics_jsonl_has_and_how_the_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: type[Exception] | None, status: str
) -> None:
    found, model = RecordingLogger(), Recorder()
    monkeypatch.setitem(loggers._STARTED, "dllogger", lambda *args: (found, None))
    exp = experiment(tmp_path, create_dllogger_logger=True)
    if stops is StoppedEarly:
        model.cluster.any = lambda flag: len(model.seen) >= 2  # type: ignore[method-assign]
    if stops is ValueError:
        model.evaluate = lambda *args: 1 / 0  # type: ignore[method-assign, assignment]
    if stops is None:
        train(task(skip_validation=False), model, exp, {"name": "m"})
    else:
        with pytest.raises(stops if stops is StoppedEarly else ZeroDivisionError):
            train(task(skip_validation=stops is StoppedEarly, val_check_interval=2), model, exp, {"name": "m"})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [{"step": step, **values} for step, values in found.rows] == lines
    assert len(lines) == (4 if stops is None else 2)
    assert found.config == {"name": "m"}
    assert found.status == status
    assert found.archive == (str(tmp_path / "checkpoints" / "m.nemo") if stops is None else "")


def changed(**more: Any) -> Task:
    return dataclasses.replace(task(), **more)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (changed(train=EXAMPLES[:-1]), "training examples = "),
        (changed(train=[dataclasses.replace(EXAMPLES[0], masks=([1, 1],)), *EXAMPLES[1:]]), "training examples = "),
        (changed(plan=BatchPlan(len(EXAMPLES), 5, seed=3, shuffle=True)), "global_batch_size = 4, this run has 5"),
        (changed(plan=BatchPlan(len(EXAMPLES), 4, seed=4, shuffle=True)), "model.seed = 3, this run has 4"),
        (changed(plan=BatchPlan(len(EXAMPLES), 4, seed=3, shuffle=False)), "shuffle = True, this run has False"),
        (changed(plan=BatchPlan(len(EXAMPLES), 4, seed=3, shuffle=True, drop_last=True)), "drop_last = False"),
        (changed(settings={"model.optim.lr": 2.0}), "model.optim.lr = None, this run has 2.0"),
    ],
)
def test_another_run_does_not_go_on_from_a_checkpoint(tmp_path: Path, other: Task, says: str) -> None:
    train(task(), Recorder(), experiment(tmp_path))
    with pytest.raises(CheckpointError, match=f"was made with {re.escape(says)}"):
        train(other, Recorder(), experiment(tmp_path))


def test_another_archive_does_not_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    train(task(), Recorder(), experiment(tmp_path))
    other = Recorder()
    other.archive_hash = lambda: "f" * 64  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="the archive to start from = 0123456789abcdef, this run has ffffffff"):
        train(task(), other, experiment(tmp_path))


def test_what_does_not_change_the_result_may_change_and_a_run_may_be_made_longer(tmp_path: Path) -> None:
    train(task(max_epochs=1, save_interval=2), Recorder(), experiment(tmp_path))
    longer = Recorder()
    train(
        changed(loop=LoopConfig(max_epochs=2, skip_validation=True), micro_batch_size=3), longer, experiment(tmp_path)
    )
    assert len(longer.seen) == 3


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


@pytest.mark.parametrize(("limit", "used"), [(1.0, 11), (0.5, 5), (0.01, 1), (1, 4), (2, 8), (3, 11), (99, 11)])
def test_a_limit_of_validation_batches_is_a_share_or_a_number_of_global_batches(
    tmp_path: Path, limit: float, used: int
) -> None:
    model = Recorder()
    short = changed(validation=EXAMPLES, loop=LoopConfig(limit_val_batches=limit, max_steps=1))
    train(short, model, experiment(tmp_path))
    assert model.validated == [(1, [100 + i for i in range(used)])]


@pytest.mark.parametrize("skip", [True, False])
def test_no_validation_where_it_is_skipped_or_there_is_nothing_to_validate_on(tmp_path: Path, skip: bool) -> None:
    model = Recorder()
    loop = LoopConfig(skip_validation=skip, val_check_interval=1)
    train(changed(validation=EXAMPLES if skip else [], loop=loop), model, experiment(tmp_path))
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
    assert task(max_epochs=2, limit_train_batches=limit).plan.steps_per_epoch == batches
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
    found = reward_notes(True, "binary_ranking", StepMetrics(0.0, 0.0, 0.0, terms), 3)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 5)
    assert found["reward_standardization"] == pytest.approx({"mean": mean, "std": std})
    assert (found["append_eod"], found["reward_model_type"]) == (True, "binary_ranking")
    same = {"accuracy": 0.0, "rewards_all_mean": 2.0, "rewards_all_square": 4.0 - 1e-12}
    assert reward_notes(False, "t", StepMetrics(0.0, 0.0, 0.0, same), 1)["reward_standardization"]["std"] == 0.0


@pytest.mark.parametrize("held_out", [True, False])
def test_the_archives_notes_are_of_all_validation_examples_or_of_the_training_ones(
    tmp_path: Path, held_out: bool
) -> None:
    noted: list[int] = []

    def note(metrics: StepMetrics, count: int) -> dict[str, Any]:
        noted.append(count)
        return {}

    model = Recorder()
    loop = LoopConfig(max_steps=1, limit_val_batches=1, skip_validation=True)
    validation = EXAMPLES[:7] if held_out else []
    noting = changed(validation=validation, loop=loop, metric_names=frozenset({"accuracy"}), archive_notes=note)
    train(noting, model, experiment(tmp_path))
    assert noted == [7 if held_out else 11]
    assert model.validated == [(1, [100 + i for i in range(noted[0])])]


def test_nothing_left_to_train_on_is_named(tmp_path: Path) -> None:
    check_not_empty(EXAMPLES, "a.jsonl")
    with pytest.raises(TrainingError, match=r"a\.jsonl: no row is left"):
        check_not_empty([], "a.jsonl")
