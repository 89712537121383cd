"""The weight of documents in bins of their keys, for many series at once; bins that matter are split and counted anew.

A series is the scores of one head in one group. Its 2^32 keys are cut into equal bins; a bin of interest is cut again,
and so on until it holds a single key: then it is known exactly how much weight lies up to each score in it. What lies
outside of the bins of interest is never counted twice. The bins form a tree, so that the bin of a key is found in as
many steps as its bin was cut.

Memory. A series is cut into ROOT_BINS / n_series bins at first, and every split takes at most half of the room that is
left up to MOST_BINS: 20 bytes a bin, and as much again while they are looked at. It does not depend on the rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jql_engine.decision.order import KEY_BITS
from jql_engine.errors import InputError

MOST_BINS = 1 << 24
ROOT_BINS = 1 << 23
ROOT_BITS = 20  # at most: more would be cache misses for nothing
MOST_SERIES = 20_000
LEAST_BITS = 3  # of a split; where there is no room, those with the most weight come first


@dataclass(frozen=True, slots=True)
class Sample:
    """Documents as they are counted and judged."""

    slots: NDArray[np.int64]  # [n], the group or pool of groups
    keys: NDArray[np.int64]  # [H, n]
    weights: NDArray[np.int64]  # [n], in which quantiles are taken
    kept: NDArray[np.int64]  # [n], in which what is kept is counted


@dataclass(frozen=True, slots=True)
class Bins:
    """Some bins of a partition."""

    numbers: NDArray[np.int64]  # [n]
    series: NDArray[np.int64]  # [n]
    lows: NDArray[np.int64]  # [n], the first key
    shifts: NDArray[np.int64]  # [n]; the width is 2^shift keys
    below: NDArray[np.int64]  # [n], weight of the series before the bin
    upto: NDArray[np.int64]  # [n], the same with the bin

    def where(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> Bins:
        """Some of them."""
        numbers, series, lows = self.numbers[chosen], self.series[chosen], self.lows[chosen]
        return Bins(numbers, series, lows, self.shifts[chosen], self.below[chosen], self.upto[chosen])


class Partition:
    """The keys of `n_heads` series of each of `n_slots`, in bins; series number slot * n_heads + head.

    A node is a range of keys cut into equal bins, and a bin that was split has a node of its own. Nodes are in the
    order of their first bins.
    """

    def __init__(self, n_slots: int, n_heads: int) -> None:
        self.n_heads, self.n_series = n_heads, n_slots * n_heads
        if self.n_series > MOST_SERIES:
            raise InputError(
                f"{n_slots:,} groups are to have thresholds of their own for {n_heads} heads each, {MOST_SERIES:,} in "
                "all are the most; raise --min-group, or name a column that sorts the documents into fewer groups"
            )
        bits = min(ROOT_BITS, (ROOT_BINS // self.n_series).bit_length() - 1)
        self._root_shift = KEY_BITS - bits
        roots = np.arange(self.n_series)
        # Of each node: its series, the first key, its bins' shift and first number, and the weight before it.
        self._series, self._lows, self._first_bins = roots, np.zeros_like(roots), roots << bits
        self._shifts, self._below = np.full_like(roots, self._root_shift), np.zeros_like(roots)
        # Of each bin: the node that it was split into, -1 for none, and the weight up to its end.
        self._children = np.full(self.n_series << bits, -1, np.int32)
        self._upto = np.zeros(0, np.int64)  # of those that are counted

    @property
    def n_bins(self) -> int:
        """Bins, those that were split among them."""
        return len(self._children)

    @property
    def is_spent(self) -> bool:
        """Whether so little room is left that a new partition needs fewer passes."""
        return len(self._children) > MOST_BINS * 3 // 4

    def count(self, samples: Iterable[Sample]) -> None:
        """Count all documents into the bins that have come since the last time; one pass over the data."""
        first = len(self._upto)
        counts = np.zeros(len(self._children) - first, np.int64)
        for sample in samples:
            for head in range(self.n_heads):
                bins = self.locate(sample, head) - first
                if first:
                    is_new = bins >= 0
                    np.add.at(counts, bins[is_new], sample.weights[is_new])
                else:
                    np.add.at(counts, bins, sample.weights)
        nodes = slice(int(np.searchsorted(self._first_bins, first)), None)
        starts = self._first_bins[nodes] - first
        upto = np.cumsum(counts)
        before = upto[starts] - counts[starts]
        upto += np.repeat(self._below[nodes] - before, np.diff(starts, append=len(counts)))
        self._upto = np.concatenate([self._upto, upto])

    def locate(self, sample: Sample, head: int) -> NDArray[np.int64]:
        """The bin of each document's key of a head, int64 [n]."""
        keys = sample.keys[head]
        roots = (sample.slots * self.n_heads + head) << (KEY_BITS - self._root_shift)
        bins: NDArray[np.int64] = roots + (keys >> self._root_shift)
        nodes = self._children[bins]
        rows = np.flatnonzero(nodes >= 0)
        nodes = nodes[rows]
        while len(rows):
            bins[rows] = self._first_bins[nodes] + ((keys[rows] - self._lows[nodes]) >> self._shifts[nodes])
            nodes = self._children[bins[rows]]
            is_split = nodes >= 0
            rows, nodes = rows[is_split], nodes[is_split]
        return bins

    def find(self, series: NDArray[np.int64], weights: NDArray[np.int64]) -> Bins:
        """Of each of `series` [n] the first bin up to which the weight `weights` [n] lies."""
        stops = np.append(self._first_bins[1:], len(self._upto))
        found = self._search(self._first_bins[series], stops[series], weights)
        nodes = self._children[found]
        rows = np.flatnonzero(nodes >= 0)
        while len(rows):
            nodes = nodes[nodes >= 0]
            found[rows] = self._search(self._first_bins[nodes], stops[nodes], weights[rows])
            nodes = self._children[found[rows]]
            rows = rows[nodes >= 0]
        return self.describe(found)

    def _search(
        self, first: NDArray[np.int64], stop: NDArray[np.int64], weights: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """The first of each range [first, stop) of bins up to which a weight lies: np.searchsorted in many ranges."""
        first, last = first.copy(), stop - 1
        while (first < last).any():
            middle = (first + last) >> 1
            is_later = self._upto[middle] < weights
            first, last = np.where(is_later, middle + 1, first), np.where(is_later, last, middle)
        return first

    def leaves(self) -> Bins:
        """The bins that are not split and hold any weight."""
        below = np.concatenate([[0], self._upto[:-1]])
        below[self._first_bins] = self._below
        return self.describe(np.flatnonzero((self._children < 0) & (self._upto > below)))

    def describe(self, numbers: NDArray[np.int64]) -> Bins:
        """Bins by their numbers [n], which are counted."""
        nodes = np.searchsorted(self._first_bins, numbers, side="right") - 1
        places = numbers - self._first_bins[nodes]
        below = np.where(places == 0, self._below[nodes], self._upto[numbers - 1])
        lows = self._lows[nodes] + (places << self._shifts[nodes])
        return Bins(numbers, self._series[nodes], lows, self._shifts[nodes], below, self._upto[numbers])

    def split(self, bins: Bins) -> None:
        """Cut each of `bins`, which are different and wider than one key, into as many as there is room for.

        Raises InputError where there is none: each time half of it is left, and a few times are enough.
        """
        room = MOST_BINS - len(self._children)
        if not room >> LEAST_BITS:
            raise InputError(
                f"the scores of {self.n_series // self.n_heads:,} groups take more memory than {MOST_BINS:,} bins; "
                "raise --min-group, or name a column that sorts the documents into fewer groups"
            )
        if len(bins.numbers) > (most := room >> LEAST_BITS):
            bins = bins.where(np.argpartition(bins.below - bins.upto, most)[:most])
        shifts = np.maximum(0, bins.shifts - max(LEAST_BITS, (room // 2 // len(bins.numbers)).bit_length() - 1))
        sizes = 1 << (bins.shifts - shifts)
        first_bins = len(self._children) + np.cumsum(sizes) - sizes
        n_nodes = len(self._first_bins)
        self._children[bins.numbers] = np.arange(n_nodes, n_nodes + len(sizes))
        self._children = np.concatenate([self._children, np.full(int(sizes.sum()), -1, np.int32)])
        self._series = np.concatenate([self._series, bins.series])
        self._lows = np.concatenate([self._lows, bins.lows])
        self._first_bins = np.concatenate([self._first_bins, first_bins])
        self._shifts = np.concatenate([self._shifts, shifts])
        self._below = np.concatenate([self._below, bins.below])
