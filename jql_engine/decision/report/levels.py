"""Thresholds at several quantiles, of every head and of their mean, and what each rule keeps by them: counted jointly.

The quantiles of a head ascend, and so do its thresholds. So a document is kept by a head at the first of them, up to
some last one: its level. By the rule `all` its level is the lowest of its heads', by `any` the highest. A document is
counted once, at its level, and not once for every quantile and rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from jql_engine.decision.census import Census
from jql_engine.decision.population import Population
from jql_engine.decision.quantile import quantiles
from jql_engine.decision.ranks import Weight
from jql_engine.decision.rules import RULES, Rule
from jql_engine.decision.scores import Rows, ScoreFiles


@dataclass(frozen=True, slots=True)
class Levels:
    """Thresholds at Q quantiles and what they keep."""

    population: Population  # its last slot is of all documents
    rules: tuple[Rule, ...]  # those that differ: of one head all are one
    at: tuple[float, ...]
    thresholds: NDArray[np.float32]  # [slots, J, Q]: the heads, and their mean where there are several
    documents: NDArray[np.int64]  # [rules, Q, G] kept
    tokens: NDArray[np.int64]  # [rules, Q, G]

    @property
    def whole(self) -> int:
        """The slot of all documents."""
        return len(self.thresholds) - 1


def count_levels(
    files: ScoreFiles,
    census: Census,
    weight: Weight,
    min_group: int,
    at: Sequence[float],
    look: Callable[[Rows, Levels], None],
) -> Levels:
    """Three passes over the data, or more where there are hundreds of groups; `look` at the rows of the last one.

    Raises InputError where no document has scores, or tokens are not known.
    """
    rules, judged = (RULES, ("all", "mean")) if len(files.heads) > 1 else (RULES[:1], RULES[:1])
    population = Population.of(files, census, judged, weight, weight, min_group, with_pool=True)
    thresholds = quantiles(population.counted, population.totals, len(population.heads), list(at), weight)
    n_groups, n_levels = census.n_groups, len(at) + 1
    counts = np.zeros((2, len(rules), n_groups * n_levels), np.int64)
    empty = np.zeros((len(rules), len(at), n_groups), np.int64)
    levels = Levels(population, rules, tuple(at), thresholds, empty, empty)
    for rows in files.read():
        groups, scores, n_tokens = population.scored(rows)
        reached = _reached(scores, population.slots[groups], thresholds)
        heads = reached[: len(files.heads)]
        by_rule = {"all": heads.min(axis=0), "any": heads.max(axis=0), "mean": reached[-1]}
        for number, rule in enumerate(rules):
            places = groups * n_levels + by_rule[rule]
            np.add.at(counts[0, number], places, 1)
            np.add.at(counts[1, number], places, n_tokens)
        look(rows, levels)
    by_level = counts.reshape(2, len(rules), n_groups, n_levels)
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
