"""REINFORCE: prompts ─▶ rollouts ─▶ KL-penalised rewards ─▶ baseline ─▶ advantages ─▶ optimizer steps, and again.

One update with three baselines (RLOO, ReMax, none). What a step does is a function of (seed, step) and the weights, so
a run that was killed goes on from its newest checkpoint with the numbers it would have had.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NoReturn

import torch

from nemo_aligner.algorithms.reinforce import reinforce_loss
from nemo_aligner.config.reinforce import MONITORS, ReinforceConfig
from nemo_aligner.data.jsonl import write_jsonl
from nemo_aligner.data.prompts import PromptRow
from nemo_aligner.engine.checkpoints.nemo_archive import archive_hash
from nemo_aligner.engine.interfaces import Cluster, Microbatch, Policy
from nemo_aligner.errors import AlignerError, RewardError, ServerError, StoppedEarly
from nemo_aligner.metrics import MetricsLogger, Progress, Timers
from nemo_aligner.rewards.interfaces import Rewarder, ServedModel
from nemo_aligner.stages.batches import BatchPlan, microbatches
from nemo_aligner.stages.checkpoint_names import log_dir
from nemo_aligner.stages.checkpoints import Checkpoints
from nemo_aligner.stages.reinforce.advantages import (
    Scored,
    check_finite,
    examples_of,
    rollout_metrics,
    rollout_rows,
    score,
    shaped,
)
from nemo_aligner.stages.reinforce.drawing import sampling_params, tell_what_changes_the_draw
from nemo_aligner.stages.reinforce.kl_control import KLControl
from nemo_aligner.stages.reinforce.rollout import KL, RolloutWorker, token_count
from nemo_aligner.stages.reinforce.settings import step_settings
from nemo_aligner.stages.run_control import RunControl
from nemo_aligner.stages.run_identity import (
    archive_of,
    check_same_run,
    tell_end_of_data,
    tell_resumed,
    tokens_hash,
)
from nemo_aligner.stages.run_logger import run_logger

log = logging.getLogger(__name__)

_NO_REWARDS = (ServerError, RewardError)


def reinforce_objective(logprobs: Any, microbatch: Microbatch) -> Any:
    fields = microbatch.fields
    return reinforce_loss(logprobs, fields["loss_mask"], fields["weights"], fields.get("targets"))


class Actor:
    """One REINFORCE run."""

    # of `train`, from its begin on
    served: ServedModel | None
    worker: RolloutWorker
    checkpoints: Checkpoints
    control: RunControl

    def __init__(
        self,
        cfg: ReinforceConfig,
        policy: Policy,
        cluster: Cluster,
        train: Sequence[PromptRow],
        validation: Sequence[PromptRow],
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.cfg, self.policy, self.cluster, self.prompts = cfg, policy, cluster, train
        self.loop, self.settings = cfg.trainer.ppo, cfg.model.ppo
        self.validation = validation[: self.settings.num_val_samples]
        self.plan = BatchPlan(len(train), self.settings.num_rollout_samples, cfg.model.seed, cfg.model.data.shuffle)
        total = self.plan.steps_per_epoch * self.loop.max_epochs
        self.steps = total if self.loop.max_steps < 0 else min(total, self.loop.max_steps)
        self.folder = log_dir(cfg.exp_manager)
        self.kl_control = KLControl(cfg)
        self.timers = Timers()
        self.logger: MetricsLogger | None = None
        self.updates = 0  # optimizer steps done
        self.values: dict[str, float] = {}  # of the newest step: all that a monitor may name
        self.settings_of_rewards = dict(settings or {})  # what else decides a step
        self.validation_owed = False  # the one after the steps that are done
        self.made_with: dict[str, Any] = {}  # the run's fingerprint, for its checkpoints

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of the whole run."""
        n, size = self.settings.num_rollout_per_prompt, self.cfg.model.global_batch_size
        return sum(math.ceil(len(self.plan.indices(step)) * n / size) for step in range(self.steps))

    def train(self, rewards: Rewarder, served: ServedModel | None = None) -> None:
        """Train to the end, or until told to stop (StoppedEarly, with a checkpoint); then write the archive.

        `served`: the reward model that a server has, which stays the same over restarts.
        """
        exp, cluster, loop = self.cfg.exp_manager, self.cluster, self.loop
        self.checkpoints = checkpoints = Checkpoints(exp, cluster, metrics=MONITORS, validates=bool(self.validation))
        self.made_with = self.fingerprint()
        self.served = served
        step, logged = self.resume()
        self.announce()
        kl = KL(loop.estimator, loop.kl_reduction) if loop.measures_kl else None
        self.worker = RolloutWorker(
            self.policy,
            cluster,
            rewards,
            forward_batch=self.settings.forward_micro_batch_size,
            kl=kl,
            timers=self.timers,
        )
        with run_logger(exp, cluster, asdict(self.cfg), logged, exp.log_samples) as self.logger:
            with RunControl(
                exp.max_time_per_run, cluster, key="exp_manager.max_time_per_run", on_signal=rewards.hurry
            ) as self.control:
                self.steps_from(step)
            if exp.checkpoint_callback_params.save_nemo_on_train_end:
                checkpoints.restore_best(self.policy)
                self.policy.save_nemo(checkpoints.archive)
                if self.logger is not None:
                    self.logger.archived(checkpoints.archive, archive_hash(checkpoints.archive))

    def steps_from(self, step: int) -> None:
        """The rollout steps from `step` on, with validation and checkpoints. Raises StoppedEarly."""
        with (
            Progress("REINFORCE", self.steps, show=self.cluster.is_main, done=step, unit="step") as progress,
            self.checkpoints,
        ):
            if step == 0:
                self.validate_or_stop(0)
            elif self.validation_owed:
                self.conclude(step)
            while step < self.steps and not self.kl_control.spent:
                scored = self.step_or_stop(step)
                step += 1
                self.checkpoints.settle(wait=False)
                progress.advance(1, token_count(scored.rollouts), reward=self.values["rewards"])
                self.conclude(step)

    def conclude(self, step: int) -> None:
        """What comes after `step` steps: validation, a stop, a checkpoint."""
        if self.at_end(step) or step % self.loop.val_check_interval == 0:
            self.validate_or_stop(step)
        self.log_timers(step)
        reason = None if self.at_end(step) else self.control.stop_reason()
        if reason:
            self.stop(reason, step)
        if self.cfg.exp_manager.create_checkpoint_callback and self.save_is_due(step):
            self.save(step)

    def at_end(self, step: int) -> bool:
        return step == self.steps or self.kl_control.spent

    def save_is_due(self, step: int) -> bool:
        """Whether a run that nobody stops has a checkpoint after `step` steps."""
        interval = self.loop.save_interval
        return interval > 0 and (self.at_end(step) or step % interval == 0)

    def save(self, step: int) -> None:
        """Collective."""
        values = self.values | self.position(step)
        self.checkpoints.save(self.policy, self.state(step), values, ranked=self.save_is_due(step))

    def step_or_stop(self, step: int) -> Scored:
        """`step`; where the run is told to stop as those who reward it are, the step begun is given up. Collective."""
        try:
            return self.step(step)
        except _NO_REWARDS as fault:  # on every rank, before anything is learned or logged
            self.give_up(f"step {step + 1}", fault, step)

    def validate_or_stop(self, step: int) -> None:
        """Validate after `step` steps; told to stop meanwhile, the run that goes on from here owes it. Collective."""
        try:
            self.validate(step)
        except _NO_REWARDS as fault:
            self.validation_owed = True
            self.give_up(f"the validation after step {step}", fault, step)
        self.validation_owed = False

    def give_up(self, what: str, fault: AlignerError, step: int) -> NoReturn:
        """`what` has no rewards: raises StoppedEarly where the run was told to stop, else `fault`. Collective."""
        reason = self.control.stop_reason()
        if reason is None:
            raise fault
        log.info("%s is given up: %s", what, fault)
        self.stop(reason, step)

    def stop(self, reason: str, step: int) -> NoReturn:
        """Save the run as it is after `step` steps, and raise StoppedEarly. Collective."""
        kept = "no checkpoint"
        if self.cfg.exp_manager.create_checkpoint_callback and step > 0:
            self.save(step)
            kept = f"checkpoint in {self.checkpoints.root}"
        raise StoppedEarly(f"{reason} at step {step} of {self.steps}; {kept}")

    def announce(self) -> None:
        """Say once what was chosen, where the choice changes what the numbers mean."""
        loop = self.loop
        tell_end_of_data(self.steps, loop.max_steps, "trainer.ppo")
        log.info(
            "baseline %s, KL penalty %g (estimator %s, %s over tokens), unfinished responses: %s",
            loop.baseline, loop.initial_policy_kl_penalty, loop.estimator, loop.kl_reduction, loop.unfinished,
        )  # fmt: skip
        plain = any(prompt.turns is None for prompt in self.prompts)
        if plain and self.policy.tokenizer.chat_template is not None:
            log.info(
                "the model has a chat template, and plain prompts go to it as they are: they may hold its turns, or "
                "rows may have `messages`"
            )
        tell_what_changes_the_draw(sampling_params(self.cfg, self.policy))

    def step(self, step: int) -> Scored:
        """One rollout step: rollouts, advantages, and as many optimizer steps as the responses fill."""
        n = self.settings.num_rollout_per_prompt
        # the number of a prompt in the run: no two steps share noise
        first = step * self.settings.num_rollout_samples
        prompts = [(first + j, self.prompts[i]) for j, i in enumerate(self.plan.indices(step))]
        slots = self.settings.rollout_micro_batch_size * n
        longest = self.settings.length_params.max_length
        with self.timers.phase("rollout_time"):
            rollouts = self.worker.run(prompts, n, sampling_params(self.cfg, self.policy), slots)
            check_finite(rollouts)
            greedy = None
            if self.loop.baseline == "ReMax":
                best = self.worker.run(prompts, 1, sampling_params(self.cfg, self.policy, greedy=True), slots)
                check_finite(best)
                of_group = dict(zip((r.group for r in best), shaped(best, self.loop, longest).tolist(), strict=True))
                greedy = torch.tensor([of_group[rollout.group] for rollout in rollouts], dtype=torch.float64)
        scored = score(rollouts, self.loop, greedy, kl_penalty=self.kl_control.penalty, max_length=longest)
        self.log_rollouts(step + 1, "train_rollouts", scored)
        self.kl_control.observe(step + 1, self.values.get("init_policy_kl"))
        if self.cluster.is_main and self.loop.keep_rollouts:
            write_jsonl(
                self.folder / "rollouts" / f"step_{step + 1}.jsonl", rollout_rows(scored)[: self.loop.keep_rollouts]
            )
        if not self.kl_control.spent:
            with self.timers.phase("train_time"):
                self.update(scored)
        return scored

    def update(self, scored: Scored) -> None:
        """Optimizer steps over the counted responses, in prompt order, `global_batch_size` at a time."""
        examples = examples_of(scored)
        if not examples:
            log.warning("no response of this step is counted, for its end or its reward: nothing is learned from it")
        size = self.cfg.model.global_batch_size
        for start in range(0, len(examples), size):
            batch = microbatches(
                examples,
                range(start, min(len(examples), start + size)),
                size=self.cfg.model.micro_batch_size,
                budget=self.cfg.model.micro_batch_tokens,
                dp_rank=self.cluster.dp_rank,
                dp_size=self.cluster.dp_size,
                pad_id=self.policy.tokenizer.pad_id,
            )
            metrics = self.policy.train_step(batch, reinforce_objective)
            self.updates += 1
            if self.logger is not None:
                found = {**metrics.terms, "loss": metrics.loss, "grad_norm": metrics.grad_norm, "lr": metrics.lr}
                self.logger.log(self.updates, "train_optim", found)

    def validate(self, step: int) -> None:
        """One response to each validation prompt, always drawn with the same noise; no update.

        The responses are written to `<log dir>/validation/step_<step>.jsonl`.
        """
        if not self.validation:
            return
        with self.timers.phase("validation_time"):
            prompts = list(enumerate(self.validation))
            slots = self.settings.val_rollout_micro_batch_size
            rollouts = self.worker.run(prompts, 1, sampling_params(self.cfg, self.policy, seed_offset=1), slots)
        scored = score(rollouts, self.loop, None, kl_penalty=self.kl_control.penalty, validation=True)
        rows = rollout_rows(scored)
        self.log_rollouts(step, "val_rollouts", scored, rows)
        if self.cluster.is_main:
            write_jsonl(self.folder / "validation" / f"step_{step}.jsonl", rows)
            shown = rollouts[0]
            log.info(
                "step %d: validation reward %.4f; %r ─▶ %r (%s)",
                step, self.values["val_rewards"], shown.prompt.text[-60:], shown.text[:120],
                "no reward" if shown.reward is None else f"{shown.reward:.3f}",
            )  # fmt: skip

    def log_rollouts(self, step: int, name: str, scored: Scored, samples: Sequence[Mapping[str, Any]] = ()) -> None:
        found = rollout_metrics(scored)
        if name == "train_rollouts":
            found |= {"consumed_samples": self.plan.consumed(step), "epoch": (step - 1) // self.plan.steps_per_epoch}
            found |= self.kl_control.figures()
            self.values = dict(found)  # an earlier validation was one of other weights
        else:
            self.values |= {f"val_{key}": value for key, value in found.items()}
        if self.logger is not None:
            self.logger.log(step, name, found, samples)

    def log_timers(self, step: int) -> None:
        """Seconds of each phase since the last call."""
        if self.logger is not None:
            self.logger.log(step, "timers", self.timers.seconds)
        self.timers.seconds.clear()

    def position(self, step: int) -> dict[str, float]:
        """Where the run is, by the names of NeMo-Aligner's checkpoints."""
        return {"global_step": step, "step": step, "reinforce_optimization_step": self.updates}

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint says of the run."""
        values = {name: value for name, value in self.values.items() if math.isfinite(value)}
        return {
            "step": step,
            "steps": self.steps,
            "consumed_samples": self.plan.consumed(step),
            "updates": self.updates,
            "metrics_bytes": 0 if self.logger is None else self.logger.position,
            "values": values,
            **self.kl_control.state(),
            "fingerprint": self.made_with,
            "reward_model": None if self.served is None else self.served.archive,
            "validation_owed": self.validation_owed,
        }

    def fingerprint(self) -> dict[str, Any]:
        """What decides the result but for the length of the run. Collective."""
        return {
            "the archive to start from": archive_of(self.policy),
            "training prompts": tokens_hash(prompt.tokens for prompt in self.prompts),
            **step_settings(self.cfg),
            **self.settings_of_rewards,
        }

    def resume(self) -> tuple[int, int | None]:
        """Steps already done and metrics already logged, from the newest checkpoint.

        Raises CheckpointError where it belongs to another run.
        """
        newest = self.checkpoints.newest()
        if newest is None:
            return 0, self.checkpoints.logged_before_any
        state = self.policy.load_training_state(newest)
        check_same_run(newest, state["fingerprint"], self.made_with)
        self.checkpoints.drop_others(newest)
        self.updates, self.values = state["updates"], state["values"]
        self.validation_owed = bool(state.get("validation_owed"))
        if self.served is not None:
            self.served.archive = state.get("reward_model")  # earlier versions did not keep it
        step = int(state["step"])
        self.kl_control.load(state)
        if not self.kl_control.spent:
            tell_resumed(newest, step, int(state["steps"]), self.steps)
        return step, state["metrics_bytes"]
