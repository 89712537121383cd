"""The bulk job: read | tokenise | execute | write, each in its thread, over bounded queues.

Reading, tokenising and executing release the interpreter's lock, so threads are enough. Queues hold one chunk each:
memory does not grow with the input.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from jql_engine.batching import plan
from jql_engine.bundle import Bundle
from jql_engine.data import ScoreBatch, Scores, TokenBatch
from jql_engine.dataset import ChunkDocuments, InputFile, find_files, open_file, read, split
from jql_engine.output import ScoreWriter, check_output, is_finished
from jql_engine.progress import Meter, Summary
from jql_engine.sessions import Session
from jql_engine.tokens import Tokenizer

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Job:
    """What to score, and where to."""

    inputs: tuple[str, ...]
    out: Path
    text_column: str = "text"
    id_column: str | None = None
    overwrite: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """The files of a job that are left to do, and the settings that go into each output."""

    files: list[InputFile]
    settings: list[dict[str, Any]]
    n_finished: int


def prepare(job: Job, bundle: Bundle, variant: str) -> Work:
    """Find and check all inputs and the output folder before anything is computed; raises InputError, OutputError."""
    files = [open_file(path, relative, job.text_column, job.id_column) for path, relative in find_files(job.inputs)]
    check_output(job.out, job.inputs, files, bundle.heads)
    settings = [_settings(job, bundle, variant, file) for file in files]
    left = [
        (file, setting)
        for file, setting in zip(files, settings, strict=True)
        if job.overwrite or not is_finished(job.out / file.relative, setting)
    ]
    return Work([file for file, _ in left], [setting for _, setting in left], len(files) - len(left))


def run(job: Job, bundle: Bundle, session: Session, tokenizer: Tokenizer, work: Work) -> Summary:
    """Score all files of `work`; raises an EngineError where a file cannot be read or written."""
    meter = Meter(total=sum(file.n_rows for file in work.files))
    writer = ScoreWriter(job.out, work.files, bundle.heads, work.settings)
    chunks = list(split(work.files))

    def tokenise(documents: ChunkDocuments) -> tuple[ChunkDocuments, TokenBatch]:
        return documents, tokenizer.encode(documents.documents)

    def execute(item: tuple[ChunkDocuments, TokenBatch]) -> tuple[ChunkDocuments, ScoreBatch]:
        documents, tokens = item
        meter.counts.null_documents += documents.chunk.n_docs - len(tokens.rows)
        scores = ScoreBatch.empty(tokens, len(bundle.heads))
        for batch in plan(tokens, session.budget):
            scores.put(batch.rows, session.run(batch).scores)
            meter.executed(batch)
        return documents, scores

    stages = _ahead(execute, _ahead(tokenise, _ahead(_same, read(work.files, chunks))))
    try:
        for documents, scores in stages:
            spread = Scores.spread(scores, bundle.heads, documents.chunk.n_docs)
            writer.put(documents.chunk, spread.to_table(), documents.ids)
            meter.counts.documents += len(spread)
            meter.counts.invalid_utf8 += documents.n_invalid
            meter.counts.truncated += int(spread.truncated.sum())
    finally:
        stages.close()
        writer.close()
        meter.close()
    meter.counts.files, meter.counts.skipped_files = len(work.files), work.n_finished
    return meter.summary(session.variant, bundle.hash)


def _settings(job: Job, bundle: Bundle, variant: str, file: InputFile) -> dict[str, Any]:
    status = file.path.stat()
    return {
        "bundle": bundle.hash,
        "variant": variant,
        "precision": bundle.manifest.variants[variant].precision,
        "text_column": job.text_column,
        "id_column": file.id_column,
        "source_bytes": status.st_size,
        "source_modified_ns": status.st_mtime_ns,
        "jql_engine": version("jql-engine"),
    }


def _same(item: T) -> T:
    return item


def _ahead(function: Callable[[Any], T], items: Iterable[Any]) -> Generator[T]:
    """Like map(function, items), computed in a thread of its own, one item ahead of its consumer.

    An exception comes out where the result would have; closing the generator ends the thread and closes `items`.
    """
    results: queue.Queue[Future[T] | None] = queue.Queue(maxsize=1)
    stop = threading.Event()
    thread = threading.Thread(target=_feed, args=(function, items, results, stop), daemon=True)
    thread.start()
    try:
        while (result := results.get()) is not None:
            yield result.result()
    finally:
        stop.set()
        thread.join()


def _feed(
    function: Callable[[Any], T], items: Iterable[Any], results: queue.Queue[Future[T] | None], stop: threading.Event
) -> None:
    """Offer a settled future for every item, then None; after an exception nothing but that."""
    try:
        for item in items:
            result: Future[T] = Future()
            result.set_result(function(item))
            _offer(result, results, stop)
            if stop.is_set():
                break
        _offer(None, results, stop)
    except BaseException as error:  # whatever it is, the consumer must see it
        failed: Future[T] = Future()
        failed.set_exception(error)
        _offer(failed, results, stop)
    finally:
        if isinstance(items, Generator):
            items.close()


def _offer(result: Future[T] | None, results: queue.Queue[Future[T] | None], stop: threading.Event) -> None:
    """Put, waiting for room until nobody wants it any more."""
    while not stop.is_set():
        try:
            results.put(result, timeout=0.1)
            return
        except queue.Full:
            continue
