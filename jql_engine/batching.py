"""TokenBatch -> Batches under a token budget; pure NumPy.

Documents are taken from the longest to the shortest, so that buffers reach their final size in the first batch and
an input that does not fit fails at once. The plan depends on nothing but the chunk and the budget: the same chunk
gives the same batches again.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from jql_engine.data import Batch, Budget, TokenBatch


def plan_batches(tokens: TokenBatch, budget: Budget) -> Iterator[Batch]:
    """Yield batches that hold every document of `tokens` once.

    exact: documents of one length; padded: B * longest <= budget.tokens; packed: sum of lengths <= budget.tokens.
    With buckets a batch holds documents of one bucket, so the rectangle of a document follows from its own length.
    A document longer than the budget is a batch of its own; one longer than every bucket raises InputError.
    """
    lengths = tokens.lengths
    order = np.argsort(lengths, kind="stable")
    ascending = lengths[order]
    total = np.concatenate([[0], np.cumsum(ascending)])
    stop = len(order)
    while stop:
        longest = int(ascending[stop - 1])
        row_length = None if budget.layout == "packed" else budget.row_length(longest)
        if row_length is None:
            start = int(np.searchsorted(total, total[stop] - budget.tokens))
        else:
            start = max(stop - budget.max_docs(row_length), _first_of_its_kind(ascending, longest, budget))
        start = max(0, min(start, stop - 1))
        yield _gather(tokens, order[start:stop], row_length)
        stop = start


def _first_of_its_kind(ascending: NDArray[np.int64], longest: int, budget: Budget) -> int:
    """The first document that a batch whose longest has `longest` tokens may hold."""
    if budget.layout == "exact":
        return int(np.searchsorted(ascending, longest))
    shorter = [bucket for bucket in budget.buckets if bucket < longest]
    return int(np.searchsorted(ascending, shorter[-1], side="right")) if shorter else 0


def _gather(tokens: TokenBatch, index: NDArray[np.int64], row_length: int | None) -> Batch:
    starts, lengths = tokens.offsets[index], tokens.offsets[index + 1] - tokens.offsets[index]
    offsets = np.zeros(len(index) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    if len(index) == 1:
        ids = tokens.ids[starts[0] : starts[0] + lengths[0]]
    else:
        ids = tokens.ids[np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])]
    return Batch(tokens.rows[index], ids, offsets, row_length)
