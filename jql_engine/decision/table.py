"""What each rule keeps at several quantiles, in documents and tokens, counted jointly: the table of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jql_engine.decision.census import Census
from jql_engine.decision.population import Population
from jql_engine.decision.quantile import quantiles
from jql_engine.decision.ranks import Weight
from jql_engine.decision.result import MIN_GROUP
from jql_engine.decision.rules import RULES, Rule, join, judged_scores
from jql_engine.decision.scores import ScoreFiles


@dataclass(frozen=True, slots=True)
class QuantileTable:
    """Thresholds at Q quantiles and what they keep of each group."""

    at: tuple[float, ...]
    is_pooled: NDArray[np.bool_]  # [G] whether a group has the thresholds of all groups together
    thresholds: Mapping[Rule, NDArray[np.float32]]  # [G, J, Q]
    kept_documents: NDArray[np.int64]  # [RULES, Q, G]
    kept_tokens: NDArray[np.int64]  # [RULES, Q, G]


def quantile_table(
    files: ScoreFiles,
    census: Census,
    at: Sequence[float],
    weight: Weight = "documents",
    min_group: int = MIN_GROUP,
) -> QuantileTable:
    """The table for the ascending quantiles `at`; raises InputError.

    Two passes over the data for the quantiles, or three where there are many groups, and one to count.
    """
    assert list(at) == sorted(at)
    population = Population.of(files, census, ("all", "mean"), weight, weight, min_group)
    found = quantiles(population.counted, population.totals, len(population.heads), list(at), weight)
    of_heads, of_mean = found[population.slots, :-1], found[population.slots, -1:]
    thresholds: dict[Rule, NDArray[np.float32]] = {"all": of_heads, "any": of_heads, "mean": of_mean}
    documents, tokens = _count(files, thresholds, census.n_groups, len(at))
    return QuantileTable(tuple(at), population.is_pooled, thresholds, documents, tokens)


def _count(
    files: ScoreFiles, thresholds: Mapping[Rule, NDArray[np.float32]], n_groups: int, n_quantiles: int
) -> NDArray[np.int64]:
    """Documents and tokens kept, int64 [2, RULES, Q, G].

    Thresholds ascend with their quantiles, so how many of them a score reaches says which; a document is counted there.
    """
    counts = np.zeros((2, len(RULES), n_quantiles + 1, n_groups), np.int64)
    for rows in files.read():
        chosen = np.flatnonzero(rows.is_scored)
        scores, groups, tokens = rows.scores[:, chosen], rows.groups[chosen], rows.n_tokens[chosen]
        of_heads, of_mean = (
            _reached(judged_scores(rule, scores), thresholds[rule], groups) for rule in ("all", "mean")
        )
        for number, (rule, reached) in enumerate(zip(RULES, (of_heads, of_heads, of_mean), strict=True)):
            place = join(rule, reached), groups
            np.add.at(counts[0, number], place, 1)
            np.add.at(counts[1, number], place, tokens)
    return np.cumsum(counts[:, :, :0:-1], axis=2)[:, :, ::-1]  # kept at a quantile: whatever reaches it or more


def _reached(
    scores: NDArray[np.float32], thresholds: NDArray[np.float32], groups: NDArray[np.int64]
) -> NDArray[np.int64]:
    """How many thresholds of its group [G, J, Q] each of `scores` [J, n] reaches, int64 [J, n]."""
    reached = np.zeros(scores.shape, np.int64)
    for head, one in enumerate(scores):
        for quantile in range(thresholds.shape[2]):
            reached[head] += one >= thresholds[groups, head, quantile]
    return reached
