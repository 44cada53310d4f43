"""Training objectives: from a model's output and a micro-batch to a loss sum and a count."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_aligner.algorithms.terms import LossTerms


def sft_loss(logprobs: Tensor, loss_mask: Tensor) -> LossTerms:
    """Negative log-likelihood of the target tokens.

    L = − Σ_bt m_bt · log p(x_bt | x_b,<t),  count = Σ_bt m_bt

    logprobs `[B, S]` float32, loss_mask `[B, S]` float32 of 0 and 1.
    """
    return LossTerms(-(logprobs * loss_mask).sum(), loss_mask.sum())


def ranking_loss(rewards: Tensor, weights: Tensor) -> LossTerms:
    """Bradley-Terry loss of preference pairs (Ouyang et al. 2022, arXiv 2203.02155, equation 1).

    L = − Σ_i w_i · log σ(r_i,chosen − r_i,rejected),  count = Σ_i w_i

    rewards `[2P, 1]` float32, rows alternating chosen and rejected; weights `[2P]` float32, 0 for padding pairs.
    Metrics: `accuracy` (ties count half), mean rewards of either side, and Σ r, Σ r² per pair for mean and std.
    """
    chosen, rejected = rewards[0::2, 0], rewards[1::2, 0]
    pairs = weights[0::2]
    margin = chosen - rejected
    right = (margin > 0).float() + 0.5 * (margin == 0).float()
    sums = {
        "accuracy": right,
        "rewards_chosen_mean": chosen,
        "rewards_rejected_mean": rejected,
        "rewards_all_mean": (chosen + rejected) / 2,
        "rewards_all_square": (chosen.square() + rejected.square()) / 2,
    }
    with torch.no_grad():
        metrics = {name: (pairs * value).sum() for name, value in sums.items()}
    return LossTerms(-(pairs * F.logsigmoid(margin)).sum(), pairs.sum(), metrics)
