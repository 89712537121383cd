"""The common quantile at which a rule keeps a given weight of documents, exactly, in a few passes over the data.

Every document has a last quantile: the largest at which it is still kept. Under `all` that is the smallest one of its
heads', which follow from the weight up to its score in its group (`ranks.last_quantile`); under `any` the largest. What
is sought is the largest quantile at which the documents whose last quantile is no smaller still weigh the target.

No document's last quantile can be known without sorting all scores. But bins bound it: it lies between the quantiles of
the ends of the bins that its scores fall into. So a pass counts the documents into bins, and another one counts, for
every quantile at the end of a bin, the weight that is kept there at most and at least; the quantile that is sought lies
between those where the two reach the target. Bins that may hold its like are cut, and counted again, until the two
meet. That takes two rounds of two passes for a dozen groups, three for hundreds, five or more for thousands.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jql_engine.decision.partition import Bins, Partition
from jql_engine.decision.population import Population
from jql_engine.decision.ranks import last_quantile
from jql_engine.decision.rules import join


def common_quantile(partition: Partition, population: Population, target: int) -> float:
    """The largest quantile at which the documents that are kept weigh at least `target`, in the weight of what is kept.

    `partition` has been counted; it is cut and counted again. `target` is at most the weight of all documents.
    """
    low, high = 0.0, 1.0
    while True:
        bounds = _Bounds.of(partition, population, low, high)
        low, high = bounds.narrow(partition, population, target)
        if low == high:
            return low
        partition.split(bounds.undecided(low, high))
        partition.count(population.counted())


@dataclass(frozen=True, slots=True)
class _Bounds:
    """Between which quantiles documents stop being kept, by the bin of a score."""

    leaves: Bins
    first: NDArray[np.float64]  # [n] the last quantile of a document in the bin is at least this,
    last: NDArray[np.float64]  # [n] and at most this
    quantiles: NDArray[np.float64]  # [Q] all of these that matter, ascending
    ranks: NDArray[np.int32]  # [2, bins] places of `first` and `last` in `quantiles`, for all bins of the partition

    @classmethod
    def of(cls, partition: Partition, population: Population, low: float, high: float) -> _Bounds:
        """All that lies outside of `low` to `high`, between which the result is known to lie, counts as its end."""
        leaves = partition.leaves()
        totals = np.repeat(population.totals, partition.n_heads)[leaves.series]
        last = last_quantile(leaves.upto, totals, population.weight)
        before = last_quantile(leaves.below, totals, population.weight)
        first = np.where(leaves.shifts == 0, last, before)  # all scores in a bin of one key are equal
        both = np.clip(np.stack([first, last]), low, high)
        quantiles = np.unique(both)
        ranks = np.zeros((2, partition.n_bins), np.int32)
        ranks[:, leaves.numbers] = np.searchsorted(quantiles, both)
        return cls(leaves, first, last, quantiles, ranks)

    def narrow(self, partition: Partition, population: Population, target: int) -> tuple[float, float]:
        """Between which of `quantiles` the result lies; one pass over the data."""
        [rule] = population.rules
        kept = np.zeros((2, len(self.quantiles)), np.int64)  # by the quantile up to which
        for sample in population.judged():
            bins = [partition.locate(sample, head) for head in range(partition.n_heads)]
            for bound in range(2):
                upto = join(rule, np.stack([self.ranks[bound][one] for one in bins]))
                np.add.at(kept[bound], upto, sample.kept)
        at_least, at_most = np.cumsum(kept[:, ::-1], axis=1)[:, ::-1]
        low, high = (np.flatnonzero(weights >= target).max(initial=0) for weights in (at_least, at_most))
        return float(self.quantiles[low]), float(self.quantiles[high])

    def undecided(self, low: float, high: float) -> Bins:
        """Bins of documents that may stop being kept between the two."""
        return self.leaves.where((self.leaves.shifts > 0) & (self.last >= low) & (self.first < high))
