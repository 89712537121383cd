"""Exact quantiles of score columns that are only ever streamed; see `ranks` for what a quantile is.

The first pass over the data counts the documents into bins of their keys, each further one cuts the bins that the
quantiles fall into, until those hold one key. Two passes do for some forty series, as of three heads in a dozen
languages; three for hundreds, four or five for thousands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from jql_engine.decision.order import scores_of
from jql_engine.decision.partition import Partition, Sample
from jql_engine.decision.ranks import Weight, needed_weight

Passes: TypeAlias = Callable[[], Iterable[Sample]]  # all documents, each time it is called


def exact_scores(
    partition: Partition, samples: Passes, series: NDArray[np.int64], weights: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Of each of `series` [n] the smallest score up to which the weight `weights` [n] lies, float32 [n].

    Cuts `partition`, which has been counted, and counts it again until the scores are known.
    """
    while True:
        bins = partition.find(series, weights)
        _, first = np.unique(bins.numbers, return_index=True)
        wide = first[bins.shifts[first] > 0]
        if not len(wide):
            return scores_of(bins.lows)
        partition.split(bins.where(wide))
        partition.count(samples())


def quantiles(
    samples: Passes, totals: NDArray[np.int64], n_heads: int, at: list[float], weight: Weight
) -> NDArray[np.float32]:
    """The quantiles `at` [Q] of every head in every slot, float32 [slots, H, Q]; `totals` [slots]: their weights."""
    partition = Partition(len(totals), n_heads)
    partition.count(samples())
    needed = np.array([[needed_weight(int(total), q, weight) for q in at] for total in totals], np.int64)
    series = np.repeat(np.arange(partition.n_series), len(at))
    scores = exact_scores(partition, samples, series, np.repeat(needed, n_heads, axis=0).ravel())
    return scores.reshape(len(totals), n_heads, len(at))
