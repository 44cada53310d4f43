"""The estimators against their definitions: brute force, and exhaustive enumeration of a model with 5 tokens."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from nemo_aligner.algorithms.reinforce import KL_ESTIMATORS, baselines, reinforce_loss, sequence_kl

VOCABULARY, LENGTH = 5, 3
RESPONSES = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))
"""Every response there is, `[125, 3]`."""


def table(seed: int) -> Tensor:
    """Logits of the next token after every prefix: the whole model."""
    prefixes = sum(VOCABULARY**length for length in range(LENGTH))
    return torch.randn(prefixes, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logprobs(model: Tensor, responses: Tensor) -> Tensor:
    """log p(y_t | y_<t), `[B, 3]`."""
    columns, first, prefix = [], 0, torch.zeros(len(responses), dtype=torch.long)
    for t in range(LENGTH):
        columns.append(model.log_softmax(-1)[first + prefix, responses[:, t]])
        first, prefix = first + VOCABULARY**t, prefix * VOCABULARY + responses[:, t]
    return torch.stack(columns, dim=1)


def rewards_of(shift: float = 0.0) -> Tensor:
    return torch.randn(len(RESPONSES), generator=torch.Generator().manual_seed(9), dtype=torch.float64) + shift


def greedy_index(model: Tensor) -> int:
    first = prefix = 0
    for t in range(LENGTH):
        token = int(model[first + prefix].argmax())
        first, prefix = first + VOCABULARY**t, prefix * VOCABULARY + token
    return prefix


def mean_estimate(kind: str, shift: float = 0.0) -> Tensor:
    """Expectation of the estimator of the policy gradient, over every pair of responses to one prompt."""
    model, rewards = table(1).requires_grad_(), rewards_of(shift)
    logp = logprobs(model, RESPONSES)
    weight = logp.sum(1).exp().detach()
    greedy = rewards[greedy_index(model.detach())].expand(2 * len(RESPONSES))
    total = torch.zeros((), dtype=torch.float64)
    second = torch.arange(len(RESPONSES))
    for first in range(len(RESPONSES)):
        pair = torch.stack((torch.full_like(second, first), second), dim=1).flatten()
        groups = second.repeat_interleave(2)
        base = baselines(kind, rewards[pair], groups, greedy, torch.ones(len(pair), dtype=torch.bool))
        advantages = (rewards[pair] - base) * (weight[first] * weight[second]).repeat_interleave(2)
        terms = reinforce_loss(logp[pair], torch.ones(len(pair), LENGTH), advantages)
        total = total - terms.loss_sum / 2  # the mean over the two responses of a pair
    (gradient,) = torch.autograd.grad(total, model)
    return gradient


def true_gradient() -> Tensor:
    model = table(1).requires_grad_()
    value = (logprobs(model, RESPONSES).sum(1).exp() * rewards_of()).sum()
    (gradient,) = torch.autograd.grad(value, model)
    return gradient


@pytest.mark.parametrize("kind", ["RLOO", "ReMax", "none"])
def test_the_expected_update_is_the_policy_gradient(kind: str) -> None:
    torch.testing.assert_close(mean_estimate(kind), true_gradient(), atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", ["RLOO", "ReMax"])
def test_a_constant_added_to_every_reward_changes_no_advantage(kind: str) -> None:
    rewards = rewards_of()[:8].float()
    groups, counted = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), torch.ones(8, dtype=torch.bool)
    greedy = torch.tensor([0.3] * 4 + [-0.7] * 4)

    def advantages(shift: float) -> Tensor:
        shifted = rewards + shift
        return shifted - baselines(kind, shifted, groups, greedy + shift, counted)

    torch.testing.assert_close(advantages(4.0), advantages(0.0), atol=1e-5, rtol=0)


def test_rloo_is_the_mean_of_the_other_counted_responses_to_the_prompt() -> None:
    generator = torch.Generator().manual_seed(3)
    rewards = torch.randn(40, generator=generator)
    groups = torch.randint(0, 9, (40,), generator=generator)
    counted = torch.rand(40, generator=generator) > 0.3
    found = baselines("RLOO", rewards, groups, None, counted)
    for i in range(40):
        others = [rewards[j] for j in range(40) if j != i and groups[j] == groups[i] and counted[j]]
        wanted = sum(others) / len(others) if others else rewards[i]
        assert found[i] == pytest.approx(float(wanted), abs=1e-6)


def test_an_unfinished_response_is_compared_with_all_finished_ones() -> None:
    found = baselines(
        "RLOO",
        torch.tensor([1.0, 0.0, 2.0, -3.0]),
        torch.zeros(4, dtype=torch.long),
        None,
        torch.tensor([True, True, True, False]),
    )
    assert found.tolist() == [1.0, 1.5, 0.5, 1.0]


def test_a_reward_that_is_no_number_stays_out_of_the_others_baselines_when_masked() -> None:
    rewards = torch.tensor([1.0, 3.0, math.nan])
    found = baselines("RLOO", rewards, torch.zeros(3, dtype=torch.long), None, torch.tensor([True, True, False]))
    assert found[:2].tolist() == [3.0, 1.0]


@pytest.mark.parametrize(("estimator", "exact"), [("k1", True), ("k3", True), ("abs", False), ("k2", False)])
def test_k1_and_k3_are_unbiased_estimates_of_the_kl(estimator: str, exact: bool) -> None:
    policy, initial = table(1), table(1) + 0.3 * table(2)
    own, first = logprobs(policy, RESPONSES), logprobs(initial, RESPONSES)
    weight = own.sum(1).exp()
    true = float((weight * (own - first).sum(1)).sum())
    mean = sum(float(w) * sequence_kl(a, b, estimator, "sum") for w, a, b in zip(weight, own, first, strict=True))
    assert (abs(mean - true) < 1e-9) == exact
    assert all(float(KL_ESTIMATORS[estimator](torch.zeros(1))) == 0 for estimator in KL_ESTIMATORS)


def test_the_mean_reduction_is_the_sum_over_the_number_of_tokens() -> None:
    own, first = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -1.0, -2.5])
    assert sequence_kl(own, first, "k1", "sum") == pytest.approx(1.5)
    assert sequence_kl(own, first, "abs", "sum") == pytest.approx(3.5)
    assert sequence_kl(own, first, "k1", "mean") == pytest.approx(0.5)


@pytest.mark.parametrize("k", [2, 3, 4, 8])
def test_a_rloo_advantage_is_k_over_k_minus_1_times_the_distance_from_the_groups_mean(k: int) -> None:
    rewards = torch.randn(k, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    advantages = rewards - baselines("RLOO", rewards, torch.zeros(k, dtype=torch.long), None, torch.ones(k).bool())
    torch.testing.assert_close(advantages, k / (k - 1) * (rewards - rewards.mean()))
    assert float(advantages.sum()) == pytest.approx(0.0, abs=1e-12)
    if k == 2:
        torch.testing.assert_close(advantages, torch.stack((rewards[0] - rewards[1], rewards[1] - rewards[0])))


def test_three_right_answers_of_eight_have_their_published_advantages() -> None:
    rewards = torch.tensor([1.0] * 3 + [0.0] * 5)
    advantages = rewards - baselines("RLOO", rewards, torch.zeros(8, dtype=torch.long), None, torch.ones(8).bool())
    assert advantages.tolist() == pytest.approx([5 / 7] * 3 + [-3 / 7] * 5)


ARMS = torch.tensor([0.3, -0.2, 0.8, 0.0], dtype=torch.float64)
ARM_REWARDS = torch.tensor([1.0, 0.0, 2.0, -1.0], dtype=torch.float64)


def bandit(kind: str, k: int, shift: float = 0.0) -> tuple[Tensor, float]:
    """Mean `[4]` and total variance of the estimate from k draws of a softmax policy over four arms, over all draws.

    `batch mean` is the group's own mean as the baseline, which is what RLOO avoids.
    """
    probabilities, rewards = ARMS.softmax(0), ARM_REWARDS + shift
    draws = torch.tensor(list(itertools.product(range(4), repeat=k)))
    weight = probabilities[draws].prod(1)
    groups = torch.arange(len(draws)).repeat_interleave(k)
    flat = rewards[draws].flatten()
    if kind == "batch mean":
        base = rewards[draws].mean(1).repeat_interleave(k)
    else:
        greedy = rewards[probabilities.argmax()].expand(len(flat))
        base = baselines(kind, flat, groups, greedy, torch.ones(len(flat)).bool())
    scores = torch.eye(4, dtype=torch.float64)[draws.flatten()] - probabilities  # ∇ log π of each draw
    estimates = ((flat - base)[:, None] * scores).view(len(draws), k, 4).mean(1)
    mean = (weight[:, None] * estimates).sum(0)
    return mean, float((weight[:, None] * (estimates - mean).square()).sum())


@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_groups_own_mean_as_a_baseline_shortens_the_gradient_by_k_minus_1_over_k_and_ours_do_not(k: int) -> None:
    p = ARMS.softmax(0)
    truth = p * (ARM_REWARDS - (p * ARM_REWARDS).sum())
    for kind in ("RLOO", "ReMax", "none"):
        torch.testing.assert_close(bandit(kind, k)[0], truth)
    torch.testing.assert_close(bandit("batch mean", k)[0], (k - 1) / k * truth)


@pytest.mark.parametrize(("kind", "variance"), [("none", 0.261), ("RLOO", 0.417), ("ReMax", 0.660)])
def test_a_constant_added_to_all_rewards_moves_the_variance_of_no_baseline_but_none(kind: str, variance: float) -> None:
    """Three draws. Near a mean reward of 0 a baseline from so few adds variance; far from it, it takes nearly all."""
    assert bandit(kind, 3)[1] == pytest.approx(variance, abs=1e-3)
    assert bandit(kind, 3, 10.0)[1] == pytest.approx(26.66 if kind == "none" else variance, abs=1e-2)


@pytest.mark.parametrize(
    ("estimator", "mean", "variance"), [("k1", 0.02582, 0.0524), ("abs", 0.20433, None), ("k2", 0.02651, None),
                                        ("k3", 0.02582, 0.00019)],
)  # fmt: skip
def test_kl_estimators_have_their_published_mean_and_variance(
    estimator: str, mean: float, variance: float | None
) -> None:
    """The absolute value overstates a KL of 0.0258 eightfold; k3 has k1's mean with a 270th of its variance."""
    policy, initial = (torch.tensor(p, dtype=torch.float64) for p in ([0.4, 0.4, 0.2], [0.5, 0.3, 0.2]))
    terms = KL_ESTIMATORS[estimator](policy.log() - initial.log())
    found = float((policy * terms).sum())
    assert found == pytest.approx(mean, abs=1e-5)
    if variance is not None:
        assert float((policy * (terms - found).square()).sum()) == pytest.approx(variance, rel=0.03)
