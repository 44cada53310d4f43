"""The REINFORCE loop with a stand-in for the policy: what it draws, what it trains on, when it saves and validates."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_aligner.algorithms.sampling import SamplingParams
from nemo_aligner.config.reinforce import ReinforceConfig
from nemo_aligner.config.schema import OptimConfig
from nemo_aligner.data.prompts import PromptRow
from nemo_aligner.engine.checkpoints.checkpoint_folder import read_state
from nemo_aligner.engine.interfaces import GenerationRequest, Microbatch, StepMetrics
from nemo_aligner.errors import CheckpointError, ConfigError, ServerError, StoppedEarly
from nemo_aligner.event_file import shown_before
from nemo_aligner.rewards.interfaces import Candidate, Judgement, ServedModel
from nemo_aligner.stages.reinforce.drawing import sampling_params
from nemo_aligner.stages.reinforce.loop import Actor
from tests.fakes import EchoPolicy, OneProcess

PROMPTS = [PromptRow(f"p{i}", tuple(f"p{i}".encode())) for i in range(5)]
HELD_OUT = [PromptRow(f"h{i}", tuple(f"h{i}".encode())) for i in range(3)]


class Learner(EchoPolicy):
    """Remembers every request with how it was drawn, and every optimizer step's rows and weights."""

    max_sequence_length = 40
    rows_together = 0

    def __init__(self) -> None:
        super().__init__()
        self.cluster = OneProcess()
        self.drawn: list[tuple[GenerationRequest, SamplingParams, int]] = []
        self.trained: list[list[tuple[tuple[int, ...], float]]] = []

    def generate(self, requests: Any, sampling: SamplingParams, max_slots: int) -> Any:
        asked = list(requests)
        self.drawn += [(request, sampling, max_slots) for request in asked]
        yield from super().generate(asked, sampling, max_slots)

    def initial_logprobs(self, rows: Sequence[Sequence[int]], batch: int, starts: Sequence[int]) -> list[torch.Tensor]:
        """Half of those it drew with: the KL (k1, sum) of t tokens is −0.25·t·(t + 1)/2."""
        return [
            torch.tensor([0.0] * start + [-0.25 * (1 + i) for i in range(len(row) - start)])
            for row, start in zip(rows, starts, strict=True)
        ]

    def train_step(self, microbatches: Sequence[Microbatch], objective: Any) -> StepMetrics:
        self.rows_together = max(self.rows_together, *(len(m.tokens) for m in microbatches))
        self.trained.append(
            sorted(
                (tuple(row[:length].tolist()), float(weight))
                for m in microbatches
                for row, length, weight in zip(m.tokens, m.lengths, m.fields["weights"], strict=True)
            )
        )
        return StepMetrics(0.5 * len(self.trained), 2.0, 0.1)

    def save_training_state(self, folder: Path, state: dict[str, Any]) -> None:
        folder.mkdir(exist_ok=True)  # in place of what is there
        (folder / "state.json").write_text(json.dumps({"format": 1, **state}))

    def load_training_state(self, folder: Path) -> dict[str, Any]:
        return json.loads((folder / "state.json").read_text())

    def save_nemo(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("archive")


class Judge:
    """The reward of a text: its last bytes as a number. From request `dies_at` on it answers no more."""

    def __init__(self, dies_at: float = math.inf) -> None:
        self.left = dies_at

    def submit(self, candidates: Sequence[Candidate]) -> Future[list[Judgement]]:
        answer: Future[list[Judgement]] = Future()
        self.left -= 1
        if self.left < 0:
            answer.set_exception(ServerError("no answer"))
        else:
            answer.set_result([Judgement(reward_of(c.prompt + c.response)) for c in candidates])
        return answer

    def hurry(self) -> None:
        pass


def reward_of(text: str) -> float:
    return float(sum(text.encode()) % 7)


def config(folder: Path, **ppo: Any) -> ReinforceConfig:
    cfg = ReinforceConfig()
    cfg.pretrained_checkpoint.restore_from_path = "policy.nemo"
    exp = cfg.exp_manager
    exp.explicit_log_dir, exp.name, exp.create_tensorboard_logger = str(folder), "actor", False
    exp.checkpoint_callback_params.monitor = "rewards"
    cfg.model.optim = OptimConfig(name="adamw", lr=1e-2)
    cfg.model.micro_batch_size, cfg.model.global_batch_size, cfg.model.seed = 4, 4, 50
    cfg.model.data.data_prefix = {"train": ["prompts.jsonl"]}
    rollout = cfg.model.ppo
    rollout.num_rollout_samples, rollout.num_rollout_per_prompt = 2, 2
    rollout.rollout_micro_batch_size, rollout.val_rollout_micro_batch_size = 3, 5
    cfg.trainer.ppo.save_interval = 0
    for name, value in ppo.items():
        setattr(cfg.trainer.ppo, name, value)
    return cfg


def run(
    cfg: ReinforceConfig,
    *,
    learner: Learner | None = None,
    validation: Sequence[PromptRow] = (),
    judge: Judge | None = None,
    served: ServedModel | None = None,
) -> Learner:
    learner = learner or Learner()
    actor = Actor(cfg, learner, learner.cluster, PROMPTS, validation)  # type: ignore[arg-type]
    actor.train(judge or Judge(), served)
    return learner


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if any(key.startswith(f"{name}/") for key in row)]


def test_no_two_steps_of_a_run_share_noise_and_every_rollout_is_drawn_with_the_runs_seed(tmp_path: Path) -> None:
    learner = run(config(tmp_path, max_epochs=2))
    noise = [(sampling.seed, request.prompt_index, request.sample_index) for request, sampling, _ in learner.drawn]
    assert len(noise) == len(set(noise)) == 2 * 5 * 2
    assert {seed for seed, _, _ in noise} == {50}


def test_an_epoch_asks_for_every_prompt_and_the_next_in_another_order(tmp_path: Path) -> None:
    cfg = config(tmp_path, max_epochs=2)
    cfg.model.ppo.num_rollout_per_prompt = 1
    cfg.trainer.ppo.baseline = "none"
    asked = [bytes(request.prompt_tokens) for request, _, _ in run(cfg).drawn]
    assert sorted(asked[:5]) == sorted(asked[5:]) == [prompt.text.encode() for prompt in PROMPTS]
    assert asked[:5] != asked[5:]
    cfg.exp_manager.explicit_log_dir, cfg.model.data.shuffle = str(tmp_path / "straight"), False
    straight = [bytes(request.prompt_tokens) for request, _, _ in run(cfg).drawn]
    assert straight == 2 * [prompt.text.encode() for prompt in PROMPTS]


def test_responses_are_trained_on_in_batches_with_advantages_of_rewards_less_kl(tmp_path: Path) -> None:
    cfg = config(tmp_path, max_steps=1, initial_policy_kl_penalty=2.0)
    cfg.model.ppo.num_rollout_per_prompt = 3
    learner = run(cfg)
    groups: dict[bytes, list[tuple[tuple[int, ...], float]]] = {}
    for request, _, _ in learner.drawn:
        text = f"<{request.prompt_index}.{request.sample_index}>"
        prompt = bytes(request.prompt_tokens)
        t = len(text)
        with_kl = reward_of(prompt.decode() + text) + 2.0 * 0.25 * t * (t + 1) / 2
        groups.setdefault(prompt, []).append(((*prompt, *text.encode()), with_kl))
    expected = []
    for members in groups.values():
        for i, (row, value) in enumerate(members):
            others = [other for j, (_, other) in enumerate(members) if j != i]
            advantage = value - sum(others) / len(others)
            expected.append((row if abs(advantage) > 1e-6 else row[:1], advantage))  # without one nothing is learned
    assert [len(step) for step in learner.trained] == [4, 2], "global batches of four responses, the rest too"
    found = sorted(pair for step in learner.trained for pair in step)
    assert [row for row, _ in found] == [row for row, _ in sorted(expected)]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in sorted(expected)], abs=1e-5)


def test_remax_draws_one_greedy_response_to_each_prompt_of_the_step(tmp_path: Path) -> None:
    learner = run(config(tmp_path, max_steps=1, baseline="ReMax"))
    greedy = [request for request, sampling, _ in learner.drawn if sampling.greedy]
    drawn = [request for request, sampling, _ in learner.drawn if not sampling.greedy]
    assert sorted({r.prompt_tokens for r in greedy}) == sorted({r.prompt_tokens for r in drawn})
    assert (len(greedy), len(drawn)) == (2, 4)


@pytest.mark.parametrize("kept", [0, 3, 64])
def test_rollouts_of_every_step_are_kept_for_people_to_read_with_what_was_trained_on(tmp_path: Path, kept: int) -> None:
    learner = run(config(tmp_path, max_steps=2, keep_rollouts=kept))
    assert (tmp_path / "rollouts").exists() == (kept > 0)
    for step in (1, 2) if kept else ():
        lines = (tmp_path / "rollouts" / f"step_{step}.jsonl").read_text().splitlines()
        assert len(lines) == min(kept, 4)
        trained = dict(learner.trained[step - 1])
        for row in map(json.loads, lines):
            text = row["input"] + row["output"]
            assert (row["reward"], row["trained"]) == (reward_of(text), True)
            assert row["advantage"] == pytest.approx(trained[tuple(text.encode())], abs=1e-5)


def test_rollouts_that_are_not_trained_on_say_so(tmp_path: Path) -> None:
    run(config(tmp_path, max_steps=1, unfinished="mask", baseline="none"))
    rows = [json.loads(line) for line in (tmp_path / "rollouts" / "step_1.jsonl").read_text().splitlines()]
    assert [row["trained"] for row in rows] == [row["output"].endswith(".0>") for row in rows]  # as EchoPolicy finishes


@pytest.mark.parametrize("num_val_samples", [2, 3, 99])
def test_validation_draws_one_response_to_each_of_the_first_prompts_always_with_the_same_noise(
    tmp_path: Path, num_val_samples: int
) -> None:
    cfg = config(tmp_path, max_epochs=1, val_check_interval=2)
    cfg.model.ppo.num_val_samples = num_val_samples
    cfg.exp_manager.create_tensorboard_logger, cfg.exp_manager.log_samples = True, 2
    learner = run(cfg, validation=HELD_OUT)
    used = HELD_OUT[:num_val_samples]
    asked = [(r, s, slots) for r, s, slots in learner.drawn if bytes(r.prompt_tokens).startswith(b"h")]
    assert [r.prompt_tokens for r, _, _ in asked] == 3 * [p.tokens for p in used], "before, after step 2, at the end"
    assert len({(s.seed, r.prompt_index, r.sample_index) for r, s, _ in asked}) == len(used)
    assert {s.seed for _, s, _ in asked} == {51}, "other noise than in training"
    assert {slots for _, _, slots in asked} == {5}
    assert [row["step"] for row in rows_of(tmp_path, "val_rollouts")] == [0, 2, 3]
    texts = shown_before(tmp_path).texts
    for step in (0, 2, 3):
        shown = [f"<{i}.0>" for i in range(len(used))][:2]
        assert re.findall(r"<.*>", texts[step, "table/val_rollouts"]) == shown, "the same prompts each time"
        lines = (tmp_path / "validation" / f"step_{step}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [
            {"input": p.text, "output": f"<{i}.0>", "reward": reward_of(f"{p.text}<{i}.0>"), "kl": -0.25 * 15}
            for i, p in enumerate(used)
        ]
    assert texts[3, "archive_sha256"] == hashlib.sha256(b"archive").hexdigest()


def test_as_many_responses_are_drawn_at_once_as_the_micro_batch_says(tmp_path: Path) -> None:
    assert {slots for _, _, slots in run(config(tmp_path)).drawn} == {3 * 2}


@pytest.mark.parametrize(("budget", "together"), [(None, 4), (1, 1)])
def test_micro_batches_are_within_the_budget_of_tokens(tmp_path: Path, budget: int | None, together: int) -> None:
    cfg = config(tmp_path)
    cfg.model.micro_batch_tokens = budget
    assert run(cfg).rows_together == together


@pytest.mark.parametrize(
    ("ppo", "steps"), [({}, 3), ({"max_steps": 2}, 2), ({"max_steps": 99}, 3), ({"max_epochs": 2, "max_steps": 4}, 4)]
)
def test_the_number_of_steps_is_the_smaller_of_the_limits(tmp_path: Path, ppo: dict[str, int], steps: int) -> None:
    learner = Learner()
    made = Actor(config(tmp_path, **ppo), learner, learner.cluster, PROMPTS, [])  # type: ignore[arg-type]
    assert made.steps == steps
    # steps of 2, 2 and 1 prompts with 2 responses each, 4 responses to an optimizer step
    assert made.optimizer_steps == steps
    made.train(Judge())
    assert len(learner.trained) == steps


def test_optimizer_steps_are_counted_with_the_last_small_batch(tmp_path: Path) -> None:
    cfg, learner = config(tmp_path), Learner()
    cfg.model.global_batch_size = 3
    made = Actor(cfg, learner, learner.cluster, PROMPTS, [])  # type: ignore[arg-type]
    assert made.optimizer_steps == 2 + 2 + 1
    made.train(Judge())
    assert [len(step) for step in learner.trained] == [3, 1, 3, 1, 2]
    found = rows_of(tmp_path, "train_optim")
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5]
    assert [row["train_optim/loss"] for row in found] == [0.5, 1.0, 1.5, 2.0, 2.5]


@pytest.mark.parametrize(("interval", "saved"), [(0, []), (1, [1, 2, 3]), (2, [2, 3]), (9, [3])])
def test_checkpoints_are_written_at_their_interval_and_at_the_end(
    tmp_path: Path, interval: int, saved: list[int]
) -> None:
    cfg = config(tmp_path, save_interval=interval)
    cfg.exp_manager.checkpoint_callback_params.save_top_k = -1
    run(cfg)
    states = [json.loads(path.read_text()) for path in (tmp_path / "checkpoints").glob("*/state.json")]
    assert sorted(state["step"] for state in states) == saved
    logged = {row["step"]: row["train_rollouts/rewards"] for row in rows_of(tmp_path, "train_rollouts")}
    for state in states:
        assert state["consumed_samples"] == min(5, 2 * state["step"])
        assert state["updates"] == state["step"]
        assert state["monitored"] == logged[state["step"]]
    assert (tmp_path / "checkpoints" / "actor.nemo").exists()


def test_a_checkpoint_has_the_validation_of_its_own_step_or_none_and_one_that_a_stop_made_is_not_ranked(
    tmp_path: Path,
) -> None:
    """Steps that were not validated are after all that were."""

    def monitored(folder: Path, stop: int = 0, **ppo: Any) -> dict[int, float]:
        cfg, learner = config(folder, max_epochs=2, val_check_interval=2, **ppo), Learner()
        cfg.exp_manager.checkpoint_callback_params.monitor = "val_rewards"
        cfg.exp_manager.checkpoint_callback_params.save_top_k = -1
        if stop:
            learner.cluster.any = lambda flag: len(learner.trained) >= stop  # type: ignore[method-assign]
            with pytest.raises(StoppedEarly, match=f"at step {stop} of 6"):
                run(cfg, learner=learner, validation=HELD_OUT)
        else:
            run(cfg, validation=HELD_OUT)
        states = [read_state(path.parent) for path in (folder / "checkpoints").glob("*/state.json")]
        return {state["step"]: state["monitored"] for state in states}

    value = sum(reward_of(f"{p.text}<{i}.0>") for i, p in enumerate(HELD_OUT)) / 3
    none = pytest.approx(math.nan, nan_ok=True)
    assert monitored(tmp_path / "every", save_interval=1) == {1: none, 2: value, 3: none, 4: value, 5: none, 6: value}
    assert monitored(tmp_path / "third", stop=3, save_interval=2) == {2: value, 3: none}
    assert monitored(tmp_path / "third", save_interval=2) == {2: value, 3: none, 4: value, 6: value}
    assert monitored(tmp_path / "second", stop=2, save_interval=3) == {2: none}
    assert monitored(tmp_path / "at once", stop=2, save_interval=2) == {2: value}


def test_a_run_that_is_told_to_stop_saves_where_it_is_and_goes_on_there(tmp_path: Path) -> None:
    whole = run(config(tmp_path / "whole", max_epochs=2))
    learner = Learner()
    learner.cluster.any = lambda flag: len(learner.trained) >= 2  # type: ignore[method-assign]
    with pytest.raises(StoppedEarly, match="at step 2 of 6; checkpoint in"):
        run(config(tmp_path / "parts", max_epochs=2), learner=learner)
    assert not (tmp_path / "parts" / "checkpoints" / "actor.nemo").exists()
    second = run(config(tmp_path / "parts", max_epochs=2))
    assert learner.trained + second.trained == whole.trained
    for name in ("train_rollouts", "train_optim"):
        assert rows_of(tmp_path / "parts", name)[-4:][0]["step"] == rows_of(tmp_path / "whole", name)[-4:][0]["step"]
        assert len(rows_of(tmp_path / "parts", name)) == len(rows_of(tmp_path / "whole", name))


@pytest.mark.parametrize(("done", "checkpoint"), [(0, False), (1, True), (4, True)])
def test_told_to_stop_as_its_server_is_a_run_saves_what_is_done_and_goes_on_to_the_same_end(
    tmp_path: Path, done: int, checkpoint: bool
) -> None:
    whole = run(config(tmp_path / "whole", max_epochs=2), validation=HELD_OUT)
    cfg, first = config(tmp_path / "parts", max_epochs=2, val_check_interval=6), Learner()
    before = 1 + done  # a request for the validation and one for each step
    with pytest.raises(ServerError, match="no answer"):
        Actor(cfg, first, first.cluster, PROMPTS, HELD_OUT).train(Judge(before))  # type: ignore[arg-type]
    assert not list((tmp_path / "parts").glob("checkpoints/*/")), "without a signal the fault is a fault"
    first = Learner()
    first.cluster.any = lambda flag: flag or judge.left < 0  # type: ignore[method-assign]
    judge = Judge(before)
    with pytest.raises(StoppedEarly, match=rf"at step {done} of 6; {'checkpoint in' if checkpoint else 'no checkp'}"):
        Actor(cfg, first, first.cluster, PROMPTS, HELD_OUT).train(judge)  # type: ignore[arg-type]
    second = run(cfg, validation=HELD_OUT)
    assert first.trained + second.trained == whole.trained
    assert [row["step"] for row in rows_of(tmp_path / "parts", "train_rollouts")] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows_of(tmp_path / "parts", "val_rollouts")] == [0, 6]


@pytest.mark.parametrize("step", [0, 3, 6])
def test_told_to_stop_in_a_validation_a_run_owes_it_and_ends_with_the_same_curves(tmp_path: Path, step: int) -> None:
    every = {"max_epochs": 2, "val_check_interval": 3, "save_interval": 2}
    whole = run(config(tmp_path / "whole", **every), validation=HELD_OUT)
    cfg, first = config(tmp_path / "parts", **every), Learner()
    before = {0: 0, 3: 4, 6: 8}[step]  # a request for each step and validation
    with pytest.raises(ServerError, match="no answer"):
        run(config(tmp_path / "fault", **every), validation=HELD_OUT, judge=Judge(before))
    first.cluster.any = lambda flag: flag or judge.left < 0  # type: ignore[method-assign]
    judge = Judge(before)
    with pytest.raises(StoppedEarly, match=rf"at step {step} of 6; "):
        run(cfg, learner=first, validation=HELD_OUT, judge=judge)
    second = run(cfg, validation=HELD_OUT)
    assert first.trained + second.trained == whole.trained
    for name in ("train_rollouts", "val_rollouts", "timers"):
        steps = [row["step"] for row in rows_of(tmp_path / "parts", name)]
        assert steps == [row["step"] for row in rows_of(tmp_path / "whole", name)], name
    kept = [{path.name for path in (tmp_path / part / "checkpoints").iterdir()} for part in ("parts", "whole")]
    assert kept[1] <= kept[0]


def test_figures_of_progress_and_the_seconds_of_every_phase_are_logged_at_each_step(tmp_path: Path) -> None:
    run(config(tmp_path, max_epochs=2, val_check_interval=3), validation=HELD_OUT)
    rollouts = rows_of(tmp_path, "train_rollouts")
    assert [row["step"] for row in rollouts] == [1, 2, 3, 4, 5, 6]
    assert [row["train_rollouts/consumed_samples"] for row in rollouts] == [2, 4, 5, 7, 9, 10]
    assert [row["train_rollouts/epoch"] for row in rollouts] == [0, 0, 0, 1, 1, 1]
    timers = rows_of(tmp_path, "timers")
    assert [row["step"] for row in timers] == [1, 2, 3, 4, 5, 6]
    phases = {"rollout_time", "train_time", "generate", "init_logprobs", "critic_wait"}
    for row in timers:
        names = {key.removeprefix("timers/") for key in row if key != "step"}
        assert names == phases | ({"validation_time"} if row["step"] in (1, 3, 6) else set())
        assert all(row[f"timers/{name}"] >= 0 for name in names)
        parts = row["timers/generate"] + row["timers/init_logprobs"] + row["timers/critic_wait"]
        assert parts <= row["timers/rollout_time"] + row.get("timers/validation_time", 0.0) + 1e-6


def test_sampling_settings_reach_the_engine_each_under_its_name(tmp_path: Path) -> None:
    cfg, learner = config(tmp_path), Learner()
    given, lengths = cfg.model.ppo.sampling_params, cfg.model.ppo.length_params
    given.temperature, given.top_k, given.top_p, given.repetition_penalty = 0.7, 5, 0.9, 1.2
    given.end_strings, lengths.min_length, lengths.max_length = ["a", "b"], 2, 11

    def found(**ppo: Any) -> SamplingParams:
        for name, value in ppo.items():
            setattr(cfg.trainer.ppo, name, value)
        return sampling_params(cfg, learner)  # type: ignore[arg-type]

    assert found() == SamplingParams(
        greedy=False, temperature=0.7, top_k=5, top_p=0.9, repetition_penalty=1.2, min_tokens=2, max_tokens=11,
        end_strings=("a", "b"), seed=50,
    )  # fmt: skip
    lengths.max_length = 99
    assert found().max_tokens == 39, "a prompt of one token is left room"
    assert found(rollout_batch_seq_length=10).max_tokens == 9
    assert found(rollout_batch_seq_length=1000).max_tokens == 39, "no more than the model's context"
    lengths.max_length = None
    assert found(rollout_batch_seq_length=None).max_tokens == 20
    lengths.min_length = 21
    said = r"^model\.ppo\.length_params\.min_length: 21 is above the 20 tokens that a response may have$"
    with pytest.raises(ConfigError, match=said):
        found()


@pytest.mark.parametrize(
    "key",
    [
        "model.global_batch_size",
        "trainer.ppo.initial_policy_kl_penalty",
        "trainer.ppo.kl_estimator",
        "trainer.ppo.kl_reduction",
        "trainer.ppo.baseline",
        "trainer.ppo.unfinished",
        "trainer.ppo.rollout_batch_seq_length",
        "model.hidden_dropout",
        "model.attention_dropout",
        "model.ppo.sampling_params.temperature",
        "model.ppo.sampling_params.top_k",
        "model.ppo.sampling_params.top_p",
        "model.ppo.sampling_params.repetition_penalty",
        "model.ppo.sampling_params.end_strings",
        "model.ppo.length_params.max_length",
        "model.ppo.length_params.min_length",
        "model.optim.lr",
        "model.optim.weight_decay",
        "model.optim.betas",
        "model.optim.eps",
        "model.seed",
        "model.data.shuffle",
        "model.ppo.num_rollout_samples",
        "model.ppo.num_rollout_per_prompt",
    ],
)
def test_what_decides_the_result_may_not_change_when_a_run_goes_on(tmp_path: Path, key: str) -> None:
    run(config(tmp_path, max_steps=1, save_interval=1))
    other: Any = config(tmp_path, max_steps=2, save_interval=1)
    block: Any = other
    *path, name = key.split(".")
    for part in path:
        block = getattr(block, part)
    old = getattr(block, name)
    values: dict[str, Any] = {"kl_estimator": "k3", "kl_reduction": "mean", "baseline": "none", "unfinished": "mask"}
    new = values.get(name, not old if isinstance(old, bool) else 3 if old is None or isinstance(old, int) else None)
    if new is None:
        new = [*old, "x"] if name == "end_strings" else [0.1, 0.2] if name == "betas" else old / 2
    setattr(block, name, new)
    with pytest.raises(CheckpointError, match=f"was made with {key}".replace(".", r"\.")):
        run(other)


def test_the_older_switch_of_the_kl_counts_as_the_estimator_that_it_is(tmp_path: Path) -> None:
    run(config(tmp_path, max_steps=1, save_interval=1, kl_estimator="k1"))
    other = config(tmp_path, max_steps=2, save_interval=1, use_absolute_kl=True)
    with pytest.raises(CheckpointError, match=r"was made with trainer\.ppo\.kl_estimator = k1, this run has abs"):
        run(other)
    run(config(tmp_path, max_steps=2, save_interval=1, use_absolute_kl=False, kl_estimator="k3"))


def test_another_archive_or_other_prompts_do_not_go_on(tmp_path: Path) -> None:
    run(config(tmp_path, max_steps=1, save_interval=1))
    other = Learner()
    other.archive = "b" * 64
    with pytest.raises(CheckpointError, match="the archive to start from"):
        run(config(tmp_path, max_steps=2), learner=other)
    learner = Learner()
    longer = [*PROMPTS[:-1], dataclasses.replace(PROMPTS[-1], tokens=(1, 2))]
    with pytest.raises(CheckpointError, match="training prompts"):
        Actor(config(tmp_path, max_steps=2), learner, learner.cluster, longer, []).train(Judge())  # type: ignore[arg-type]


def test_what_does_not_decide_the_result_may_change(tmp_path: Path) -> None:
    run(config(tmp_path, max_steps=1, save_interval=1))
    other = config(tmp_path, max_steps=2, save_interval=2, val_check_interval=7)
    other.model.micro_batch_size, other.model.ppo.rollout_micro_batch_size = 1, 9
    assert len(run(other, validation=HELD_OUT).trained) == 1


@dataclasses.dataclass
class Served:
    """The archive that a server says it has."""

    archive: str | None = None


def test_a_run_that_goes_on_takes_rewards_of_the_reward_model_that_it_began_with(tmp_path: Path) -> None:
    first, again = Served("a" * 64), Served()
    run(config(tmp_path, max_steps=1, save_interval=1), served=first)
    run(config(tmp_path, max_steps=2, save_interval=1), served=again)
    assert again.archive == first.archive
