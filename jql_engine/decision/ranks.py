"""What a quantile is: NumPy's `method="inverted_cdf"`, to its last rounding, in terms of cumulative weights.

The quantile q of scores is the smallest one of them up to which, with it, at least the share q of the weight lies. How
NumPy rounds that decides about a rank now and then, and differs: documents, which it counts without weights, are
compared as q n with a rank, tokens as a quotient with q.

    documents    np.quantile(scores, [q], method="inverted_cdf")
    tokens       np.quantile(scores, [q], method="inverted_cdf", weights=n_tokens)

`needed_weight` and `last_quantile` are each other's inverse: a score up to which the weight `upto` lies is at or above
the quantile q if upto >= needed_weight(total, q), which is if q <= last_quantile(upto, total).
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Weight: TypeAlias = Literal["documents", "tokens"]
EXACT = 1 << 53  # up to which float64 holds every integer


def needed_weight(total: int, quantile: float, weight: Weight) -> int:
    """The cumulative weight, 1 to `total`, that the quantile is the first score to reach."""
    assert 0 < total < EXACT and 0 <= quantile <= 1, (total, quantile)
    if weight == "documents":
        return max(0, math.ceil(total * quantile - 1)) + 1
    return smallest_with_share(total, quantile)


def smallest_with_share(total: int, share: float) -> int:
    """The smallest weight, 1 to `total`, that divided by `total` in float64 is at least `share`."""
    weight = min(total, max(1, math.ceil(total * share)))
    while weight > 1 and (weight - 1) / total >= share:
        weight -= 1
    while weight / total < share:
        weight += 1
    return weight


def last_quantile(upto: NDArray[np.int64], total: NDArray[np.int64], weight: Weight) -> NDArray[np.float64]:
    """The largest quantile that scores up to which the weight `upto`, 1 to `total`, lies are not below; float64 [n]."""
    quantiles = upto / total
    if weight == "documents":  # the largest q with q n <= upto, rounded as it is: within two steps of the quotient
        for _ in range(2):
            quantiles = np.where(total * quantiles > upto, np.nextafter(quantiles, 0), quantiles)
        for _ in range(2):
            above = np.nextafter(quantiles, 2)
            quantiles = np.where(total * above <= upto, above, quantiles)
        quantiles = np.minimum(quantiles, 1)
    return quantiles
