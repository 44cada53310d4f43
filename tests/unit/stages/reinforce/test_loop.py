"""The REINFORCE loop over a small real model, with a stand-in for the reward server."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_aligner import loggers
from nemo_aligner.config.peft import LoraTuning, PeftConfig
from nemo_aligner.config.reinforce import ReinforceConfig
from nemo_aligner.config.schema import OptimConfig, TrainerConfig
from nemo_aligner.data.prompts import PromptRow
from nemo_aligner.data.supervised import Example
from nemo_aligner.engine.interfaces import StepMetrics
from nemo_aligner.engine.loading import LoadedModel
from nemo_aligner.engine.model.build import RunOptions, build_model
from nemo_aligner.engine.policy import MegatronPolicy
from nemo_aligner.engine.processes.cluster import MegatronCluster, start_cluster
from nemo_aligner.errors import CheckpointError, ServerError, TrainingError
from nemo_aligner.rewards.interfaces import Candidate, Judgement
from nemo_aligner.stages.batches import microbatches
from nemo_aligner.stages.reinforce.loop import Actor, reinforce_objective
from tests.fakes import ByteTokenizer, RecordingLogger
from tests.tiny import ARCH

WHOLE, ADAPTER = PeftConfig(), PeftConfig("lora", lora_tuning=LoraTuning(adapter_dim=4, target_modules=["all"]))
PROMPTS = [PromptRow(text, tuple(text.encode())) for text in ("ab", "the film", "ab", "so long a prompt", "x")]


class Judge:
    """Rewards texts by a function of theirs; may fail."""

    def __init__(self, reward: Callable[[str], float], fault: Exception | None = None) -> None:
        self.reward, self.fault = reward, fault
        self.asked: list[str] = []

    def submit(self, candidates: Sequence[Candidate]) -> Future[list[Judgement]]:
        texts = [candidate.prompt + candidate.response for candidate in candidates]
        self.asked += texts
        answer: Future[list[Judgement]] = Future()
        if self.fault is not None:
            answer.set_exception(self.fault)
        else:
            answer.set_result([Judgement(self.reward(text)) for text in texts])
        return answer

    def hurry(self) -> None:
        pass

    def close(self) -> None:
        pass


def plain_letters(text: str) -> float:
    """What part of a text is lower-case ASCII: something a model of random bytes can learn."""
    return sum(c.islower() and c.isascii() for c in text) / max(1, len(text))


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[MegatronCluster]:
    with start_cluster(TrainerConfig(accelerator="cpu"), tensor=1, pipeline=1, seed=11) as cluster:
        yield cluster


def config(folder: Path, peft: PeftConfig = WHOLE, **ppo: Any) -> ReinforceConfig:
    cfg = ReinforceConfig()
    cfg.model.peft = peft
    cfg.exp_manager.explicit_log_dir, cfg.exp_manager.name = str(folder), "actor"
    cfg.exp_manager.create_tensorboard_logger = False
    cfg.exp_manager.checkpoint_callback_params.monitor = "rewards"
    cfg.exp_manager.checkpoint_callback_params.save_nemo_on_train_end = False
    cfg.model.optim = OptimConfig(name="adamw", lr=1e-2)
    cfg.model.micro_batch_size, cfg.model.global_batch_size = 4, 8
    rollout = cfg.model.ppo
    rollout.num_rollout_samples, rollout.num_rollout_per_prompt = 2, 4
    rollout.length_params.max_length = 5
    cfg.trainer.ppo.save_interval = 0
    for name, value in ppo.items():
        setattr(cfg.trainer.ppo, name, value)
    return cfg


def actor(cluster: MegatronCluster, cfg: ReinforceConfig, prompts: Sequence[PromptRow] = PROMPTS) -> Actor:
    torch.manual_seed(5)
    run = RunOptions(lora=cfg.model.peft.lora)
    loaded = LoadedModel(build_model(ARCH, run), ARCH, ByteTokenizer(), run, Path("none"))  # type: ignore[arg-type]
    policy = MegatronPolicy(loaded, cluster)
    if cfg.trainer.ppo.measures_kl:
        policy.keep_initial_weights()
    made = Actor(cfg, policy, cluster, prompts, [])
    policy.add_optimizer(cfg.model.optim, clip_grad=1.0, max_steps=made.optimizer_steps)
    return made


def metrics(folder: Path, name: str) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if any(key.startswith(f"{name}/") for key in row)]


@pytest.mark.parametrize("baseline", ["RLOO", "ReMax", "none"])
def test_rewards_rise_with_every_baseline(cluster: MegatronCluster, tmp_path: Path, baseline: str) -> None:
    """80 responses a step: twelve standard deviations of chance with a baseline, four without, in any order."""
    cfg = config(tmp_path, baseline=baseline, max_epochs=12)
    cfg.model.optim = OptimConfig(name="adamw", lr=2e-2)
    cfg.model.ppo.num_rollout_samples, cfg.model.ppo.num_rollout_per_prompt = 5, 16
    cfg.model.micro_batch_size = cfg.model.global_batch_size = 80
    actor(cluster, cfg).train(Judge(plain_letters))
    rewards = [row["train_rollouts/rewards"] for row in metrics(tmp_path, "train_rollouts")]
    assert len(rewards) == 12
    # without a baseline the update is the noisiest
    assert sum(rewards[-3:]) > sum(rewards[:3]) + (0.2 if baseline == "none" else 0.6)


def test_an_odd_number_of_prompts_is_used_to_the_last_in_every_epoch(cluster: MegatronCluster, tmp_path: Path) -> None:
    judge = Judge(plain_letters)
    made = actor(cluster, config(tmp_path, max_epochs=2))
    made.train(judge)
    assert made.steps == 6
    assert [row["train_rollouts/rollout_size"] for row in metrics(tmp_path, "train_rollouts")] == [8, 8, 4] * 2
    asked = [sum(text.startswith(prompt.text) for text in judge.asked) for prompt in PROMPTS]
    assert asked == [16, 8, 16, 8, 8]  # "ab" stands in the file twice


def test_a_response_that_is_left_out_for_its_advantage_changes_neither_loss_nor_update(
    cluster: MegatronCluster, tmp_path: Path
) -> None:
    whole = [
        Example((list(range(5 + i, 25 + 2 * i)),), ([0] * 12 + [1] * (8 + i),), weight)
        for i, weight in enumerate((0.5, 0.0, -1.5, 0.0))
    ]
    left_out = [
        example if example.weight else Example((example.rows[0][:1],), ([0],), 0.0, targets=sum(example.masks[0]))
        for example in whole
    ]

    def updated(examples: list[Example]) -> tuple[StepMetrics, list[torch.Tensor]]:
        policy = actor(cluster, config(tmp_path)).policy
        batch = microbatches(examples, range(4), size=2, dp_rank=0, dp_size=1, pad_id=0)
        found = policy.train_step(batch, reinforce_objective)
        return found, list(policy.module.parameters())  # type: ignore[attr-defined]

    (loss, weights), (same_loss, same_weights) = updated(whole), updated(left_out)
    assert (same_loss.loss, same_loss.grad_norm) == pytest.approx((loss.loss, loss.grad_norm), rel=1e-5)
    for a, b in zip(weights, same_weights, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_no_penalty_needs_no_initial_policy(cluster: MegatronCluster, tmp_path: Path) -> None:
    made = actor(cluster, config(tmp_path, initial_policy_kl_penalty=0.0))
    made.policy.initial_logprobs = None  # type: ignore[assignment, method-assign]
    made.train(Judge(plain_letters))
    assert "train_rollouts/init_policy_kl" not in metrics(tmp_path, "train_rollouts")[0]


@pytest.mark.parametrize("peft", [WHOLE, ADAPTER], ids=["all weights", "adapter"])
def test_the_policy_begins_at_kl_zero_and_the_penalty_is_taken_off_the_reward(
    peft: PeftConfig, cluster: MegatronCluster, tmp_path: Path
) -> None:
    actor(cluster, config(tmp_path, peft, initial_policy_kl_penalty=0.5)).train(Judge(plain_letters))
    rows = metrics(tmp_path, "train_rollouts")
    kls = [row["train_rollouts/init_policy_kl"] for row in rows]
    assert kls[0] == pytest.approx(0.0, abs=1e-5)
    assert all(abs(kl) > 1e-4 for kl in kls[1:])
    for row, kl in zip(rows, kls, strict=True):
        taken = row["train_rollouts/rewards"] - row["train_rollouts/rewards_with_kl"]
        assert taken == pytest.approx(0.5 * kl, abs=1e-5)


def test_remax_compares_with_the_reward_of_the_greedy_response(cluster: MegatronCluster, tmp_path: Path) -> None:
    made = actor(cluster, config(tmp_path, baseline="ReMax", max_steps=1, initial_policy_kl_penalty=0.0))
    judge = Judge(plain_letters)
    made.train(judge)
    row = metrics(tmp_path, "train_rollouts")[0]
    drawn, greedy = judge.asked[:8], judge.asked[8:]
    assert len(greedy) == 2
    mean = sum(map(plain_letters, drawn)) / 8 - sum(map(plain_letters, greedy)) / 2
    assert row["train_rollouts/advantage_mean"] == pytest.approx(mean, abs=1e-6)


def test_masked_unfinished_responses_teach_nothing(
    cluster: MegatronCluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = actor(cluster, config(tmp_path, unfinished="mask", max_steps=2))
    before = [p.clone() for p in made.policy.module.parameters()]  # type: ignore[attr-defined]
    made.train(Judge(plain_letters))
    shares = [r["train_rollouts/fraction_of_samples_properly_ended"] for r in metrics(tmp_path, "train_rollouts")]
    assert caplog.text.count("nothing is learned from it") == 2
    assert shares == [0.0, 0.0], "random bytes within five tokens: none is EOS with this seed"
    after = made.policy.module.parameters()  # type: ignore[attr-defined]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("judge", "fault", "said"),
    [
        (Judge(lambda text: math.nan), TrainingError, "the reward model gave nan for the response"),
        (Judge(plain_letters, ServerError("no answer from the reward server")), ServerError, "no answer"),
    ],
)
def test_a_reward_that_is_no_number_or_does_not_come_leaves_the_weights_alone(
    cluster: MegatronCluster, tmp_path: Path, judge: Judge, fault: type[Exception], said: str
) -> None:
    made = actor(cluster, config(tmp_path))
    before = [p.clone() for p in made.policy.module.parameters()]  # type: ignore[attr-defined]
    with pytest.raises(fault, match=said):
        made.train(judge)
    after = made.policy.module.parameters()  # type: ignore[attr-defined]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_checkpoint_of_other_settings_is_refused(cluster: MegatronCluster, tmp_path: Path) -> None:
    actor(cluster, config(tmp_path, max_steps=1, save_interval=1)).train(Judge(plain_letters))
    other = config(tmp_path, max_steps=2)
    other.model.ppo.num_rollout_per_prompt = 2
    with pytest.raises(CheckpointError, match="num_rollout_per_prompt = 4, this run has 2"):
        actor(cluster, other).train(Judge(plain_letters))


AIDED = {"kl_target": 0.01, "kl_horizon": 10, "initial_policy_kl_penalty": 0.2, "whiten_rewards": True}


@pytest.mark.parametrize(
    ("peft", "aids"), [(WHOLE, {}), (ADAPTER, {}), (WHOLE, AIDED)], ids=["all weights", "adapter", "aided"]
)
def test_a_resumed_run_logs_what_an_uninterrupted_one_does(
    peft: PeftConfig, aids: dict[str, Any], cluster: MegatronCluster, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    actor(cluster, config(whole, peft, max_epochs=2, **aids)).train(Judge(plain_letters))
    first = actor(cluster, config(parts, peft, max_epochs=2, save_interval=2, **aids))
    original = first.step

    def dies_in_step_3(step: int) -> Any:
        scored = original(step)  # it is logged, but no checkpoint has it
        if step == 2:
            raise KeyboardInterrupt
        return scored

    first.step = dies_in_step_3  # type: ignore[assignment, method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.train(Judge(plain_letters))
    assert len(metrics(parts, "train_rollouts")) == 3
    actor(cluster, config(parts, peft, max_epochs=2, **aids)).train(Judge(plain_letters))
    if aids:
        penalties = [r["train_rollouts/initial_policy_kl_penalty"] for r in metrics(whole, "train_rollouts")]
        assert penalties[0] != penalties[2] != penalties[3]
    for name in ("train_rollouts", "train_optim"):
        assert metrics(parts, name) == metrics(whole, name)


def test_a_run_ends_where_its_kl_budget_is_spent_and_a_rerun_has_nothing_to_do(
    cluster: MegatronCluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    unbounded, bounded = tmp_path / "unbounded", tmp_path / "bounded"
    free = {"max_epochs": 2, "initial_policy_kl_penalty": 0.0, "save_interval": 4}
    actor(cluster, config(unbounded, max_kl=1e6, **free)).train(Judge(plain_letters))
    kls = [row["train_rollouts/init_policy_kl"] for row in metrics(unbounded, "train_rollouts")]
    budget = (max(kls[:3]) + max(kls[:5])) / 2
    last = next(i for i, kl in enumerate(kls) if kl > budget)
    assert last < len(kls) - 1
    made = actor(cluster, config(bounded, max_kl=budget, **free))
    made.train(Judge(plain_letters))
    # all is as without a budget, but that nothing was learned from the last step
    assert [row["train_rollouts/init_policy_kl"] for row in metrics(bounded, "train_rollouts")] == kls[: last + 1]
    assert metrics(bounded, "train_optim") == metrics(unbounded, "train_optim")[: len(metrics(bounded, "train_optim"))]
    ended = [path.name for path in (bounded / "checkpoints").glob("*-last")]
    assert len(ended) == 1
    assert f"step={last + 1}-" in ended[0]
    assert "nothing is learned from it, and training ends" in caplog.text

    before, judge = (bounded / "metrics.jsonl").read_text(), Judge(plain_letters)
    again = actor(cluster, config(bounded, max_kl=budget, **free))
    again.train(judge)
    assert f"training is finished after step {last + 1}" in caplog.text
    assert not judge.asked
    assert (bounded / "metrics.jsonl").read_text() == before
    weights = zip(made.policy.module.parameters(), again.policy.module.parameters(), strict=True)  # type: ignore[attr-defined]
    assert all(torch.equal(a, b) for a, b in weights)

    actor(cluster, config(bounded, max_kl=1e6, **free)).train(judge)
    assert len(metrics(bounded, "train_rollouts")) == len(kls)


@pytest.mark.parametrize(("fault", "status"), [(None, "success"), (ServerError("no answer"), "failed")])
def test_loggers_of_other_packages_get_config_values_archive_and_how_the_run_ended(
    cluster: MegatronCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception | None, status: str
) -> None:
    found = RecordingLogger()
    monkeypatch.setitem(loggers._STARTED, "dllogger", lambda *args: (found, None))
    cfg = config(tmp_path, max_steps=2)
    cfg.exp_manager.create_dllogger_logger = True
    made = actor(cluster, cfg)
    if fault is None:
        cfg.exp_manager.checkpoint_callback_params.save_nemo_on_train_end = True
        (tmp_path / "checkpoints").mkdir()
        made.policy.save_nemo = lambda path: path.write_bytes(b"")  # type: ignore[method-assign, misc, assignment]
        made.train(Judge(plain_letters))
    else:
        with pytest.raises(ServerError):
            made.train(Judge(plain_letters, fault))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [{"step": step, **values} for step, values in found.rows] == lines
    assert found.config["trainer"]["ppo"]["max_steps"] == 2
    assert found.status == status
    assert found.archive == (str(tmp_path / "checkpoints" / "actor.nemo") if fault is None else "")
