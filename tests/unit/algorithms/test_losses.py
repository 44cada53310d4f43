"""Losses against their formulas in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_aligner.algorithms.batching import length_sorted_batches, pad_rows
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


def test_batches_hold_every_row_once_and_rows_of_like_length() -> None:
    rows = [[0] * length for length in (3, 9, 1, 7, 7, 2, 5)]
    batches = list(length_sorted_batches(rows, 3))
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert [[len(rows[i]) for i in batch] for batch in batches] == [[9, 7, 7], [5, 3, 2], [1]]


def test_padding_is_on_the_right_and_lengths_are_true() -> None:
    tokens, lengths = pad_rows([[1, 2, 3], [4]], 0)
    assert tokens.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert lengths.tolist() == [3, 1]
