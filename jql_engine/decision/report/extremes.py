"""The few documents at an end or in the middle of a head's scores, found in one pass: ten are held, no more."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from jql_engine.decision.scores import Rows

N_SHOWN = 10


@dataclass(slots=True)
class Smallest:
    """The rows with the smallest values; of equal ones those that come first."""

    values: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))  # [n], ascending, n <= N_SHOWN
    files: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # in the file

    def add(self, values: NDArray[np.float64], rows: Rows, chosen: NDArray[np.int64]) -> None:
        """Look at `values` [n] of the rows `chosen` [n] of `rows`, which are after all before them."""
        if len(self.values) == N_SHOWN:
            is_near = values < self.values[-1]
            values, chosen = values[is_near], chosen[is_near]
        if not len(values):
            return
        nearest = np.argsort(values, kind="stable")[:N_SHOWN]
        together = np.concatenate([self.values, values[nearest]])
        kept = np.argsort(together, kind="stable")[:N_SHOWN]
        self.values = together[kept]
        self.files = np.concatenate([self.files, np.full(len(nearest), rows.file)])[kept]
        self.rows = np.concatenate([self.rows, rows.start + chosen[nearest]])[kept]

    @property
    def places(self) -> list[tuple[int, int]]:
        """File and row of each."""
        return list(zip(self.files.tolist(), self.rows.tolist(), strict=True))


@dataclass(slots=True)
class Ends:
    """The best and the worst documents of every head; those that lack a score take no part."""

    best: list[Smallest]
    worst: list[Smallest]

    @classmethod
    def empty(cls, n_heads: int) -> Ends:
        """Of `n_heads` heads, before any row."""
        return cls([Smallest() for _ in range(n_heads)], [Smallest() for _ in range(n_heads)])

    def add(self, rows: Rows) -> None:
        """Look at the rows that come next."""
        chosen = np.flatnonzero(rows.is_scored)
        for scores, best, worst in zip(rows.scores, self.best, self.worst, strict=True):
            own = scores[chosen].astype(np.float64)
            best.add(-own, rows, chosen)
            worst.add(own, rows, chosen)
