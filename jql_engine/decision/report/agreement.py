"""How far the heads agree about the documents of a sample."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from jql_engine.decision.comparison import spearman
from jql_engine.decision.report.figures import MOST_PAIRS, Agreement, Hexagons, Pair

COLUMNS = 28  # hexagons side by side


def agreement_of(heads: tuple[str, ...], scores: NDArray[np.float32], n_drawn: int) -> Agreement:
    """Of the finite `scores` [H, n] of the rows, out of `n_drawn`, that have all of them."""
    pairs = [
        Pair(
            heads[a],
            heads[b],
            spearman(scores[a], scores[b]) if scores.shape[1] else None,
            count_in_hexagons(scores[a], scores[b]) if number < MOST_PAIRS and scores.shape[1] else None,
        )
        for number, (a, b) in enumerate(combinations(range(len(heads)), 2))
    ]
    return Agreement(n_drawn, scores.shape[1], tuple(pairs))


def count_in_hexagons(x: NDArray[np.float32], y: NDArray[np.float32]) -> Hexagons:
    """Documents by the hexagon whose centre is nearest.

    The centres are two rectangular grids, the second one in the middle of the first one's cells (D. B. Carr et al.,
    doi:10.1080/01621459.1987.10478445).
    """
    columns, rows = COLUMNS, int(COLUMNS / np.sqrt(3))
    (x_low, width), (y_low, height) = _grid(x, columns), _grid(y, rows)
    u, v = (x.astype(np.float64) - x_low) / width, (y.astype(np.float64) - y_low) / height
    corner, centre = np.stack([np.rint(u), np.rint(v)]), np.stack([np.floor(u), np.floor(v)]) + 0.5
    is_corner = _distance(corner, u, v) <= _distance(centre, u, v)
    places, counts = np.unique(np.where(is_corner, corner, centre), axis=1, return_counts=True)
    centres = np.stack([x_low + places[0] * width, y_low + places[1] * height], axis=1)
    return Hexagons(tuple(map(tuple, centres.tolist())), tuple(counts.tolist()), width, height)


def _grid(values: NDArray[np.float32], n_cells: int) -> tuple[float, float]:
    """Where it begins, and how wide a cell is."""
    low, high = float(values.min()), float(values.max())
    return (low, (high - low) / n_cells) if high > low else (low - 0.5, 1.0)


def _distance(places: NDArray[np.float64], u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.float64]:
    squared: NDArray[np.float64] = (u - places[0]) ** 2 + 3 * (v - places[1]) ** 2
    return squared
