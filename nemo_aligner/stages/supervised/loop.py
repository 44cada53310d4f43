"""Supervised training: one loop, two losses.

    examples ─▶ global batch (seed, step) ─▶ micro-batches ─▶ train_step ─▶ validate? save? ─▶ ... ─▶ <name>.nemo

SFT trains on the answer's tokens, reward-model training on pairs of texts; a Task says in what they differ.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_aligner.algorithms.losses import ranking_loss, sft_loss
from nemo_aligner.config.schema import ExpManagerConfig
from nemo_aligner.config.supervised import LoopConfig
from nemo_aligner.data.supervised import Example
from nemo_aligner.engine.checkpoints.nemo_archive import archive_hash
from nemo_aligner.engine.interfaces import Microbatch, Objective, StepMetrics, TrainableModel
from nemo_aligner.errors import StoppedEarly, TrainingError
from nemo_aligner.metrics import MetricsLogger, Progress
from nemo_aligner.stages.batches import BatchPlan, microbatches
from nemo_aligner.stages.checkpoints import Checkpoints
from nemo_aligner.stages.run_control import RunControl
from nemo_aligner.stages.run_identity import (
    archive_of,
    batch_settings,
    check_same_run,
    tell_end_of_data,
    tell_resumed,
    tokens_hash,
)
from nemo_aligner.stages.run_logger import run_logger
from nemo_aligner.stages.supervised.monitors import monitors

log = logging.getLogger(__name__)


def sft_objective(logprobs: Any, microbatch: Microbatch) -> Any:
    return sft_loss(logprobs, microbatch.fields["loss_mask"])


def ranking_objective(rewards: Any, microbatch: Microbatch) -> Any:
    return ranking_loss(rewards, microbatch.fields["weights"])


@dataclass(frozen=True)
class Task:
    """What a supervised run trains on, and how."""

    train: Sequence[Example]
    validation: Sequence[Example]
    objective: Objective
    plan: BatchPlan
    micro_batch_size: int
    loop: LoopConfig
    block: str  # where `loop` is in the config
    micro_batch_tokens: int | None = None
    validation_plan: BatchPlan | None = None  # null: in their order, in batches as large as those of training
    validation_micro_batch_size: int | None = None  # null: that of training
    settings: Mapping[str, Any] = field(default_factory=dict)  # what decides a step besides the examples
    metric_names: frozenset[str] = frozenset()  # what the objective reports besides the loss
    # after training: what examples, held out or not, say that the archive should carry
    archive_notes: Callable[[StepMetrics, int, bool], dict[str, Any]] = lambda metrics, count, held_out: {}

    @property
    def validates(self) -> bool:
        return bool(self.validation) and self.loop.validates

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        total = self.plan.steps_per_epoch * self.loop.max_epochs
        return total if self.loop.max_steps < 0 else min(total, self.loop.max_steps)

    @property
    def validation_interval(self) -> int:
        """Steps between validations; a float up to 1.0 is a part of an epoch."""
        interval = self.loop.val_check_interval
        return max(1, int(interval * self.plan.steps_per_epoch)) if isinstance(interval, float) else int(interval)


def train(task: Task, model: TrainableModel, exp: ExpManagerConfig, config: Mapping[str, Any] | None = None) -> None:
    """Train to the end, or until told to stop (StoppedEarly, with a checkpoint); then write the archive.

    `config` is what the run is, for loggers that keep it.
    """
    cluster = model.cluster
    checkpoints = Checkpoints(exp, cluster, metrics=monitors(task.metric_names), validates=task.validates)
    made_with = identity(task, model)
    step, logged = resume(task, model, checkpoints, made_with)
    with run_logger(exp, cluster, config or {}, logged) as logger:
        optimize(task, model, exp, checkpoints, logger, step, made_with)
        if exp.checkpoint_callback_params.save_nemo_on_train_end:
            checkpoints.restore_best(model)
            model.save_nemo(checkpoints.archive, notes(task, model))
            if logger is not None:
                logger.archived(checkpoints.archive, archive_hash(checkpoints.archive))


def optimize(
    task: Task,
    model: TrainableModel,
    exp: ExpManagerConfig,
    checkpoints: Checkpoints,
    logger: MetricsLogger | None,
    step: int,
    made_with: Mapping[str, Any],
) -> None:
    """The optimizer steps from `step` on, with validation and checkpoints. Raises StoppedEarly."""
    cluster = model.cluster
    if not task.validates:
        log.info("no validation during training")
    tell_end_of_data(task.steps, task.loop.max_steps, task.block)
    with (
        RunControl(exp.max_time_per_run, cluster, key="exp_manager.max_time_per_run") as control,
        Progress("training", task.steps, show=cluster.is_main, done=step, unit="step") as progress,
        checkpoints,
    ):
        while step < task.steps:
            metrics = model.train_step(batch(task, model, task.train, task.plan.indices(step)), task.objective)
            step += 1
            checkpoints.settle(wait=False)
            # of this step alone: an earlier validation was one of other weights
            values = scalars(metrics, "train_") | progress_values(task, step)
            at_end = step == task.steps
            if logger is not None:
                logger.log(
                    step,
                    "train",
                    {**metrics.terms, "loss": metrics.loss, "lr": metrics.lr, "grad_norm": metrics.grad_norm},
                )
            progress.advance(1, token_count(task, step - 1), loss=metrics.loss, lr=metrics.lr)
            if task.validates and (at_end or step % task.validation_interval == 0):
                found = validate(task, model)
                values |= scalars(found, "val_")
                if logger is not None:
                    logger.log(step, "val", {**found.terms, "loss": found.loss})
            reason = None if at_end else control.stop_reason()
            due = task.loop.save_interval and (at_end or step % task.loop.save_interval == 0)
            if exp.create_checkpoint_callback and (due or reason):
                logged = 0 if logger is None else logger.position
                state = {**state_of(task, step), "metrics_bytes": logged, "fingerprint": made_with}
                checkpoints.save(model, state, values, ranked=bool(due))
            if reason:
                raise StoppedEarly(f"{reason} at step {step} of {task.steps}; checkpoint in {checkpoints.root}")


def identity(task: Task, model: TrainableModel) -> dict[str, Any]:
    """What decides the result but for the length of the run. Collective."""
    plan = task.plan
    rows = ((*row, *mask) for example in task.train for row, mask in zip(example.rows, example.masks, strict=True))
    return {
        "the archive to start from": archive_of(model),
        "training examples": tokens_hash(rows),
        **batch_settings(plan.global_batch_size, plan.seed, plan.shuffle, plan.drop_last, plan.limit),
        **task.settings,
    }


def resume(
    task: Task, model: TrainableModel, checkpoints: Checkpoints, made_with: Mapping[str, Any]
) -> tuple[int, int | None]:
    """Optimizer steps already done and metrics already logged: those of the newest checkpoint, which is loaded.

    Raises CheckpointError where it belongs to another run.
    """
    newest = checkpoints.newest()
    if newest is None:
        return 0, checkpoints.logged_before_any
    state = model.load_training_state(newest)
    check_same_run(newest, state["fingerprint"], made_with)
    checkpoints.drop_others(newest)
    step = int(state["step"])
    tell_resumed(newest, step, int(state["steps"]), task.steps)
    return step, state.get("metrics_bytes")


def batch(task: Task, model: TrainableModel, examples: Sequence[Example], indices: Sequence[int]) -> list[Microbatch]:
    cluster = model.cluster
    return microbatches(
        examples,
        indices,
        size=task.micro_batch_size,
        budget=task.micro_batch_tokens,
        dp_rank=cluster.dp_rank,
        dp_size=cluster.dp_size,
        pad_id=model.tokenizer.pad_id,
    )


def validate(task: Task, model: TrainableModel) -> StepMetrics:
    """Averages over the validation examples, or over the first `limit_val_batches` of them."""
    size = task.validation_micro_batch_size or task.micro_batch_size
    held_out = batch(dataclasses.replace(task, micro_batch_size=size), model, task.validation, validated(task))
    return model.evaluate(held_out, task.objective)


def validated(task: Task) -> list[int]:
    """The validation examples of one validation, always the same."""
    size = task.plan.global_batch_size
    plan = task.validation_plan or BatchPlan(len(task.validation), size, task.plan.seed, shuffle=False)
    order = [i for step in range(plan.steps_per_epoch) for i in plan.indices(step)]
    limit = task.loop.limit_val_batches
    if limit is None:
        return order
    return order[: limit * plan.global_batch_size if isinstance(limit, int) else max(1, int(len(order) * limit))]


def notes(task: Task, model: TrainableModel) -> dict[str, Any]:
    """What the archive should say of its model, from the validation examples (or the training ones without any)."""
    examples = task.validation or task.train
    if not task.metric_names:
        return task.archive_notes(StepMetrics(0.0, 0.0, 0.0), 0, False)
    found = model.evaluate(batch(task, model, examples, range(len(examples))), task.objective)
    return task.archive_notes(found, len(examples), bool(task.validation))


def token_count(task: Task, step: int) -> int:
    return sum(len(row) for i in task.plan.indices(step) for row in task.train[i].rows)


def progress_values(task: Task, step: int) -> dict[str, float]:
    state = state_of(task, step)
    return {"global_step": step, "step": step, "consumed_samples": state["consumed_samples"], "epoch": state["epoch"]}


def state_of(task: Task, step: int) -> dict[str, Any]:
    """What a checkpoint says of where the run is."""
    epoch = step // task.plan.steps_per_epoch
    return {"step": step, "consumed_samples": task.plan.consumed(step), "epoch": epoch, "steps": task.steps}


def scalars(metrics: StepMetrics, prefix: str) -> dict[str, float]:
    """Values under the names a monitor may use: `loss` and `train_loss` alike for training."""
    own = {**metrics.terms, "loss": metrics.loss}
    named = {f"{prefix}{name}": value for name, value in own.items()}
    return {**named, **own, "lr": metrics.lr, "grad_norm": metrics.grad_norm} if prefix == "train_" else named


def reward_notes(
    append_eod: bool, reward_model_type: str, metrics: StepMetrics, count: int, held_out: bool
) -> dict[str, Any]:
    """Mean and (unbiased) std of the rewards of `count` pairs, for the labeler's standardisation."""
    mean, n = metrics.terms["rewards_all_mean"], 2 * count
    variance = max(0.0, metrics.terms["rewards_all_square"] - mean**2) * n / max(1, n - 1)
    log.info(
        "%s pairs: %d, accuracy %.4f, reward mean %.4f, std %.4f",
        "held-out" if held_out else "training", count, metrics.terms["accuracy"], mean, math.sqrt(variance),
    )  # fmt: skip
    return {
        "reward_standardization": {"mean": mean, "std": math.sqrt(variance)},
        "reward_model_type": reward_model_type,
        "append_eod": append_eod,
    }


def check_not_empty(examples: Sequence[Example], path: str) -> None:
    if not examples:
        raise TrainingError(f"{path}: no row is left to train on")


def check_held_out(examples: Sequence[Example], given: int, key: str) -> None:
    """Say that nothing is left of what was given for validation, where that is so."""
    if given and not examples:
        log.warning("%s: none of the %d given can be used, so there is no validation", key, given)


def ranking_task_notes(append_eod: bool, reward_model_type: str) -> Callable[[StepMetrics, int, bool], dict[str, Any]]:
    return functools.partial(reward_notes, append_eod, reward_model_type)
