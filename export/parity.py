"""Oracle against graph, fast tokenizer against oracle; out of tolerance means no bundle."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jql_engine.batching import plan
from jql_engine.data import Budget, TokenBatch
from jql_engine.errors import ParityError
from jql_engine.sessions import Session
from jql_export.reference import Expected
from jql_export.tensors import Array
from jql_export.tolerances import LONG_TOKENS, Tolerance


def certify(session: Session, tokens: TokenBatch, expected: Expected, tolerance: Tolerance) -> dict[str, Any]:
    """Run `session` on `tokens` and compare with the oracle.

    Returns the figures for the bundle: largest absolute differences, counts, and what a score moves by when its
    document is computed alone; of the embedding only where there are no heads. Raises ParityError naming the worst
    document where a figure is out of tolerance.
    """
    embeddings, scores = run_all(session, tokens, session.budget)
    long = tokens.lengths > LONG_TOKENS
    errors = {
        "embedding": np.where(long, 0, _largest(embeddings, expected.embeddings)),
        "embedding_long": np.where(long, _largest(embeddings, expected.embeddings), 0),
    }
    if expected.scores.shape[1]:
        alone = run_all(session, tokens, Budget(1, session.budget.layout))[1]
        errors |= {"score": _largest(scores, expected.scores), "batch": _largest(scores, alone)}
    limits = asdict(tolerance)
    for name, error in errors.items():
        _check(session.variant, name, error, limits[name], tokens)
    figures = {f"max_abs_{name}": float(f"{error.max(initial=0):.2e}") for name, error in errors.items()}
    return {"documents": len(tokens.rows), "tokens": len(tokens.ids), "longest": int(tokens.lengths.max()), **figures}


def run_all(session: Session, tokens: TokenBatch, budget: Budget) -> tuple[Array, Array]:
    """Embeddings [N, D] and scores [N, H] of `tokens`, whose rows count from 0."""
    batches = [(batch.rows, session.run(batch)) for batch in plan(tokens, budget)]
    order = np.argsort(np.concatenate([rows for rows, _ in batches]))
    embeddings = np.concatenate([output.embeddings for _, output in batches])[order]
    return embeddings, np.concatenate([output.scores for _, output in batches])[order]


def _largest(found: Array, expected: Array) -> NDArray[np.float64]:
    """Largest absolute difference of each document, float64 [N]; NaN counts as infinite."""
    difference = np.abs(found.astype(np.float64) - expected).max(axis=1)
    return np.where(np.isnan(difference), np.inf, difference)


def _check(variant: str, name: str, errors: NDArray[np.float64], limit: float, tokens: TokenBatch) -> None:
    worst = int(errors.argmax())
    if errors[worst] > limit:
        raise ParityError(
            f"variant {variant} is out of tolerance: {name} differs by {errors[worst]:.2e} on a probe document of "
            f"{tokens.lengths[worst]} tokens, allowed is {limit:.0e}; {int((errors > limit).sum())} of {len(errors)} "
            "probe documents fail. No bundle was written; please report this with the encoder's name"
        )
