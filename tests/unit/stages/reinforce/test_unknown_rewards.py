"""A response that nobody can judge moves nothing, and neither does it move the others."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from nemo_aligner.config.reinforce import ReinforceLoopConfig
from nemo_aligner.data.prompts import PromptRow
from nemo_aligner.stages.reinforce.advantages import check_finite, examples_of, rollout_metrics, rollout_rows, score
from nemo_aligner.stages.reinforce.rollout import Rollout

PROMPT = PromptRow("ab", (97, 98))


def rollout(group: int, index: int, reward: float | None) -> Rollout:
    parts = {"right": reward, "length": 2.0}
    return Rollout(group, index, PROMPT, [1, 2], "x", True, [-1.0, -1.0], reward, 0.5, parts)


REWARDS = {0: [1.0, None, 4.0], 1: [None, None, 3.0], 2: [None, None, None]}
ROLLOUTS = [rollout(g, i, reward) for g, rewards in REWARDS.items() for i, reward in enumerate(rewards)]


@pytest.mark.parametrize("baseline", ["RLOO", "ReMax", "none"])
def test_the_others_are_trained_on_as_if_it_were_not_there(baseline: str) -> None:
    loop = ReinforceLoopConfig(baseline=baseline, initial_policy_kl_penalty=0.1)
    greedy = torch.tensor([0.5] * 6 + [math.nan] * 3, dtype=torch.float64) if baseline == "ReMax" else None
    known = [i for i, r in enumerate(ROLLOUTS) if r.reward is not None]
    found = score(ROLLOUTS, loop, greedy)
    without = score([ROLLOUTS[i] for i in known], loop, None if greedy is None else greedy[known])
    assert found.advantages is not None
    assert without.advantages is not None
    assert found.counted.tolist() == [r.reward is not None for r in ROLLOUTS]
    assert found.advantages[known].tolist() == without.advantages.tolist()
    assert all(found.advantages[i] == 0 for i in range(9) if i not in known)
    assert [e.weight for e in examples_of(found)] == [e.weight for e in examples_of(without)]
    if baseline == "RLOO":  # the only one of its prompt is compared with nobody
        assert found.advantages.tolist() == pytest.approx([-3.0, 0.0, 3.0, 0, 0, 0, 0, 0, 0])


def test_with_remax_a_prompt_whose_greedy_response_nobody_can_judge_is_left_out() -> None:
    loop = ReinforceLoopConfig(baseline="ReMax", initial_policy_kl_penalty=0.0)
    greedy = torch.tensor([math.nan] * 3 + [1.0] * 6, dtype=torch.float64)
    found = score(ROLLOUTS, loop, greedy)
    assert found.counted.tolist() == [False] * 5 + [True] + [False] * 3
    assert found.advantages is not None
    assert found.advantages.tolist() == [0.0] * 5 + [2.0] + [0.0] * 3


def test_figures_are_those_of_the_known_rewards_and_tell_each_source_apart() -> None:
    loop = ReinforceLoopConfig(initial_policy_kl_penalty=0.1)
    scored = score(ROLLOUTS, loop, None)
    figures = rollout_metrics(scored)
    assert figures["rewards"] == figures["reward_right"] == pytest.approx(8 / 3)
    assert figures["reward_length"] == 2.0
    assert figures["rewards_unknown"] == pytest.approx(6 / 9)
    assert figures["rewards_with_kl"] == pytest.approx(8 / 3 - 0.05)
    rows = rollout_rows(scored)
    assert rows[0].items() >= {"reward": 1.0, "reward_right": 1.0, "reward_length": 2.0, "trained": True}.items()
    assert rows[1].items() >= {"reward": None, "reward_right": None, "advantage": 0.0, "trained": False}.items()
    check_finite(ROLLOUTS)
    plain = [dataclasses.replace(r, parts={}, reward=1.0) for r in ROLLOUTS]
    assert not [name for name in rollout_metrics(score(plain, loop, None)) if "reward_" in name or "unknown" in name]
