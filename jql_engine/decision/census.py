"""What there is in score files, group by group: documents, tokens, and scores that are null, NaN or infinite."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jql_engine.decision.scores import Rows, ScoreFiles

FAULTS = ("null", "nan", "infinite")  # a document counts as the first of these that one of its scores is


@dataclass(frozen=True, slots=True)
class Census:
    """Counts by group, in the order of their numbers; [G] each."""

    documents: NDArray[np.int64]
    scored: NDArray[np.int64]  # documents whose scores are all finite
    tokens: NDArray[np.int64]  # of those; 0 where the files do not tell
    tokens_squared: NDArray[np.float64]  # sum of the squares
    faulty: NDArray[np.int64]  # [FAULTS, G] documents that are not scored
    faulty_scores: NDArray[np.int64]  # [FAULTS, H, G]
    least: NDArray[np.float32]  # [H, G] the smallest finite score; inf where there is none
    greatest: NDArray[np.float32]  # [H, G] the largest; -inf where there is none

    @property
    def n_groups(self) -> int:
        """Groups that any document has."""
        return len(self.documents)


def take_census(files: ScoreFiles) -> Census:
    """Read all rows once; raises InputError."""
    n_heads = len(files.heads)
    census = _empty(n_heads, 0)
    for rows in files.read():
        if len(files.groups) > census.n_groups:
            census = _widened(census, _empty(n_heads, max(2 * census.n_groups, len(files.groups))))
        _add(census, rows)
    return _narrowed(census, len(files.groups))


def _empty(n_heads: int, n_groups: int) -> Census:
    return Census(
        documents=np.zeros(n_groups, np.int64),
        scored=np.zeros(n_groups, np.int64),
        tokens=np.zeros(n_groups, np.int64),
        tokens_squared=np.zeros(n_groups),
        faulty=np.zeros((len(FAULTS), n_groups), np.int64),
        faulty_scores=np.zeros((len(FAULTS), n_heads, n_groups), np.int64),
        least=np.full((n_heads, n_groups), np.inf, np.float32),
        greatest=np.full((n_heads, n_groups), -np.inf, np.float32),
    )


def _widened(census: Census, wide: Census) -> Census:
    for name in Census.__slots__:
        getattr(wide, name)[..., : census.n_groups] = getattr(census, name)
    return wide


def _narrowed(census: Census, n_groups: int) -> Census:
    return Census(**{name: getattr(census, name)[..., :n_groups] for name in Census.__slots__})


def _add(census: Census, rows: Rows) -> None:
    is_scored, groups = rows.is_scored, rows.groups
    np.add.at(census.documents, groups, 1)
    if not is_scored.all():
        _add_faults(census, rows, groups)
        groups = groups[is_scored]
    tokens = rows.n_tokens[is_scored]
    np.add.at(census.scored, groups, 1)
    np.add.at(census.tokens, groups, tokens)
    np.add.at(census.tokens_squared, groups, np.square(tokens, dtype=np.float64))
    for head, scores in enumerate(rows.scores):
        is_finite = np.isfinite(scores)
        np.minimum.at(census.least[head], rows.groups[is_finite], scores[is_finite])
        np.maximum.at(census.greatest[head], rows.groups[is_finite], scores[is_finite])


def _add_faults(census: Census, rows: Rows, groups: NDArray[np.int64]) -> None:
    is_counted = np.zeros(len(rows), np.bool_)
    faults = (rows.null, np.isnan(rows.scores) & ~rows.null, np.isinf(rows.scores))
    for fault, is_faulty in enumerate(faults):
        is_new = is_faulty.any(axis=0) & ~is_counted
        np.add.at(census.faulty[fault], groups[is_new], 1)
        is_counted |= is_new
        for head, one in enumerate(is_faulty):
            np.add.at(census.faulty_scores[fault, head], groups[one], 1)
