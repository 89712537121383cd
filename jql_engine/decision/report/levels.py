"""Thresholds at several quantiles, of every head and of their mean, and what each rule keeps by them: counted jointly.

The quantiles of a head ascend, and so do its thresholds. So a document is kept by a head at the first of them, up to
some last one: its level. By the rule `all` its level is the lowest of its heads', by `any` the highest. A document is
counted once, at its level, and not once for every quantile and rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from jql_engine.decision.census import Census
from jql_engine.decision.order import keys_of
from jql_engine.decision.partition import Sample
from jql_engine.decision.population import Population
from jql_engine.decision.quantile import quantiles
from jql_engine.decision.ranks import Weight
from jql_engine.decision.rules import RULES, Rule, judged_scores
from jql_engine.decision.scores import Rows, ScoreFiles


@dataclass(frozen=True, slots=True)
class Slots:
    """Whose thresholds decide about a group: its own, or those of all documents, which have the last slot."""

    files: ScoreFiles
    weight: Weight
    of_groups: NDArray[np.int64]  # [G]
    totals: NDArray[np.int64]  # [slots] weights of all documents in each

    @classmethod
    def of(cls, files: ScoreFiles, census: Census, weight: Weight, min_group: int) -> Slots:
        """Raises InputError where no document has scores, or tokens are not known."""
        population = Population.of(files, census, ("all",), weight, weight, min_group)
        slots, totals = population.slots, population.totals
        if population.pool is None and census.n_groups > 1:
            totals = np.append(totals, totals.sum())
        return cls(files, weight, slots, totals)

    @property
    def pool(self) -> int:
        """The slot of all documents."""
        return len(self.totals) - 1

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Those that differ: of one head all are one."""
        return RULES if len(self.files.heads) > 1 else ("all",)

    def judged(self, rows: Rows) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
        """Groups [n], scores [J, n] of every head and their mean, and lengths [n] of the rows that have scores."""
        chosen = slice(None) if (is_scored := rows.is_scored).all() else is_scored
        scores = rows.scores[:, chosen]
        if "mean" in self.rules:
            scores = np.concatenate([scores, judged_scores("mean", scores)])
        return rows.groups[chosen], scores, rows.n_tokens[chosen]

    def counted(self) -> Iterator[Sample]:
        """Each document in its group's slot, where that has one, and in that of all."""
        for rows in self.files.read():
            groups, scores, n_tokens = self.judged(rows)
            weights = np.ones_like(n_tokens) if self.weight == "documents" else n_tokens
            whole = Sample(np.full_like(groups, self.pool), keys_of(scores), weights, weights)
            yield whole
            slots = self.of_groups[groups]
            own = slice(None) if (is_own := slots != self.pool).all() else is_own
            yield Sample(slots[own], whole.keys[:, own], weights[own], weights[own])


@dataclass(frozen=True, slots=True)
class Levels:
    """Thresholds at Q quantiles and what they keep."""

    slots: Slots
    at: tuple[float, ...]
    thresholds: NDArray[np.float32]  # [slots, J, Q]: the heads, and their mean where there are several
    documents: NDArray[np.int64]  # [rules, Q, G] kept
    tokens: NDArray[np.int64]  # [rules, Q, G]


def count_levels(slots: Slots, at: Sequence[float], n_groups: int, look: Callable[[Rows, Levels], None]) -> Levels:
    """Three passes over the data, or more where there are hundreds of groups; `look` at the rows of the last one."""
    n_judged = len(slots.files.heads) + ("mean" in slots.rules)
    thresholds = quantiles(slots.counted, slots.totals, n_judged, list(at), slots.weight)
    counts = np.zeros((2, len(slots.rules), n_groups * (len(at) + 1)), np.int64)
    empty = np.zeros((len(slots.rules), len(at), n_groups), np.int64)
    levels = Levels(slots, tuple(at), thresholds, empty, empty)
    for rows in slots.files.read():
        groups, scores, n_tokens = slots.judged(rows)
        reached = _reached(scores, slots.of_groups[groups], thresholds)
        heads = reached[: len(slots.files.heads)]
        by_rule = {"all": heads.min(axis=0), "any": heads.max(axis=0), "mean": reached[-1]}
        for number, rule in enumerate(slots.rules):
            places = groups * (len(at) + 1) + by_rule[rule]
            np.add.at(counts[0, number], places, 1)
            np.add.at(counts[1, number], places, n_tokens)
        look(rows, levels)
    by_level = counts.reshape(2, len(slots.rules), n_groups, len(at) + 1)
    kept = by_level[..., ::-1].cumsum(axis=-1)[..., ::-1][..., 1:].swapaxes(-1, -2)
    return replace(levels, documents=kept[0], tokens=kept[1])


def _reached(
    scores: NDArray[np.float32], slots: NDArray[np.int64], thresholds: NDArray[np.float32]
) -> NDArray[np.int64]:
    """How many of the thresholds of its slot each score [J, n] is at or above."""
    reached = np.zeros(scores.shape, np.int64)
    for one, found, own in zip(scores, reached, thresholds.swapaxes(0, 1), strict=True):
        for at in range(thresholds.shape[2]):
            found += one >= own[slots, at]
    return reached
