"""Tokens through a session: batches planned, several computed at a time where that is faster, given back in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from jql_engine.batching import plan
from jql_engine.data import Batch, BatchOutput, Budget, TokenBatch
from jql_engine.sessions import Session

AHEAD = 2  # batches queued besides those under way: neighbours differ in size, and none should wait for another


def execute(session: Session, tokens: TokenBatch, budget: Budget | None = None) -> Iterator[tuple[Batch, BatchOutput]]:
    """Yield every batch of `tokens`, planned under `budget` (None: the session's own), with what it computes to."""
    batches = plan(tokens, budget or session.budget)
    if session.n_parallel == 1:
        for batch in batches:
            yield batch, session.run(batch)
        return
    running: deque[tuple[Batch, Future[BatchOutput]]] = deque()
    pool = ThreadPoolExecutor(session.n_parallel, thread_name_prefix="batch")
    try:
        for batch in batches:
            running.append((batch, pool.submit(session.run, batch)))
            if len(running) >= session.n_parallel + AHEAD:
                done, output = running.popleft()
                yield done, output.result()
        while running:
            done, output = running.popleft()
            yield done, output.result()
    finally:  # an error, or nobody wants the rest: what has not begun never will
        pool.shutdown(cancel_futures=True)
