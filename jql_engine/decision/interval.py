"""How far a quantile or a share of a sample may lie from that of what it was drawn from."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
DEVIATES = 1.959964  # of a standard normal distribution, between which CONFIDENCE lies
DEVIATIONS = 12  # around the mean; beyond lies less than 1e-30


def rank_interval(n_docs: int, quantile: float) -> tuple[int | None, int | None]:
    """Ranks 1 to `n_docs` between whose scores the true quantile lies with CONFIDENCE; None where no rank would do.

    Of `n_docs` documents drawn at random, those below the true quantile are binomially distributed, whatever the
    distribution of the scores (H. A. David, Order Statistics, section 7.1).
    """
    if not 0 < quantile < 1:
        return None, None
    tail = (1 - CONFIDENCE) / 2
    counts, cumulative = _binomial(n_docs, quantile)
    ends = np.minimum(np.searchsorted(cumulative, [tail, 1 - tail]), len(counts) - 1)
    lower, upper = int(counts[ends[0]]), int(counts[ends[1]]) + 1
    return lower if lower >= 1 else None, upper if upper <= n_docs else None


def weight_interval(total: int, n_docs: int, quantile: float) -> tuple[int, int]:
    """The same as cumulative weights, of documents that weigh `total` and tell as much as `n_docs`; 0 for None."""
    lower, upper = rank_interval(n_docs, quantile)
    return round((lower or 0) / n_docs * total), round((upper or 0) / n_docs * total)


def effective_size(totals: NDArray[np.int64], squares: NDArray[np.float64]) -> NDArray[np.int64]:
    """How many documents of equal weight tell as much of a distribution as documents of these sums of weights, [n].

    L. Kish, Survey Sampling (1965), section 11.7: it holds where scores do not depend on the weight.
    """
    return np.rint(totals.astype(np.float64) ** 2 / squares).astype(np.int64)


def share_interval(n_hits: int, n_docs: int) -> tuple[float, float]:
    """Between which the share lies with CONFIDENCE, of which `n_hits` of `n_docs` documents are a sample.

    Wilson's interval (doi:10.1080/01621459.1927.10502953), which has a length for no hits at all as well.
    """
    if not n_docs:
        return 0.0, 1.0
    z2 = DEVIATES**2 / n_docs
    share = n_hits / n_docs
    half = math.sqrt(z2 * (share * (1 - share) + z2 / 4))
    low, high = ((share + z2 / 2 + side * half) / (1 + z2) for side in (-1, 1))
    return (max(0.0, low) if n_hits else 0.0), (min(1.0, high) if n_hits < n_docs else 1.0)


def _binomial(n: int, p: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Counts that are at all likely, and the probability of each or fewer; by the ratio of one count to the next."""
    width = DEVIATIONS * (np.sqrt(n * p * (1 - p)) + 1)
    counts = np.arange(max(0, int(n * p - width)), min(n, int(n * p + width)) + 1)
    ratios = (n - counts[:-1]) / (counts[:-1] + 1) * (p / (1 - p))
    logs = np.concatenate([[0.0], np.cumsum(np.log(ratios))])
    chances = np.exp(logs - logs.max())
    return counts, np.cumsum(chances) / chances.sum()
