"""A loss as two numbers that may be added up before they are divided."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class LossTerms:
    """Loss of one micro-batch, not yet divided: the global loss is Σ loss_sum / Σ count.

    Keeping sum and count apart makes loss and gradient independent of micro-batch size and of data parallelism.
    `metrics` are sums over the same `count`, e.g. the number of correctly ranked pairs.
    """

    loss_sum: Tensor  # scalar float32, carries the gradient
    count: Tensor  # scalar float32, no gradient
    metrics: dict[str, Tensor] = field(default_factory=dict)
