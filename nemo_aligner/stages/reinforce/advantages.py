"""From rollouts to what is trained on: KL-penalised rewards, advantages, examples, and the figures that are logged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nemo_aligner.algorithms.reinforce import baselines
from nemo_aligner.algorithms.shaping import overlong, whitened, whitening
from nemo_aligner.algorithms.statistics import mean_and_std
from nemo_aligner.config.reinforce import ReinforceLoopConfig
from nemo_aligner.data.supervised import Example
from nemo_aligner.errors import TrainingError
from nemo_aligner.records import part_fields, part_name
from nemo_aligner.stages.reinforce.rollout import Rollout, token_count


@dataclass
class Scored:
    """The rollouts of one step with their advantages; without those where nothing is trained (validation)."""

    rollouts: list[Rollout]
    with_kl: Tensor  # R, [B] float64
    counted: Tensor  # [B] bool: trained on
    advantages: Tensor | None  # [B] float64
    figures: dict[str, float] = field(default_factory=dict)  # what was done to the rewards


def shaped(rollouts: Sequence[Rollout], loop: ReinforceLoopConfig, max_length: int | None) -> Tensor:
    """Rewards `[B]` float64, clipped and less the length penalty as `loop` says; NaN where there is none."""
    rewards = _raw(rollouts)
    if loop.reward_clip_range is not None:
        rewards = rewards.clamp(*loop.reward_clip_range)
    if loop.overlong_buffer_length is not None:
        rewards = rewards - loop.overlong_buffer_penalty * _overlong(rollouts, loop.overlong_buffer_length, max_length)
    return rewards


def _raw(rollouts: Sequence[Rollout]) -> Tensor:
    return torch.tensor([math.nan if r.reward is None else r.reward for r in rollouts], dtype=torch.float64)


def _overlong(rollouts: Sequence[Rollout], buffer: int, max_length: int | None) -> Tensor:
    assert max_length is not None, "the config is refused without"
    return overlong(torch.tensor([len(r.tokens) for r in rollouts]), buffer, max_length)


def _shaping_figures(
    rollouts: Sequence[Rollout], loop: ReinforceLoopConfig, max_length: int | None
) -> dict[str, float]:
    """How much `shaped` did, over all responses (a reward that is not known was not clipped)."""
    found: dict[str, float] = {}
    if loop.reward_clip_range is not None:
        raw = _raw(rollouts)
        low, high = loop.reward_clip_range
        found["rewards_clipped"] = float(((raw < low) | (raw > high)).double().mean())
    if loop.overlong_buffer_length is not None:
        reach = _overlong(rollouts, loop.overlong_buffer_length, max_length)
        found["fraction_overlong"] = float((reach > 0).double().mean())
        found["overlong_penalty"] = loop.overlong_buffer_penalty * float(reach.mean())
    return found


def score(
    rollouts: list[Rollout],
    loop: ReinforceLoopConfig,
    greedy: Tensor | None,
    *,
    kl_penalty: float | None = None,
    max_length: int | None = None,
    validation: bool = False,
) -> Scored:
    """R = r − β·KL, A = R − b, with r shaped as `loop` says (`algorithms/shaping.py`); in validation it is not.

    `greedy` `[B]` are the rewards ReMax compares with, as `shaped` gives them; they carry no KL. `kl_penalty` is β,
    where it is no longer that of `loop`; `max_length` the tokens that the length penalty counts back from.

    A response without a reward has the R NaN and is not counted: it is left out of loss and baseline. With ReMax those
    to a prompt whose greedy response has none (NaN) are left out too. The advantage of both is 0.
    """
    beta = loop.initial_policy_kl_penalty if kl_penalty is None else kl_penalty
    rewards = _raw(rollouts) if validation else shaped(rollouts, loop, max_length)
    penalty = beta * torch.tensor([r.kl or 0.0 for r in rollouts], dtype=torch.float64)
    known = ~rewards.isnan() if greedy is None else ~(rewards + greedy).isnan()
    counted = torch.tensor([r.finished or loop.unfinished == "keep" for r in rollouts]) & known
    if validation:
        return Scored(rollouts, rewards - penalty, counted, None)
    figures = _shaping_figures(rollouts, loop, max_length)
    if loop.whiten_rewards:
        mean, std = whitening(rewards, counted)
        rewards, greedy = whitened(rewards, mean, std), None if greedy is None else whitened(greedy, mean, std)
        figures |= {"whitening_mean": mean, "whitening_std": std}
    with_kl = rewards - penalty
    groups = torch.tensor([r.group for r in rollouts])
    advantages = with_kl - baselines(loop.baseline, with_kl, groups, greedy, counted)
    return Scored(rollouts, with_kl, counted, torch.where(known, advantages, 0.0), figures)


def examples_of(scored: Scored) -> list[Example]:
    """What is trained on: the counted responses, the token that ended each included, weighted by their advantages.

    One whose advantage is 0 has no gradient, so that only the number of its tokens is left of it.
    """
    assert scored.advantages is not None
    return [
        Example((r.row,), ([0] * len(r.prompt.tokens) + [1] * len(r.tokens),), weight=advantage)
        if advantage
        else Example((r.row[:1],), ([0],), weight=0.0, targets=len(r.tokens) - (not r.prompt.tokens))
        for r, advantage, counted in zip(scored.rollouts, scored.advantages.tolist(), scored.counted, strict=True)
        if counted
    ]


def rollout_rows(scored: Scored) -> list[dict[str, Any]]:
    """The rollouts for people to read, with what was trained on where something was."""
    advantages = [None] * len(scored.rollouts) if scored.advantages is None else scored.advantages.tolist()
    return [
        {**r.prompt.shown, "output": r.text, "reward": r.reward, **part_fields(r.parts), "kl": r.kl}
        | ({} if advantage is None else {"advantage": advantage, "trained": bool(counted)})
        for r, advantage, counted in zip(scored.rollouts, advantages, scored.counted, strict=True)
    ]


def rollout_metrics(scored: Scored) -> dict[str, float]:
    """The figures of one step's rollouts, under the names that NeMo-Aligner gives them where it has them."""
    rollouts, count = scored.rollouts, len(scored.rollouts)
    tokens = token_count(rollouts)
    mean, std = mean_and_std([r.reward for r in rollouts if r.reward is not None])
    found = {
        "rollout_size": count,
        "prompt_lengths": sum(len(r.prompt.tokens) for r in rollouts) / count,
        "response_lengths": sum(len(r.row) for r in rollouts) / count,  # with the prompt, as in NeMo-Aligner
        "generation_length": tokens / count,
        "rewards": mean,
        "rewards_std": 0.0 if count == 1 else std,
        "fraction_of_samples_properly_ended": sum(r.finished for r in rollouts) / count,
        "entropy": -sum(sum(r.logprobs) for r in rollouts) / tokens,  # per token, estimated from what was drawn
    }
    if all(r.kl is not None for r in rollouts):
        found["init_policy_kl"] = sum(r.kl or 0.0 for r in rollouts) / count
        found["rewards_with_kl"] = float(scored.with_kl.nanmean())
    found |= scored.figures
    for name in rollouts[0].parts:
        known = [reward for r in rollouts if (reward := r.parts[name]) is not None]
        found[part_name(name)] = mean_and_std(known)[0]
    if rollouts[0].parts:
        found["rewards_unknown"] = sum(r.reward is None for r in rollouts) / count
    if scored.advantages is not None:
        found["advantage_mean"] = float(scored.advantages.mean())
        found["advantage_std"] = float(scored.advantages.std(correction=0))
    return found


def check_finite(rollouts: Sequence[Rollout]) -> None:
    """Raises TrainingError for a reward that is no number, before it can reach the weights."""
    for rollout in rollouts:
        if rollout.reward is not None and not math.isfinite(rollout.reward):
            raise TrainingError(
                f"the reward model gave {rollout.reward} for the response {rollout.text[:80]!r} "
                f"to the prompt {rollout.prompt.text[:80]!r}"
            )
