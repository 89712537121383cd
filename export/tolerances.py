"""How far a graph may be from the fp32 oracle: the one place, for export and for the tests."""

from __future__ import annotations

from dataclasses import dataclass

LONG_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Largest absolute differences."""

    embedding: float  # documents up to LONG_TOKENS tokens
    embedding_long: float  # longer ones: attention sums more terms
    score: float
    batch: float  # a score computed alone against the same in a batch


TOLERANCES = {
    "fp32": Tolerance(embedding=1e-5, embedding_long=5e-5, score=1e-4, batch=1e-5),
}
