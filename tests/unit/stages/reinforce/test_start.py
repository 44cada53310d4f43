"""A whole REINFORCE run on a small real model: begun as its config says, and updated as plain torch would."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_aligner.config.cut import Sizes
from nemo_aligner.config.reinforce import ReinforceConfig
from nemo_aligner.config.schema import OptimConfig
from nemo_aligner.engine import policy
from nemo_aligner.engine.interfaces import Microbatch
from nemo_aligner.errors import CheckpointError, DataError, ServerError
from nemo_aligner.rewards.interfaces import Candidate, Outcome
from nemo_aligner.servers import reward_client
from nemo_aligner.stages.reinforce import start
from tests.unit.stages.conftest import Archives
from tests.unit.stages.plain import Plain, logged, logs_to, opened, read_rows, write_rows
from tests.unit.stages.refusals import check_other_runs_refused, check_refused

PROMPTS = [{"text": f"film {i}"} for i in range(4)]
HELD_OUT = [{"input": f"play {i}"} for i in range(2)]
CALLBACK = "exp_manager.checkpoint_callback_params"
SCHED = {"name": "WarmupAnnealing"}


def letters(text: str) -> float:
    return float(sum(c.isascii() and c.islower() for c in text))


class Judge:
    """Stands in for the reward client."""

    made: list[Judge]
    fault: Exception | None = None  # what waiting for the server ends with
    archive: str | None = None

    def __init__(self, config: Any, token: str | None) -> None:
        self.config, self.token, self.did = config, token, list[str]()
        self.made.append(self)

    def wait_until_ready(self) -> None:
        self.did.append("waited")
        if self.fault is not None:
            raise self.fault

    def judge(self, candidates: Sequence[Candidate]) -> Future[list[Outcome]]:
        self.did += ["asked"] * (self.did[-1] != "asked")
        answer: Future[list[Outcome]] = Future()
        answer.set_result([Outcome(letters(c.prompt + c.response)) for c in candidates])
        return answer

    def hurry(self) -> None: ...

    def close(self) -> None:
        self.did.append("closed")


@pytest.fixture
def judges(monkeypatch: pytest.MonkeyPatch) -> list[Judge]:
    """Reward clients in the order in which they are made."""
    monkeypatch.setattr(Judge, "made", [], raising=False)
    monkeypatch.setattr(reward_client, "RewardClient", Judge)
    return Judge.made


def config(folder: Path, archives: Archives) -> ReinforceConfig:
    cfg = ReinforceConfig()
    cfg.trainer.accelerator, cfg.trainer.precision = "cpu", "32"
    cfg.trainer.ppo.gradient_clip_val, cfg.trainer.ppo.save_interval, cfg.trainer.ppo.max_epochs = 0.5, 0, 2
    cfg.trainer.ppo.initial_policy_kl_penalty = 0.1
    logs_to(cfg.exp_manager, folder / "log")
    cfg.exp_manager.checkpoint_callback_params.monitor = "rewards"
    model = cfg.model
    model.restore_from_path, model.seed, model.micro_batch_size, model.global_batch_size = (
        str(archives.policy),
        77,
        2,
        4,
    )
    model.optim = OptimConfig("adamw", lr=4e-3, weight_decay=0.0, betas=[0.9, 0.95], eps=1e-3, sched=SCHED)
    model.data.data_prefix = {
        "train": [write_rows(folder / "train.jsonl", PROMPTS)],
        "validation": [write_rows(folder / "validation.jsonl", HELD_OUT)],
    }
    model.ppo.num_rollout_samples, model.ppo.num_rollout_per_prompt, model.ppo.length_params.max_length = 2, 2, 5
    return cfg


def weighted_loss(model: Plain, batch: list[Microbatch]) -> Tensor:
    """− Σ A·log p over the response tokens of a global batch, averaged over them."""
    total, count = torch.zeros(()), 0.0
    for part in batch:
        fields = (part.fields[name] for name in ("weights", "loss_mask", "targets"))
        for row, length, weight, mask, targets in zip(part.tokens, part.lengths, *fields, strict=True):
            total = total - weight * (model.logprobs(row[:length].tolist()) * mask[1:length]).sum()
            count += float(targets)
    return total / count


def test_a_run_updates_the_policy_as_plain_torch_would(
    archives: Archives, tmp_path: Path, started: list[dict[str, Any]], judges: list[Judge],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    batches: list[list[Microbatch]] = []
    step = policy.MegatronPolicy.train_step

    def noted(self: policy.MegatronPolicy, microbatches: Sequence[Microbatch], objective: Any) -> Any:
        batches.append(list(microbatches))
        return step(self, microbatches, objective)

    monkeypatch.setattr(policy.MegatronPolicy, "train_step", noted)
    cfg, log = config(tmp_path, archives), tmp_path / "log"
    start.run(cfg)
    assert [judge.did for judge in judges] == [["waited", "asked", "closed"]]
    assert judges[0].config is cfg.remote_critic_rm
    own = {"sizes": Sizes(prefix="model."), "seed": 77}
    key = "pretrained_checkpoint.restore_from_path"
    assert started == [{"devices": 1, "path": str(archives.policy), "key": key, **own}]
    rates = [4e-3 * (1 - t / 4) for t in range(4)]
    assert logged(log, "train_optim/lr") == pytest.approx(rates)
    assert max(logged(log, "train_optim/grad_norm")) > 0.5, "the gradient is really cut"
    with opened(archives.policy) as plain:
        losses = plain.trained([lambda b=b: weighted_loss(plain, b) for b in batches], rates, cfg.model.optim, clip=0.5)
        expected = plain.weights()
    assert logged(log, "train_optim/loss") == pytest.approx(losses, abs=1e-4)
    with opened(log / "checkpoints" / "m.nemo") as plain:
        for name, weight in plain.weights().items():
            assert torch.allclose(weight, expected[name], atol=1e-5), name
    kls = logged(log, "train_rollouts/init_policy_kl")
    assert kls[0] == pytest.approx(0.0, abs=1e-4)
    assert all(abs(kl) > 1e-4 for kl in kls[1:])
    asked = {row["input"] for step in range(1, 5) for row in read_rows(log / "rollouts" / f"step_{step}.jsonl")}
    assert asked == {row["text"] for row in PROMPTS}
    assert [row["input"] for row in read_rows(log / "validation" / "step_4.jsonl")] == [r["input"] for r in HELD_OUT]


def test_without_a_penalty_and_validation_no_initial_policy_is_kept_and_nothing_validated(
    archives: Archives, tmp_path: Path, alone: None, judges: list[Judge], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy.MegatronPolicy, "keep_initial_weights", None)
    cfg = config(tmp_path, archives)
    cfg.trainer.ppo.initial_policy_kl_penalty, cfg.trainer.ppo.max_steps = 0.0, 1
    del cfg.model.data.data_prefix["validation"]
    start.run(cfg)
    assert logged(tmp_path / "log", "train_rollouts/init_policy_kl") == []
    assert not (tmp_path / "log" / "validation").exists()


def test_a_client_is_closed_also_where_no_server_comes(
    archives: Archives, tmp_path: Path, alone: None, judges: list[Judge], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Judge, "fault", ServerError("no reward server"))
    with pytest.raises(ServerError, match="no reward server"):
        start.run(config(tmp_path, archives))
    assert [judge.did for judge in judges] == [["waited", "closed"]]


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model.data.data_prefix.train", [], "model.data.data_prefix.train: required, but not given"),
        ("model.data.data_prefix.train", ["a", "b"], "model.data.data_prefix.train: ['a', 'b'] is neither [file] nor"),
        ("model.data.data_prefix.validation", ["a", "b"], "model.data.data_prefix.validation: ['a', 'b'] is neither"),
        (f"{CALLBACK}.monitor", "loss", f"{CALLBACK}.monitor: 'loss' is not logged; one of"),
        (f"{CALLBACK}.save_best_model", True, f"{CALLBACK}.save_best_model: the best of the checkpoints, and none"),
        ("exp_manager.max_time_per_run", "1h", "exp_manager.max_time_per_run: '1h' is not of the form"),
        ("model.optim.sched", {"name": "none"}, "model.optim.sched.name: 'none' is not one of"),
        ("model.tensor_model_parallel_size", 2, "model.tensor_model_parallel_size: 2 does not divide"),
        ("model.restore_from_path", "/no.nemo", "pretrained_checkpoint.restore_from_path=/no.nemo: no such file"),
        ("model.restore_from_path", "JUDGE", "pretrained_checkpoint.restore_from_path=JUDGE is a reward model"),
    ],
)
def test_what_is_wrong_is_said_before_a_run_starts(
    archives: Archives, tmp_path: Path, never_starts: None, key: str, value: Any, says: str
) -> None:
    cfg = config(tmp_path, archives)
    check_refused(start.run, cfg, key, value, says, JUDGE=str(archives.judge))


def test_the_rows_of_both_splits_are_read(tmp_path: Path, archives: Archives) -> None:
    train, validation = start.open_rows(config(tmp_path, archives))
    assert [row["text"] for row in train] == [row["text"] for row in PROMPTS]
    assert validation is not None
    assert [row["input"] for row in validation] == [row["input"] for row in HELD_OUT]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_row_without_a_prompt_is_named(archives: Archives, tmp_path: Path, never_starts: None, split: str) -> None:
    cfg = config(tmp_path, archives)
    cfg.model.data.data_prefix[split] = [write_rows(tmp_path / "bad.jsonl", [{"prompt": "a"}])]
    with pytest.raises(DataError, match=r"bad\.jsonl:1: no text in field"):
        start.run(cfg)


def test_a_policy_that_was_replaced_meanwhile_is_refused_by_its_key_too(
    archives: Archives, tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "check_is_policy", lambda *args: None)
    cfg = config(tmp_path, archives)
    cfg.model.restore_from_path = str(archives.judge)
    with pytest.raises(CheckpointError, match=r"^pretrained_checkpoint\.restore_from_path=.* is a reward model"):
        start.run(cfg)


def test_a_checkpoint_of_other_settings_is_refused_before_a_model_is_loaded(
    archives: Archives, tmp_path: Path, alone: None, judges: list[Judge], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(tmp_path, archives)
    cfg.trainer.ppo.save_interval, cfg.trainer.ppo.max_steps = 1, 1
    start.run(cfg)
    monkeypatch.setattr(policy, "load_policy_for_training", None)
    changes = (
        ("trainer.ppo.gradient_clip_val", 0.25, "gradient_clip_val = 0.5, this run has 0.25"),
        ("model.ppo.num_rollout_per_prompt", 3, "model.ppo.num_rollout_per_prompt = 2, this run has 3"),
        ("model.hidden_dropout", 0.5, "model.hidden_dropout = None, this run has 0.5"),
        ("model.attention_dropout", 0.5, "model.attention_dropout = None, this run has 0.5"),
        ("model.restore_from_path", str(archives.other), "the archive to start from = "),
    )
    check_other_runs_refused(start.run, cfg, changes)


@pytest.mark.processes
def test_rewards_come_from_a_function_without_a_server_and_a_changed_one_is_refused(
    archives: Archives, tmp_path: Path, alone: None, judges: list[Judge]
) -> None:
    cfg, own = config(tmp_path, archives), tmp_path / "own.py"
    own.write_text("def letters(responses, text=None, **f):\n    return [float(f['n'][0]) - 9.0 * (f['n'][0] == 3)]\n")
    rows = [{**row, "n": n} for n, row in enumerate(PROMPTS)]
    cfg.model.data.data_prefix = {"train": [write_rows(tmp_path / "numbered.jsonl", rows)]}
    cfg.reward_function = {"own": {"function": f"{own}:letters", "weight": 0.5}}
    cfg.trainer.ppo.save_interval, cfg.trainer.ppo.max_epochs = 1, 1
    start.run(cfg)
    assert judges == []
    found = [row for step in (1, 2) for row in read_rows(tmp_path / "log" / "rollouts" / f"step_{step}.jsonl")]
    worth = {row["text"]: float(n if n < 3 else -6) for n, row in enumerate(PROMPTS)}
    assert {(row["input"], row["reward_own"], row["reward"]) for row in found} == {
        (text, reward, 0.5 * reward) for text, reward in worth.items()
    }
    assert logged(tmp_path / "log", "train_rollouts/rewards_unknown") == [0.0, 0.0]
    cfg.reward_function["own"]["weight"] = 1.0
    with pytest.raises(CheckpointError, match=r"was made with reward_function = \{.*'weights': \{'own': 0.5\}"):
        start.run(cfg)


@pytest.mark.processes
def test_a_prompt_without_a_field_that_the_function_needs_is_named(
    archives: Archives, tmp_path: Path, never_starts: None
) -> None:
    cfg = config(tmp_path, archives)
    cfg.reward_function = "nemo_aligner.rewards.text:exact_match"
    with pytest.raises(DataError, match=r"train.jsonl:1: no field 'answer', which reward function exact_match needs"):
        start.run(cfg)
