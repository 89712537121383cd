"""Ways to execute a graph: one file each. A session owns a loaded graph and says what a batch may hold."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from jql_engine.batching import plan_batches
from jql_engine.bundle import MANIFEST, Bundle
from jql_engine.cache import cache_folder
from jql_engine.data import Batch, BatchOutput, Budget, Layout, TokenBatch
from jql_engine.errors import BundleError, DeviceError

# Text of one chunk, the unit of commit: what a GPU scores in some seconds, two cores in about a minute.
CHUNK_BYTES = {"cpu": 512 << 10, "cuda": 32 << 20}
ON_GPU = ("cuda", "tensorrt")  # providers of GPUs
# Tokens of a batch of TensorRT's: larger ones keep the GPU busier and need more memory; to be measured on each GPU.
BATCH_TOKENS = 16384


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What a user may choose about TensorRT's engines."""

    folder: Path | None = None  # where those built here lie, instead of the user's cache folder
    build: bool = True  # False: one that fits must be there
    library: str | None = None  # tensorrt or tensorrt-rtx, None: the first installed
    batch_tokens: int = BATCH_TOKENS

    @property
    def cache(self) -> Path:
        """Folder of what is built and compiled here."""
        return self.folder or cache_folder("engines")


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """How a graph is loaded."""

    threads: int | None = None  # of the CPU; None: all cores this process may use
    engines: EngineOptions = field(default_factory=EngineOptions)  # of TensorRT


DEFAULTS = SessionOptions()

# On two cores ONNX Runtime is 6 % faster with a document on each than with both on one; but so many documents of the
# greatest length are in memory at once.
MAX_STREAMS = 4


def streams_of(threads: int | None) -> tuple[int, int]:
    """Batches at a time, and threads in all, for `threads` of the CPU (None: every core this process may use)."""
    n_threads = threads or len(os.sched_getaffinity(0))
    return (n_threads if n_threads <= MAX_STREAMS else 1), n_threads


class Session(Protocol):
    """A loaded graph, ready to run."""

    variant: str
    budget: Budget
    n_parallel: int  # threads that should call `run`

    @property
    def n_overflowed(self) -> int:
        """Documents that overflowed fp16 and were recomputed in fp32, so far."""
        ...

    @property
    def fallback(self) -> Fallback | None:
        """What recomputes them; None where no document overflows, or where nothing is more exact."""
        ...

    def run(self, batch: Batch) -> BatchOutput:
        """Compute one batch planned under `budget`; may be called from several threads."""
        ...


@dataclass(frozen=True, slots=True)
class Fallback:
    """The graph for documents that overflow fp16; each call of `open` loads it anew."""

    variant: str
    open: Callable[[], Session]


def check_options(bundle: Bundle, variant: str, options: SessionOptions) -> None:
    """Raise DeviceError for an option that a variant has no use for."""
    if bundle.manifest.variants[variant].provider == "tensorrt":
        return
    if options.engines != EngineOptions():
        raise DeviceError(f"variant {variant} does not run with TensorRT; leave out the options of its engines")


INPUTS: dict[Layout, frozenset[str]] = {
    "exact": frozenset({"input_ids"}),
    "padded": frozenset({"input_ids", "attention_mask"}),
}


def check_inputs(bundle: Bundle, variant: str, found: Collection[str], layouts: Sequence[Layout]) -> None:
    """Raise BundleError where a graph takes other inputs than those of the layout that the manifest says it has.

    `layouts`: those that the session can feed.
    """
    info = bundle.manifest.variants[variant]
    if info.layout not in layouts or INPUTS[info.layout] != set(found):
        raise BundleError(
            f"{bundle.path}: variant {variant} has layout {info.layout!r} and provider {info.provider!r} in "
            f"{MANIFEST}, its graph takes {', '.join(sorted(found))}; export the bundle again"
        )


def run_in_order(session: Session, tokens: TokenBatch, budget: Budget | None = None) -> BatchOutput:
    """What `tokens` compute to, one row a document, in their order; their rows count from 0."""
    assert np.array_equal(tokens.rows, np.arange(len(tokens.rows)))
    done = [(batch.rows, output) for batch, output in execute(session, tokens, budget)]
    order = np.argsort(np.concatenate([rows for rows, _ in done]))
    scores = np.concatenate([output.scores for _, output in done])[order]
    return BatchOutput(scores, np.concatenate([output.embeddings for _, output in done])[order])


AHEAD = 2  # batches queued besides those under way: neighbors differ in size, and none should wait for another


def execute(session: Session, tokens: TokenBatch, budget: Budget | None = None) -> Iterator[tuple[Batch, BatchOutput]]:
    """Yield every batch of `tokens`, planned under `budget` (None: the session's own), with what it computes to."""
    batches = plan_batches(tokens, budget or session.budget)
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
