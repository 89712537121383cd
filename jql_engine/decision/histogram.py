"""Histograms for plots: every head in every group, in equal bins that the groups of a head share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jql_engine.decision.census import Census
from jql_engine.decision.scores import ScoreFiles

N_BINS = 60


@dataclass(frozen=True, slots=True)
class Histograms:
    """Finite scores in bins as np.histogram counts them: from an edge up to the next, the last edge included."""

    edges: NDArray[np.float64]  # [H, bins + 1]
    documents: NDArray[np.int64]  # [G, H, bins]
    tokens: NDArray[np.int64]  # [G, H, bins]


def count_in_bins(files: ScoreFiles, census: Census, n_bins: int = N_BINS) -> Histograms:
    """Histograms between the least and the greatest score of each head; one pass over the data."""
    shape = census.n_groups, len(files.heads), n_bins
    edges = np.stack([_edges(least, greatest, n_bins) for least, greatest in zip(*_ranges(census), strict=True)])
    found = Histograms(edges, np.zeros(shape, np.int64), np.zeros(shape, np.int64))
    for rows in files.read():
        for head, scores in enumerate(rows.scores):
            is_finite = np.isfinite(scores)
            bins = np.searchsorted(edges[head], scores[is_finite], side="right") - 1
            place = rows.groups[is_finite], head, np.minimum(bins, n_bins - 1)
            np.add.at(found.documents, place, 1)
            np.add.at(found.tokens, place, rows.n_tokens[is_finite])
    return found


def _ranges(census: Census) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The least and the greatest score of each head, [H] each; 0 where it has none."""
    least = census.least.min(axis=1, initial=np.inf)
    greatest = census.greatest.max(axis=1, initial=-np.inf)
    return np.where(np.isfinite(least), least, 0), np.where(np.isfinite(greatest), greatest, 0)


def _edges(least: np.float32, greatest: np.float32, n_bins: int) -> NDArray[np.float64]:
    if least == greatest:
        least, greatest = np.float32(least - 0.5), np.float32(greatest + 0.5)
    return np.linspace(float(least), float(greatest), n_bins + 1)
