"""Advantages against their definitions: A = (r − β·KL) − b, and what is logged of them."""

from __future__ import annotations

import dataclasses
import math
import statistics

import pytest
import torch

from nemo_aligner.config.reinforce import ReinforceLoopConfig
from nemo_aligner.data.prompts import PromptRow
from nemo_aligner.errors import TrainingError
from nemo_aligner.stages.reinforce.advantages import check_finite, examples_of, rollout_metrics, score
from nemo_aligner.stages.reinforce.rollout import Rollout

PROMPTS = [PromptRow("ab", (97, 98)), PromptRow("xyz", (120, 121, 122))]


def rollout(
    group: int, sample: int, reward: float, kl: float | None, *, tokens: int = 3, finished: bool = True
) -> Rollout:
    logprobs = [-0.5 * (1 + i) for i in range(tokens)]
    drawn = list(range(10, 10 + tokens))
    return Rollout(group, sample, PROMPTS[group], drawn, f"t{sample}", finished, logprobs, reward, kl)


def loop(baseline: str, penalty: float = 0.5, unfinished: str = "keep") -> ReinforceLoopConfig:
    found = ReinforceLoopConfig()
    found.baseline, found.initial_policy_kl_penalty, found.unfinished = baseline, penalty, unfinished
    return found


ROLLOUTS = [
    rollout(0, 0, 1.0, 0.4),
    rollout(0, 1, 3.0, 2.0, tokens=1),
    rollout(0, 2, 2.0, 0.0, tokens=5, finished=False),
    rollout(1, 0, -1.0, 1.0),
    rollout(1, 1, 5.0, 3.0),
]
WITH_KL = [0.8, 2.0, 2.0, -1.5, 3.5]


def test_rloo_compares_the_penalised_reward_with_those_of_the_other_responses_to_the_prompt() -> None:
    found = score(ROLLOUTS, loop("RLOO"), None)
    assert found.with_kl.tolist() == pytest.approx(WITH_KL)
    expected = [0.8 - 2.0, 2.0 - 1.4, 2.0 - 1.4, -1.5 - 3.5, 3.5 + 1.5]
    assert found.advantages is not None
    assert found.advantages.tolist() == pytest.approx(expected)


def test_remax_compares_with_the_greedy_reward_and_none_with_nothing() -> None:
    greedy = torch.tensor([1.0, 1.0, 1.0, 4.0, 4.0])
    for baseline, given, compared in (("ReMax", greedy, greedy.tolist()), ("none", None, [0.0] * 5)):
        found = score(ROLLOUTS, loop(baseline), given).advantages
        assert found is not None
        assert found.tolist() == pytest.approx([r - b for r, b in zip(WITH_KL, compared, strict=True)])


def test_validation_takes_the_penalty_off_and_trains_nothing() -> None:
    found = score(ROLLOUTS, loop("RLOO"), None, validation=True)
    assert found.advantages is None
    assert found.with_kl.tolist() == pytest.approx(WITH_KL)
    assert "advantage_mean" not in rollout_metrics(found)


def test_what_is_trained_on_are_the_response_tokens_weighted_by_their_advantage() -> None:
    found = score(ROLLOUTS, loop("none"), None)
    examples = examples_of(found)
    assert [example.weight for example in examples] == pytest.approx(WITH_KL)
    assert examples[1].rows == ([97, 98, 10],)
    assert examples[1].masks == ([0, 0, 1],)
    assert examples[3].rows == ([120, 121, 122, 10, 11, 12],)
    assert examples[3].masks == ([0, 0, 0, 1, 1, 1],)


def test_of_a_response_without_an_advantage_the_number_of_its_tokens_is_left() -> None:
    even = [
        rollout(0, 0, 2.0, 0.0),
        rollout(0, 1, 2.0, 0.0, tokens=5),
        rollout(1, 0, 1.0, 0.0),
        rollout(1, 1, 3.0, 0.0),
    ]
    examples = examples_of(score(even, loop("RLOO"), None))
    assert [(example.rows, example.masks, example.targets) for example in examples[:2]] == [
        (([97],), ([0],), 3),
        (([97],), ([0],), 5),
    ]
    assert [(example.rows[0][-3:], example.targets) for example in examples[2:]] == [([10, 11, 12], None)] * 2


def test_masked_unfinished_responses_neither_teach_nor_stand_in_the_baseline() -> None:
    found = score(ROLLOUTS, loop("RLOO", unfinished="mask"), None)
    assert found.counted.tolist() == [True, True, False, True, True]
    examples = examples_of(found)
    assert len(examples) == 4
    assert [example.weight for example in examples] == pytest.approx([-1.2, 1.2, -5.0, 5.0])
    assert score(ROLLOUTS, loop("RLOO"), None).counted.all()


def test_figures_are_those_of_their_names() -> None:
    found = rollout_metrics(score(ROLLOUTS, loop("none"), None))
    tokens = 3 + 1 + 5 + 3 + 3
    logprobs = [-0.5 * (1 + i) for r in ROLLOUTS for i in range(len(r.tokens))]
    advantages = torch.tensor(WITH_KL, dtype=torch.float64)
    assert found == pytest.approx(
        {
            "rollout_size": 5,
            "prompt_lengths": (3 * 2 + 2 * 3) / 5,
            "response_lengths": (tokens + 3 * 2 + 2 * 3) / 5,
            "generation_length": tokens / 5,
            "rewards": 2.0,
            "rewards_std": math.sqrt((1 + 1 + 0 + 9 + 9) / 4),
            "fraction_of_samples_properly_ended": 4 / 5,
            "entropy": -sum(logprobs) / tokens,
            "init_policy_kl": 6.4 / 5,
            "rewards_with_kl": sum(WITH_KL) / 5,
            "advantage_mean": sum(WITH_KL) / 5,
            "advantage_std": float(((advantages - advantages.mean()) ** 2).mean().sqrt()),
        }
    )


def test_one_rollout_has_a_standard_deviation_of_zero_and_no_kl_is_not_a_kl_of_zero() -> None:
    found = rollout_metrics(score([rollout(0, 0, 1.0, None)], loop("none"), None))
    assert found["rewards_std"] == 0.0
    assert "init_policy_kl" not in found
    assert "rewards_with_kl" not in found
    assert found["advantage_mean"] == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_is_named_with_response_and_prompt(bad: float) -> None:
    check_finite(ROLLOUTS)
    with pytest.raises(TrainingError, match=rf"gave {bad} for the response 't7' to the prompt 'xyz'"):
        check_finite([*ROLLOUTS, rollout(1, 7, bad, 0.0)])


def shaping(baseline: str = "none", **keys: object) -> ReinforceLoopConfig:
    found = loop(baseline)
    for name, value in keys.items():
        setattr(found, name, value)
    return found


def advantages(rollouts: list[Rollout], cfg: ReinforceLoopConfig, greedy: torch.Tensor | None = None) -> list[float]:
    found = score(rollouts, cfg, greedy, max_length=5).advantages
    assert found is not None
    return found.tolist()


def test_rewards_are_clipped_then_pay_for_their_length_then_are_whitened_then_pay_for_their_kl() -> None:
    cfg = shaping(reward_clip_range=[0.0, 3.0], overlong_buffer_length=3, overlong_buffer_penalty=1.5)
    less = [1.0 - 0.5, 3.0, 2.0 - 1.5, 0.0 - 0.5, 3.0 - 0.5]  # lengths are 3, 1, 5, 3, 3 of 5, the last 3 cost
    kl = [0.2, 1.0, 0.0, 0.5, 1.5]
    assert advantages(ROLLOUTS, cfg) == pytest.approx([r - k for r, k in zip(less, kl, strict=True)])
    cfg.whiten_rewards = True
    mean, std = statistics.mean(less), statistics.stdev(less)
    assert advantages(ROLLOUTS, cfg) == pytest.approx([(r - mean) / std - k for r, k in zip(less, kl, strict=True)])


def test_how_much_was_shaped_is_logged_and_the_rewards_are_logged_as_they_were_given() -> None:
    cfg = shaping(
        reward_clip_range=[0.0, 3.0], overlong_buffer_length=3, overlong_buffer_penalty=1.5, whiten_rewards=True
    )
    found = rollout_metrics(score(ROLLOUTS, cfg, None, max_length=5))
    less = [0.5, 3.0, 0.5, -0.5, 2.5]
    assert found["rewards"] == 2.0
    assert found["rewards_clipped"] == pytest.approx(2 / 5)
    assert found["fraction_overlong"] == pytest.approx(4 / 5)
    assert found["overlong_penalty"] == pytest.approx(1.5 * (3 * 1 / 3 + 1) / 5)
    assert found["whitening_mean"] == pytest.approx(statistics.mean(less))
    assert found["whitening_std"] == pytest.approx(statistics.stdev(less))


@pytest.mark.parametrize("baseline", ["RLOO", "ReMax", "none"])
def test_whitening_makes_advantages_blind_to_the_scale_of_a_reward_model_and_its_zero(baseline: str) -> None:
    greedy = torch.tensor([1.0, 1.0, 1.0, 4.0, 4.0]) if baseline == "ReMax" else None
    moved = [dataclasses.replace(r, reward=40 * (r.reward or 0.0) - 7) for r in ROLLOUTS]
    moved_greedy = None if greedy is None else 40 * greedy - 7
    cfg = shaping(baseline, whiten_rewards=True)
    assert advantages(moved, cfg, moved_greedy) == pytest.approx(advantages(ROLLOUTS, cfg, greedy))
    cfg.whiten_rewards = False
    assert advantages(moved, cfg, moved_greedy) != pytest.approx(advantages(ROLLOUTS, cfg, greedy), rel=0.1)


def test_whitening_under_rloo_is_a_larger_kl_coefficient_and_a_smaller_gradient() -> None:
    """A of whitened rewards at β is A of the raw ones at β · std, over std: the baseline takes the mean away."""
    std = statistics.stdev([1.0, 3.0, 2.0, -1.0, 5.0])
    scaled = score(ROLLOUTS, loop("RLOO"), None, kl_penalty=0.5 * std).advantages
    assert scaled is not None
    whitened = advantages(ROLLOUTS, shaping("RLOO", whiten_rewards=True))
    assert whitened == pytest.approx([value / std for value in scaled.tolist()])


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6 + 0.1])
def test_equal_rewards_of_a_prompt_have_an_advantage_of_exactly_zero_also_when_whitened(value: float) -> None:
    rollouts = [rollout(0, i, value, 0.0) for i in range(7)] + [rollout(1, i, float(i), 0.0) for i in range(3)]
    found = advantages(rollouts, shaping("RLOO", whiten_rewards=True))
    assert found[:7] == [0.0] * 7
    assert all(example.targets for example in examples_of(score(rollouts, loop("RLOO"), None))[:7])


def test_masked_responses_do_not_whiten_the_others() -> None:
    cfg = shaping(whiten_rewards=True, unfinished="mask")
    alone = [r for r in ROLLOUTS if r.finished]
    found = score(ROLLOUTS, cfg, None).advantages
    assert found is not None
    assert found[[0, 1, 3, 4]].tolist() == advantages(alone, cfg)


def test_validation_shapes_nothing_and_takes_the_present_coefficient() -> None:
    cfg = shaping(reward_clip_range=[0.0, 1.0], overlong_buffer_length=5, whiten_rewards=True)
    found = score(ROLLOUTS, cfg, None, kl_penalty=2.0, max_length=5, validation=True)
    assert found.with_kl.tolist() == pytest.approx([1 - 0.8, 3 - 4.0, 2.0, -1 - 2.0, 5 - 6.0])
    assert not found.figures
