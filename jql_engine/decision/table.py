"""What each rule keeps at several quantiles, in documents and tokens, counted jointly: the table of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jql_engine.decision.census import Census
from jql_engine.decision.kept import Cut, count_kept
from jql_engine.decision.population import Population
from jql_engine.decision.quantile import quantiles
from jql_engine.decision.ranks import Weight
from jql_engine.decision.result import MIN_GROUP
from jql_engine.decision.rules import RULES, Rule
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
    """The table for the quantiles `at`; raises InputError. Two passes for the heads, two for their mean, one to count.

    More than two where there are hundreds of groups.
    """
    of_heads, population = _thresholds(files, census, "all", at, weight, min_group)
    of_mean, _ = _thresholds(files, census, "mean", at, weight, min_group)
    thresholds: dict[Rule, NDArray[np.float32]] = {"all": of_heads, "any": of_heads, "mean": of_mean}
    cuts = [Cut(rule, thresholds[rule][..., i]) for rule in RULES for i in range(len(at))]
    counts = count_kept(files, cuts, census.n_groups).reshape(len(RULES), len(at), 2, census.n_groups)
    return QuantileTable(tuple(at), population.is_pooled, thresholds, counts[:, :, 0], counts[:, :, 1])


def _thresholds(
    files: ScoreFiles, census: Census, rule: Rule, at: Sequence[float], weight: Weight, min_group: int
) -> tuple[NDArray[np.float32], Population]:
    population = Population.of(files, census, rule, weight, weight, min_group)
    found = quantiles(population.counted, population.totals, len(population.heads), list(at), weight)
    return found[population.slots], population
