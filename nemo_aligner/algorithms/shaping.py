"""What may become of rewards before the objective sees them, and a KL coefficient that follows a target.

In this order, each off unless asked for, i over the B responses of a step:

    r_i ─▶ clip(r_i, low, high) ─▶ r_i − λ · overlong(T_i) ─▶ (r_i − mean) / std ─▶ R_i = r_i − β · KL_i

Clipping comes first, so that an outlier moves neither mean nor std and the length penalty is never clipped away;
whitening comes before the KL, so that β weighs against rewards of one spread whatever the reward model's is.
"""

from __future__ import annotations

import math

from torch import Tensor

from nemo_aligner.algorithms.statistics import mean_and_std

_ERROR_BOUND = 0.2
"""Of the controller's relative error (Ziegler et al. 2019)."""


def overlong(lengths: Tensor, buffer: int, max_length: int) -> Tensor:
    """How far responses of `lengths` `[B]` tokens reach into the last `buffer` of `max_length`: `[B]` float64, 0 to 1.

    The soft overlong punishment with its sign turned (DAPO, Yu et al. 2025, arXiv 2503.14476, equation 13):
    overlong(T) = clip((T − (max_length − buffer)) / buffer, 0, 1). With buffer = max_length it is T / max_length.
    """
    return ((lengths.double() - (max_length - buffer)) / buffer).clamp(0, 1)


def whitening(rewards: Tensor, counted: Tensor) -> tuple[float, float]:
    """Mean and standard deviation (n − 1) of the `counted` `[B]` of `rewards` `[B]`; (NaN, 0) where they say nothing.

    The std is 0, not a rounding error, where all are equal, and for one reward. The sums are exact, so that they do not
    depend on the order of the responses.
    """
    values = rewards[counted].tolist()
    if not values or min(values) == max(values):
        return (values[0] if values else math.nan), 0.0
    return mean_and_std(values)


def whitened(rewards: Tensor, mean: float, std: float) -> Tensor:
    """(r − mean) / std, `[B]` float64; with a std of 0 nothing tells them apart, and each is 0. NaN stays NaN."""
    return (rewards - mean) / std if std > 0 else rewards * 0.0


def next_kl_penalty(penalty: float, kl: float, target: float, gain: float) -> float:
    """β of the next step, from that of this one and the mean KL of its responses, in nats.

    The proportional controller in log space of Ziegler et al. 2019 (arXiv 1909.08593, section 2.2, for the β of their
    equation 2), K = `gain`, 0.1 there:

        e_t = clip((KL_t − target) / target, −0.2, 0.2)        β_{t+1} = β_t · (1 + K · e_t)
    """
    error = min(max((kl - target) / target, -_ERROR_BOUND), _ERROR_BOUND)
    return penalty * (1 + gain * error)
