"""What supervised training logs: the values that a checkpoint's monitor may name."""

from __future__ import annotations

from collections.abc import Collection

_ALWAYS = {
    "global_step",
    "step",
    "consumed_samples",
    "epoch",
    "loss",
    "train_loss",
    "lr",
    "grad_norm",
    "val_loss",
}

RANKING_METRICS = frozenset(
    {"accuracy", "rewards_chosen_mean", "rewards_rejected_mean", "rewards_all_mean", "rewards_all_square"}
)
"""What the ranking objective reports besides the loss."""


def monitors(metrics: Collection[str]) -> set[str]:
    """Names of all values of a run whose objective reports `metrics` besides the loss."""
    return _ALWAYS | {f"{part}{name}" for name in metrics for part in ("", "train_", "val_")}
