"""Thresholds of every head in every group, and what a rule keeps by them.

    --quantile q        each head's own quantile q in the group, as the JQL paper cuts
    --keep share        the largest common quantile at which the rule keeps at least that share of the scored documents,
                        or of their tokens
    --keep-tokens n     the same for a number of tokens

A score is kept that is at or above its threshold. So where documents have equal scores, more may be kept than was asked
for: the result says how much. Documents without a finite score of every head are dropped, counted, and take no part.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from jql_engine.decision.census import Census, take_census
from jql_engine.decision.interval import effective_size, weight_interval
from jql_engine.decision.kept import Cut, count_kept
from jql_engine.decision.partition import Partition
from jql_engine.decision.population import Population
from jql_engine.decision.quantile import exact_scores
from jql_engine.decision.ranks import Weight, needed_weight, smallest_with_share
from jql_engine.decision.result import Counts, Decision, GroupResult, HeadThreshold, Request, Target
from jql_engine.decision.scores import ScoreFiles
from jql_engine.decision.solve import common_quantile
from jql_engine.errors import InputError


def decide(files: ScoreFiles, request: Request) -> Decision:
    """Thresholds for `files`, and what they keep; raises InputError.

    Passes over the score columns: one to count, two for the quantiles, one for what is kept; three more where a share
    or a number of tokens is to be kept. Of hundreds of groups it is a few more, see docs/deciding.md.
    """
    census = take_census(files)
    population = Population.of(files, census, (request.rule,), request.weight, request.kept_weight, request.min_group)
    partition = _partition(population)
    asked = _target(request, census)
    quantile = request.quantile
    if quantile is None:
        assert asked is not None
        quantile = common_quantile(partition, population, asked)
        partition = _partition(population) if partition.is_spent else partition
    thresholds, shares = _thresholds(partition, population, quantile)  # [slots, J, 3], [slots, J]
    cut = Cut(request.rule, thresholds[population.slots, :, 0])
    kept = count_kept(files, cut, census.n_groups)
    return Decision(
        request,
        quantile,
        None if asked is None else _reached(request.kept_weight, asked, kept),
        files.group_column,
        files.score_columns,
        dict(files.settings),
        tuple(one.file for one in files.without_scores),
        _counts(files, census, kept, slice(None)),
        _groups(population, thresholds, shares, kept),
    )


def _partition(population: Population) -> Partition:
    partition = Partition(len(population.totals), len(population.heads))
    partition.count(population.counted())
    return partition


def _target(request: Request, census: Census) -> int | None:
    """How much is to be kept; None where a quantile was asked for."""
    total = int((census.scored if request.kept_weight == "documents" else census.tokens).sum())
    if request.keep is not None:
        return smallest_with_share(total, request.keep)
    if request.keep_tokens is not None and request.keep_tokens > total:
        raise InputError(
            f"{request.keep_tokens:,} tokens are to be kept, and the scored documents have {total:,}; ask for fewer"
        )
    return request.keep_tokens


def _thresholds(
    partition: Partition, population: Population, quantile: float
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Of each slot and head the threshold and the ends of its interval, NaN for none, float32 [slots, J, 3].

    And the share of the slot's weight that reaches the threshold, float64 [slots, J].
    """
    totals = population.totals
    sizes = totals
    if population.weight == "tokens":
        sizes = effective_size(totals, population.by_slot(population.census.tokens_squared))
    needed = np.array([
        [needed_weight(total, quantile, population.weight), *weight_interval(total, n_docs, quantile)]
        for total, n_docs in zip(totals.tolist(), sizes.tolist(), strict=True)
    ])  # fmt: skip
    series = np.repeat(np.arange(partition.n_series), 3)
    weights = np.repeat(needed, partition.n_heads, axis=0).ravel()
    scores = exact_scores(partition, population.counted, series, np.maximum(weights, 1))
    found = np.where(weights > 0, scores, np.nan).astype(np.float32).reshape(len(totals), partition.n_heads, 3)
    below = partition.find(series[::3], weights[::3]).below.reshape(found.shape[:2])
    return found, (totals[:, None] - below) / totals[:, None]


def _reached(unit: Weight, asked: int, kept: NDArray[np.int64]) -> Target:
    reached = int(kept[0 if unit == "documents" else 1].sum())
    return Target(unit, asked, reached, reached - asked)


def _counts(files: ScoreFiles, census: Census, kept: NDArray[np.int64], groups: slice) -> Counts:
    null, nan, infinite = (int(one[groups].sum()) for one in census.faulty)
    return Counts(
        documents=int(census.documents[groups].sum()),
        scored=int(census.scored[groups].sum()),
        null=null,
        nan=nan,
        infinite=infinite,
        tokens=int(census.tokens[groups].sum()) if files.has_tokens else None,
        kept_documents=int(kept[0, groups].sum()),
        kept_tokens=int(kept[1, groups].sum()) if files.has_tokens else None,
    )


def _groups(
    population: Population, thresholds: NDArray[np.float32], shares: NDArray[np.float64], kept: NDArray[np.int64]
) -> tuple[GroupResult, ...]:
    """Results by name, the null last."""
    files, census, results = population.files, population.census, []
    for number, name in sorted(enumerate(files.groups.names), key=lambda item: (item[1] is None, item[1] or "")):
        slot = population.slots[number]
        heads = tuple(
            HeadThreshold(head, float(one[0]), (_or_none(one[1]), _or_none(one[2])), float(share))
            for head, one, share in zip(population.heads, thresholds[slot], shares[slot], strict=True)
        )
        counts = _counts(files, census, kept, slice(number, number + 1))
        results.append(GroupResult(name, bool(population.is_pooled[number]), heads, counts))
    return tuple(results)


def _or_none(score: np.float32) -> float | None:
    return None if np.isnan(score) else float(score)
