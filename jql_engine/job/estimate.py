"""A job before it runs: a sample of it is tokenized, a few seconds of that are computed, nothing is written."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jql_engine.bundle import Bundle
from jql_engine.data import DocumentBatch, TokenBatch
from jql_engine.files.inputs import InputFile
from jql_engine.files.reading import Cursor, documents
from jql_engine.job.plan import Job
from jql_engine.job.scoring import open_inputs
from jql_engine.printing import say
from jql_engine.sessions.base import Session, execute
from jql_engine.tokenizer import Tokenizer
from jql_engine.windows import Windows

PLACES = 24  # from which documents are read
DOCUMENTS = 256  # read from each
PROBE_SECONDS = 5.0
WARM_UP = 2  # documents


def estimate_work(
    job: Job, bundle: Bundle, session: Session, n_workers: int, price_per_hour: float | None
) -> dict[str, Any]:
    """Documents, tokens, hours and cost of `job`, or of its rank's share, from a sample; raises InputError.

    Speed is that of `session` on documents drawn at random from the sample, times `n_workers`.
    """
    files, unreadable = open_inputs(job, bundle)
    for one in unreadable:
        say(f"jql: {one.reason}; it is left out of what follows")
    if job.rank.world_size > 1:
        say(f"jql: of the share of rank {job.rank.rank} of {job.rank.world_size} ({job.rank.said_by}) alone")
    n_docs = sum(file.n_rows for file in files)
    tokens, n_sampled = _sample(files, Tokenizer.of(bundle))
    lengths, windows = tokens.lengths, Windows.of(bundle).cut(tokens).tokens
    mean = float(windows.lengths.sum()) / max(1, n_sampled)  # a null text has no tokens
    speed = _probe(session, windows) * n_workers
    hours = n_docs * mean / speed / 3600 if speed else 0.0
    return {
        "files": len(files),
        "unreadable_files": len(unreadable),
        "documents": n_docs,
        "tokens": round(n_docs * mean),
        "sampled_documents": n_sampled,
        "mean_tokens": round(mean, 1),
        "median_tokens": _quantile(lengths, 0.5),
        "p99_tokens": _quantile(lengths, 0.99),
        "truncated_share": round(float(tokens.truncated.sum()) / max(1, n_sampled), 5),
        "tokens_per_second": round(speed, 1),
        "workers": n_workers,
        "rank": job.rank.rank,
        "world_size": job.rank.world_size,
        "hours": round(hours, 4),
        "cost": None if price_per_hour is None else round(hours * price_per_hour, 2),
        "variant": session.variant,
        "bundle": bundle.hash,
    }


def _sample(files: Sequence[InputFile], tokenizer: Tokenizer) -> tuple[TokenBatch, int]:
    """Documents from all over the files, and how many were read."""
    batches, n_sampled = [], 0
    cursor: Cursor | None = None
    for file, start, n_rows in _places(files):
        if cursor is None or cursor.file is not file:
            cursor = Cursor(file, start, file.columns.needed)
        cursor.skip(start - cursor.row)
        for batch in cursor.take(n_rows):
            for texts, _ in documents(pa.Table.from_batches([batch]), file.columns):
                rows = texts.indices.drop_null().to_numpy().astype(np.int64)
                batches.append(tokenizer.encode(DocumentBatch.of(texts.dictionary)).take(rows))
        n_sampled += n_rows
    tokens = TokenBatch.concat(batches)
    return replace(tokens, rows=np.arange(len(tokens.rows))), n_sampled


def _places(files: Sequence[InputFile]) -> Iterator[tuple[InputFile, int, int]]:
    """Files, first rows and numbers of rows: up to DOCUMENTS from each of PLACES, evenly spaced over all rows."""
    firsts = [0, *accumulate(file.n_rows for file in files)]
    spacing = max(1, firsts[-1] // PLACES)
    for place in range(0, firsts[-1], spacing):
        row, stop = place, min(place + min(DOCUMENTS, spacing), firsts[-1])
        while row < stop:
            number = bisect_right(firsts, row) - 1
            n_rows = min(stop, firsts[number + 1]) - row
            yield files[number], row - firsts[number], n_rows
            row += n_rows


def _probe(session: Session, tokens: TokenBatch) -> float:
    """Tokens per second on documents in random order, for about PROBE_SECONDS."""
    order = np.random.default_rng(0).permutation(len(tokens.rows))
    if not len(order):
        return 0.0
    _compute(session, tokens, order[:WARM_UP])
    # Enough that a document is under way on every core all the time.
    done, began, size = 0, time.monotonic(), 1 if session.n_parallel == 1 else 8 * session.n_parallel
    for _ in range(len(order)):
        index, order = order[:size], order[size:]
        if not len(index):
            break
        done += _compute(session, tokens, index)
        seconds = time.monotonic() - began
        if seconds > PROBE_SECONDS:
            break
        size = 2 * size if seconds < PROBE_SECONDS / 4 else size
    return done / (time.monotonic() - began)


def _compute(session: Session, tokens: TokenBatch, index: NDArray[np.int64]) -> int:
    part = tokens.take(np.sort(index))
    for _ in execute(session, part):
        pass
    return len(part.ids)


def _quantile(lengths: NDArray[np.int64], q: float) -> int:
    return int(np.quantile(lengths, q)) if len(lengths) else 0
