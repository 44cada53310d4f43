"""A whole run of the tiny model, drawn, judged and learned from, with shared prefixes and without."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_aligner.config.reinforce import ReinforceConfig
from nemo_aligner.config.schema import OptimConfig, TrainerConfig
from nemo_aligner.data.prompts import PromptRow
from nemo_aligner.engine.loading import LoadedModel
from nemo_aligner.engine.model import forward
from nemo_aligner.engine.model.build import RunOptions, build_model
from nemo_aligner.engine.policy import MegatronPolicy
from nemo_aligner.engine.processes.cluster import start_cluster
from nemo_aligner.rewards.interfaces import Candidate, Judgement
from nemo_aligner.stages.reinforce.loop import Actor
from tests.fakes import ByteTokenizer
from tests.tiny import ARCH

STEPS = 50
PROMPTS = [PromptRow(text, tuple(text.encode())) for text in ("a first prompt: ", "and one that is longer: ")]


class LikesLowBytes:
    """A reward that is learned fast: how many bytes of the response are below 100."""

    def submit(self, candidates: Sequence[Candidate]) -> Future[list[Judgement]]:
        answer: Future[list[Judgement]] = Future()
        answer.set_result([Judgement(sum(byte < 100 for byte in c.response.encode()) / 4) for c in candidates])
        return answer

    def hurry(self) -> None:
        pass

    def close(self) -> None:
        pass


def config(folder: Path) -> ReinforceConfig:
    cfg = ReinforceConfig()
    cfg.pretrained_checkpoint.restore_from_path = "policy.nemo"
    exp = cfg.exp_manager
    exp.explicit_log_dir, exp.name, exp.create_tensorboard_logger = str(folder), "actor", False
    exp.checkpoint_callback_params.monitor, exp.checkpoint_callback_params.save_nemo_on_train_end = "rewards", False
    # Adam's eps keeps it from making much of rounding where a gradient is next to nothing
    cfg.model.optim = OptimConfig(name="adamw", lr=1e-3, eps=1e-4)
    cfg.model.micro_batch_size, cfg.model.global_batch_size, cfg.model.seed = 8, 8, 50
    rollout, loop = cfg.model.ppo, cfg.trainer.ppo
    rollout.num_rollout_samples, rollout.num_rollout_per_prompt, rollout.rollout_micro_batch_size = 2, 4, 2
    rollout.length_params.max_length = 6
    loop.baseline, loop.initial_policy_kl_penalty = "RLOO", 0.02
    loop.max_epochs, loop.save_interval, loop.keep_rollouts = STEPS, 0, 0
    return cfg


def curves(folder: Path) -> dict[str, list[float]]:
    """Reward, KL and loss of each step of a run."""
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1) as cluster:
        torch.manual_seed(5)
        run, tokenizer = RunOptions(), ByteTokenizer()
        loaded = LoadedModel(build_model(ARCH, run), ARCH, tokenizer, run, folder)  # type: ignore[arg-type]
        policy = MegatronPolicy(loaded, cluster)
        policy.keep_initial_weights()
        policy.add_optimizer(config(folder).model.optim, clip_grad=1.0, max_steps=STEPS)
        Actor(config(folder), policy, cluster, PROMPTS, []).train(LikesLowBytes())
    rows: list[dict[str, Any]] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("train_rollouts/rewards", "train_rollouts/init_policy_kl", "train_optim/loss")
    return {name: [row[name] for row in rows if name in row] for name in names}


@pytest.mark.processes  # none, but it takes seconds
def test_curves_of_fifty_steps_with_and_without_shared_prefixes_lie_on_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = curves(tmp_path / "shared")
    monkeypatch.setattr(forward, "MIN_SHARED", sys.maxsize)
    alone = curves(tmp_path / "alone")
    rewards = shared["train_rollouts/rewards"]
    assert len(rewards) == STEPS
    assert sum(rewards[-10:]) > sum(rewards[:10]) + 0.5, "something is learned"
    for name, values in shared.items():
        assert alone[name] == pytest.approx(values, rel=1e-4, abs=1e-4), name
    assert shared["train_optim/loss"] != alone["train_optim/loss"], "they are not computed alike"
