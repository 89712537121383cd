"""A uniform sample of rows, the same one each time: what is compared pair by pair is held in memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from jql_engine.decision.scores import Rows

SAMPLED = 100_000
SEED = 0


class ScoreSample:
    """Scores of rows that were drawn without replacement from `n_rows`, which come in order."""

    def __init__(self, n_rows: int, n_heads: int) -> None:
        drawn = np.random.default_rng(SEED).choice(n_rows, min(SAMPLED, n_rows), replace=False, shuffle=False)
        self._rows: NDArray[np.int64] = np.sort(drawn)  # of all files
        self._seen = 0
        self._parts: list[NDArray[np.float32]] = [np.empty((n_heads, 0), np.float32)]

    def add(self, rows: Rows) -> None:
        """Take what was drawn of the rows that come next; rows that lack a score are left out."""
        first, last = np.searchsorted(self._rows, [self._seen, self._seen + len(rows)])
        places = self._rows[first:last] - self._seen
        self._parts.append(rows.scores[:, places[rows.is_scored[places]]])
        self._seen += len(rows)

    @property
    def n_drawn(self) -> int:
        """Rows drawn, those that lack a score among them."""
        return len(self._rows)

    @property
    def scores(self) -> NDArray[np.float32]:
        """Of those that have all, [H, n]."""
        return np.concatenate(self._parts, axis=1)
