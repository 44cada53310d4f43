"""The training loop with a fake model: which examples it sees, when it saves, how it stops."""

from __future__ import annotations

import dataclasses
import json
import logging
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
from nemo_aligner.errors import CheckpointError, ConfigError, StoppedEarly
from nemo_aligner.stages.batches import BatchPlan, microbatches
from nemo_aligner.stages.supervised.loop import Task, sft_objective, train
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
        self.rows_together = max(len(m.tokens) for m in real)
        return StepMetrics(1.0 / len(self.seen), 1.0, 0.1)

    def evaluate(self, microbatches: list[Microbatch], objective: Any) -> StepMetrics:
        real = [m for m in microbatches if m.fields["weights"].any()]
        self.validated_together = max(len(m.tokens) for m in real)
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
    config = LoopConfig(**{"skip_validation": True, **loop})
    plan = BatchPlan(len(EXAMPLES), 4, seed=3, shuffle=True, limit=config.train_limit)
    return Task(EXAMPLES, EXAMPLES[:2], sft_objective, plan, 2, config, "trainer.sft")


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


@pytest.mark.parametrize("limit", [1, 2, 0.34])
def test_a_limit_of_training_batches_cuts_each_epoch_which_has_an_order_of_its_own(
    tmp_path: Path, limit: float
) -> None:
    limited, whole, per_epoch = Recorder(), Recorder(), 1 if limit == 1 else 2
    train(task(max_epochs=3, limit_train_batches=limit), limited, experiment(tmp_path / "limited"))
    train(task(max_epochs=3), whole, experiment(tmp_path / "whole"))
    assert limited.seen == [whole.seen[3 * epoch + step] for epoch in range(3) for step in range(per_epoch)]


def test_a_run_that_ends_before_max_steps_names_the_key_that_was_given(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        train(changed(loop=LoopConfig(max_steps=99), block="trainer.rm"), Recorder(), experiment(tmp_path))
    assert "trainer.rm.max_steps=99: the data ends after 3 steps" in caplog.text


@pytest.mark.parametrize(("stop", "limit", "per_epoch"), [(1, 1.0, 3), (2, 1.0, 3), (4, 1.0, 3), (1, 2, 2), (3, 2, 2)])
def test_a_resumed_run_sees_the_batches_it_had_not_seen(
    tmp_path: Path, stop: int, limit: float, per_epoch: int
) -> None:
    whole, first, second = Recorder(), Recorder(), Recorder()
    loop = {"max_epochs": 2, "limit_train_batches": limit}
    train(task(**loop), whole, experiment(tmp_path / "whole"))

    def stopping(*args: Any) -> StepMetrics:
        metrics = Recorder.train_step(first, *args)
        first.cluster.any = lambda flag: len(first.seen) >= stop  # type: ignore[method-assign]
        return metrics

    first.train_step = stopping  # type: ignore[method-assign]
    with pytest.raises(StoppedEarly, match=f"step {stop} of {2 * per_epoch}"):
        train(task(**loop), first, experiment(tmp_path / "parts"))
    train(task(**loop), second, experiment(tmp_path / "parts"))
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


@pytest.mark.parametrize(("mode", "best"), [("max", 1), ("min", 6)])
def test_the_archive_is_that_of_the_best_checkpoint_where_asked_also_after_a_rerun(
    tmp_path: Path, mode: str, best: int
) -> None:
    class Archiver(Recorder):
        weights: Any = "the last"

        def load_training_state(self, folder: Path) -> dict[str, Any]:
            state = super().load_training_state(folder)
            self.weights = state["step"]
            return state

        def save_nemo(self, path: Path, notes: dict[str, Any] | None = None) -> None:
            super().save_nemo(path, notes)
            path.write_text(str(self.weights))

    for asked, archived in ((False, "the last"), (True, str(best))):
        params = CheckpointCallbackParams(monitor="loss", mode=mode, save_top_k=1, save_best_model=asked)
        exp = experiment(tmp_path / str(asked), checkpoint_callback_params=params)
        train(task(max_epochs=2, save_interval=1), Archiver(), exp)  # the loss is 1/step
        path = tmp_path / str(asked) / "checkpoints" / "m.nemo"
        assert path.read_text() == archived
        path.unlink()
        train(task(max_epochs=2, save_interval=1), Archiver(), exp)
        assert path.read_text() == ("6" if archived == "the last" else archived)


def test_a_monitor_that_is_never_logged_is_refused_with_the_names_that_are(tmp_path: Path) -> None:
    params = CheckpointCallbackParams(monitor="validation_loss")
    with pytest.raises(ConfigError, match=r"monitor: 'validation_loss' is not logged; one of .*val_loss"):
        train(task(), Recorder(), experiment(tmp_path, checkpoint_callback_params=params))


@pytest.mark.parametrize(("budget", "together"), [(None, 2), (1, 1)])
def test_micro_batches_are_within_the_tasks_budget_of_tokens(tmp_path: Path, budget: int | None, together: int) -> None:
    model = Recorder()
    train(dataclasses.replace(task(), micro_batch_tokens=budget), model, experiment(tmp_path))
    assert model.rows_together == together


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
        (task(limit_train_batches=2), "limit_train_batches = None, this run has 2"),
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


def test_a_run_that_must_resume_says_so_where_there_is_no_checkpoint(tmp_path: Path) -> None:
    must = {"resume_ignore_no_checkpoint": False}
    model = Recorder()
    with pytest.raises(ConfigError, match=r"^exp_manager.resume_ignore_no_checkpoint: no checkpoint to resume from"):
        train(task(), model, experiment(tmp_path, **must))
    assert model.seen == []
    train(task(), Recorder(), experiment(tmp_path, **must, resume_if_exists=False))
    train(task(), Recorder(), experiment(tmp_path, **must))
