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
