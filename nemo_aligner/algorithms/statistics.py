"""Mean, spread and standardisation of rewards; NaN entries do not count."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nemo_aligner.errors import DataError


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and unbiased standard deviation (n − 1) of the finite values; NaN where there are too few."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return math.nan, math.nan
    mean = math.fsum(finite) / len(finite)
    if len(finite) < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in finite) / (len(finite) - 1))


def standardised(values: Sequence[float], mean: float, std: float) -> list[float]:
    """(r − mean) / std of each value. Raises DataError when std is not a positive number."""
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise DataError(
            f"reward_standardization cannot divide by std={std:g} (mean={mean:g}, {len(values)} rewards); "
            "give reward_standardization.mean and reward_standardization.std, or more than one distinct reward"
        )
    return [(value - mean) / std for value in values]
