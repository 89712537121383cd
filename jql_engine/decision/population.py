"""The documents that thresholds are taken from, and the slots that they are counted in: large groups, and the pool.

A group with too few documents for a threshold of its own takes that of the pool, which is all documents of all groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from jql_engine.decision.census import Census
from jql_engine.decision.order import keys_of
from jql_engine.decision.partition import Sample
from jql_engine.decision.ranks import EXACT, Weight
from jql_engine.decision.rules import Rule, judged_heads, judged_scores
from jql_engine.decision.scores import Rows, ScoreFiles
from jql_engine.errors import InputError

T = TypeVar("T", np.int64, np.float64)


@dataclass(frozen=True, slots=True)
class Population:
    """Documents with finite scores, as often as they are asked for."""

    files: ScoreFiles
    census: Census
    rules: tuple[Rule, ...]  # whose scores are looked at, all together
    weight: Weight  # in which quantiles are taken
    kept_weight: Weight  # in which what is kept is counted
    slots: NDArray[np.int64]  # [G], of each group
    pool: int | None  # the last slot: that of the pool, where it is counted

    @classmethod
    def of(
        cls,
        files: ScoreFiles,
        census: Census,
        rules: tuple[Rule, ...],
        weight: Weight,
        kept_weight: Weight,
        min_group: int,
        *,
        with_pool: bool = False,
    ) -> Population:
        """Give each group its slot; raises InputError where no document has scores, or tokens are not known.

        The pool is counted where a group takes its thresholds, and `with_pool` in any case.
        """
        if "tokens" in (weight, kept_weight) and not files.has_tokens:
            raise InputError(f"{files.files[0].source.location} has no column 'n_tokens'; count in documents")
        if not census.scored.any():
            raise InputError(
                f"none of the {files.n_rows:,} documents has a score of every head; there is nothing to cut"
            )
        is_large = census.scored >= (min_group if files.group_column else 1)
        slots = np.where(is_large, np.cumsum(is_large) - 1, is_large.sum())
        pool = None if is_large.all() and not (with_pool and len(is_large) > 1) else int(is_large.sum())
        found = cls(files, census, rules, weight, kept_weight, slots, pool)
        if (empty := found.totals == 0).any():
            group = files.groups.names[int(np.argmax(slots == np.argmax(empty)))]
            raise InputError(f"no document of the group {group!r} has any tokens; count in documents")
        if (total := int(found.totals.max())) >= EXACT:
            raise InputError(f"{total:,} tokens are in a group, {EXACT - 1:,} are the most; count in documents")
        return found

    @property
    def heads(self) -> tuple[str, ...]:
        """What has thresholds."""
        return tuple(head for rule in self.rules for head in judged_heads(rule, self.files.heads))

    @property
    def is_pooled(self) -> NDArray[np.bool_]:
        """Which groups take the thresholds of the pool, [G]."""
        return np.zeros(len(self.slots), np.bool_) if self.pool is None else self.slots == self.pool

    @property
    def totals(self) -> NDArray[np.int64]:
        """The weight of all documents of each slot, [slots]."""
        return self.by_slot(self.census.scored if self.weight == "documents" else self.census.tokens)

    def by_slot(self, counts: NDArray[T]) -> NDArray[T]:
        """Sums of `counts` [G] for each slot, [slots]; those of the pool are over all groups."""
        sums = np.zeros(1 + int(self.slots.max() if self.pool is None else self.pool), counts.dtype)
        np.add.at(sums, self.slots, counts)
        if self.pool is not None:
            sums[self.pool] = counts.sum()
        return sums

    def scored(self, rows: Rows) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
        """Of the n documents of `rows` that have scores: groups [n], what is judged [J, n], and tokens [n]."""
        chosen = slice(None) if (is_scored := rows.is_scored).all() else is_scored
        scores = rows.scores[:, chosen]
        judged = np.concatenate([judged_scores(rule, scores) for rule in self.rules])
        return rows.groups[chosen], judged, rows.n_tokens[chosen]

    def judged(self) -> Iterator[Sample]:
        """Each document once, in the slot whose thresholds decide about it."""
        for rows in self.files.read():
            groups, scores, tokens = self.scored(rows)
            weights = {"documents": np.ones_like(tokens), "tokens": tokens}
            yield Sample(self.slots[groups], keys_of(scores), weights[self.weight], weights[self.kept_weight])

    def counted(self) -> Iterator[Sample]:
        """Each document in every slot that it counts in: its group's, where that has one, and the pool."""
        for sample in self.judged():
            if self.pool is None:
                yield sample
                continue
            own = sample.slots != self.pool
            yield Sample(sample.slots[own], sample.keys[:, own], sample.weights[own], sample.kept[own])
            yield Sample(np.full_like(sample.slots, self.pool), sample.keys, sample.weights, sample.kept)
