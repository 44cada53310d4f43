"""From rollouts to what is trained on: KL-penalised rewards, advantages, examples, and the figures that are logged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_aligner.algorithms.reinforce import baselines
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


def score(
    rollouts: list[Rollout], loop: ReinforceLoopConfig, greedy: Tensor | None, *, validation: bool = False
) -> Scored:
    """R = r − β·KL, A = R − b. `greedy` `[B]` are the rewards ReMax compares with; they carry no KL.

    A response without a reward has the R NaN and is not counted: it is left out of loss and baseline. With ReMax those
    to a prompt whose greedy response has none (NaN) are left out too. The advantage of both is 0.
    """
    penalised = [
        math.nan if r.reward is None else r.reward - loop.initial_policy_kl_penalty * (r.kl or 0.0) for r in rollouts
    ]
    with_kl = torch.tensor(penalised, dtype=torch.float64)
    known = ~with_kl.isnan() if greedy is None else ~(with_kl + greedy).isnan()
    counted = torch.tensor([r.finished or loop.unfinished == "keep" for r in rollouts]) & known
    if validation:
        return Scored(rollouts, with_kl, counted, None)
    groups = torch.tensor([r.group for r in rollouts])
    advantages = with_kl - baselines(loop.baseline, with_kl, groups, greedy, counted)
    return Scored(rollouts, with_kl, counted, torch.where(known, advantages, 0.0))


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
