"""What choosing the best of several samples gives, estimated from more of them, and what it may cost in KL."""

from __future__ import annotations

import math
from collections.abc import Sequence


def best_of_kl_bound(n: int) -> float:
    """Most that the best of n is away from the policy it is drawn from, in nats: log n − (n − 1)/n.

    KL(best of n ‖ policy) is equal to it where no two outcomes have one reward and each has a probability near 0, and
    below it elsewhere (Beirami et al. 2024, arXiv 2401.01879).
    """
    return math.log(n) - (n - 1) / n


def best_of(rewards: Sequence[float], k: int) -> float:
    """Unbiased estimate of E[max of k rewards] from n ≥ k of them: the mean of the maximum over all subsets of k.

    Σ_i C(i − 1, k − 1) / C(n, k) · r_(i), r_(1) ≤ … ≤ r_(n): a subset whose largest is r_(i) takes its other k − 1 from
    the i − 1 before it (Nakano et al. 2021, arXiv 2112.09332, appendix I). NaN where a reward is.
    """
    n = len(rewards)
    assert 1 <= k <= n
    if any(math.isnan(reward) for reward in rewards):
        return math.nan
    subsets = math.comb(n, k)
    return math.fsum(math.comb(i, k - 1) / subsets * reward for i, reward in enumerate(sorted(rewards)))


def pass_at(k: int, samples: int, passed: int) -> float:
    """Unbiased estimate of P(one of k samples passes): 1 − C(n − c, k) / C(n, k), c of n samples having passed (Chen et
    al. 2021, arXiv 2107.03374, equation 1)."""
    assert 1 <= k <= samples
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def powers_up_to(n: int) -> list[int]:
    """1, 2, 4, … and n itself."""
    return sorted({n, *(2**i for i in range(n.bit_length()) if 2**i <= n)})
