"""REINFORCE with a KL penalty and one of three baselines: the formulas, as pure functions.

Notation: i runs over the B responses of a rollout, t over the tokens of a response, g(i) is the prompt of i.

    d_it = log π(y_it) − log π_0(y_it)          policy against initial policy
    KL_i = Σ_t k(d_it)  (or the mean over t)    k: one of KL_ESTIMATORS
    R_i  = r_i − β · KL_i
    A_i  = R_i − b_i                            b: RLOO, ReMax or none
    L    = − Σ_i Σ_t A_i · log π(y_it) / Σ_i Σ_t 1
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nemo_aligner.algorithms.terms import LossTerms

KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda d: d,
    "abs": torch.abs,
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: torch.exp(-d) - 1 + d,
}
"""Per-token terms whose expectation under π is KL(π ‖ π_0) (k1, k3) or near it (J. Schulman, "Approximating KL
divergence", 2020); abs is what NeMo-Aligner 0.7 calls use_absolute_kl."""


def sequence_kl(logprobs: Tensor, initial: Tensor, estimator: str, reduction: str) -> float:
    """KL of one response from its tokens' log-probabilities under policy and initial policy, both `[T]`, in nats."""
    terms = KL_ESTIMATORS[estimator](logprobs - initial)
    return float(terms.sum() if reduction == "sum" else terms.mean())


def baselines(kind: str, rewards: Tensor, groups: Tensor, greedy: Tensor | None, counted: Tensor) -> Tensor:
    """Baseline of each response, `[B]` float64; it never depends on the response's own reward.

    Args:
        kind: "RLOO" (leave-one-out, arXiv 2402.14740, eq. 9), "ReMax" (arXiv 2310.10505, algorithm 1) or "none".
        rewards: R `[B]`.
        groups: `[B]` int64, equal for responses to one prompt.
        greedy: `[B]`, reward of the greedy response to each one's prompt; needed for ReMax alone.
        counted: `[B]` bool; responses that are masked out of the loss say nothing of their prompt either.

    RLOO: b_i = Σ_{j≠i} m_j R_j / Σ_{j≠i} m_j over the group of i; a response that stands alone gets b_i = R_i, so
    that it moves nothing. It is summed as R_i + mean_j(R_j − R_i): where all are equal, b_i is R_i to the last digit.
    """
    rewards = rewards.double()
    if kind == "none":
        return torch.zeros_like(rewards)
    if kind == "ReMax":
        assert greedy is not None
        return greedy.double()
    same = groups[:, None] == groups[None, :]
    others = (same & ~torch.eye(len(groups), dtype=torch.bool)) & counted[None, :]
    number = others.sum(dim=1)
    differences = torch.where(others, rewards[None, :] - rewards[:, None], 0.0).sum(dim=1)
    return rewards + differences / number.clamp(min=1)


def reinforce_loss(logprobs: Tensor, loss_mask: Tensor, advantages: Tensor, targets: Tensor | None = None) -> LossTerms:
    """−Σ A·log π over response tokens, and their number.

    logprobs and loss_mask `[B, S]` float32, advantages `[B]` float32 (no gradient flows into them). `targets` `[B]`
    float32 are the tokens that each response counts for, where some are left out as their advantage is 0.
    """
    count = loss_mask.sum() if targets is None else targets.sum()
    return LossTerms(-(advantages[:, None] * logprobs * loss_mask).sum(), count)
