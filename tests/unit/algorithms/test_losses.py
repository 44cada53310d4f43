"""Losses against their formulas in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_aligner.algorithms.losses import ranking_loss, sft_loss


def test_sft_loss_is_the_masked_negative_log_likelihood() -> None:
    logprobs = torch.tensor([[0.0, -1.0, -2.0], [0.0, -4.0, -8.0]])
    terms = sft_loss(logprobs, torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]]))
    assert (terms.loss_sum.item(), terms.count.item()) == (11.0, 3.0)


def test_ranking_loss_is_bradley_terry_and_counts_only_real_pairs() -> None:
    rewards = torch.tensor([[2.0], [1.0], [0.5], [0.5], [9.0], [-9.0]])
    terms = ranking_loss(rewards, torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0]))
    expected = -math.log(1 / (1 + math.exp(-1.0))) - math.log(0.5)
    assert terms.loss_sum.item() == pytest.approx(expected, rel=1e-6)
    assert terms.count.item() == 2
    assert {name: value.item() for name, value in terms.metrics.items()} == pytest.approx(
        {
            "accuracy": 1.5,
            "rewards_chosen_mean": 2.5,
            "rewards_rejected_mean": 1.5,
            "rewards_all_mean": 2.0,
            "rewards_all_square": 2.75,
        }
    )
