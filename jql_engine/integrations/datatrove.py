"""datatrove: JQLAnnotator with the arguments of the JQL annotation pipeline's own."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.writers.disk_base import DiskWriter

from jql_engine.bundle import Bundle
from jql_engine.data import Scores, score_column
from jql_engine.engine import Engine
from jql_engine.errors import InputError
from jql_engine.integrations.export_cache import exported
from jql_engine.sessions.select import choose

SNOWFLAKE = "Snowflake/snowflake-arctic-embed-m-v2.0"
# Scored together, and so sorted by length, whatever batch_size says; a buffer closes past either.
BUFFER_DOCUMENTS = 4_096
BUFFER_CHARACTERS = 16 << 20


def stats_adapter(writer: DiskWriter, document: Document, expand_metadata: bool = True) -> dict[str, Any]:
    """What a stats writer stores of a document: everything but its text; an `adapter` of datatrove's writers."""
    kept = {key: value for key, value in dataclasses.asdict(document).items() if value and key != "text"}
    if expand_metadata and writer.expand_metadata:
        kept |= kept.pop("metadata", {})
    return kept


class JQLAnnotator(PipelineStep):  # type: ignore[misc]  # datatrove is untyped
    """Adds `score_<head>` to the metadata of every document and passes all of them on, in order.

    And `n_windows`, where the bundle scores several windows of a long document.
    """

    name = "📊 Score"
    type = "🔢 - JQL-ANNOTATOR"

    def __init__(
        self,
        embedder_model_id: str = SNOWFLAKE,
        regression_head_checkpoints: dict[str, str] | None = None,
        batch_size: int = 1_000,
        device_overwrite: str | None = None,
        stats_writer: DiskWriter | None = None,
        bundle: str | Path | None = None,
        threads: int | None = None,
        variant: str | None = None,
        tolerance: float | None = None,
    ) -> None:
        """`bundle` takes the place of model and heads; without it they are exported once (integrations.export_cache).

        `device_overwrite`: "cpu", "cuda", "cuda:0" or "0"; without it the ranks spread over the GPUs, or use the CPU.
        `batch_size` can only make the buffer larger; `threads` are the CPU threads of one task; `variant` and
        `tolerance` decide about the graph as they do for Engine. A document without a score (no text, or no Unicode)
        gets None.
        """
        super().__init__()
        self.embedder_model_id, self.regression_head_checkpoints = embedder_model_id, regression_head_checkpoints
        self.batch_size, self.device_overwrite, self.stats_writer = batch_size, device_overwrite, stats_writer
        self.bundle, self.threads, self.variant, self.tolerance = bundle, threads, variant, tolerance

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> Iterator[Document]:  # noqa: ARG002
        """Score `data`; see PipelineStep."""
        engine = self._engine(rank)
        with self.stats_writer or nullcontext() as writer, ThreadPoolExecutor(1) as pool:
            for documents, scores in self._scored(engine, data, pool):
                for document, values in zip(documents, _values(scores), strict=True):
                    document.metadata.update(values)
                    if writer is not None:
                        writer.write(document, rank)
                    yield document

    def _engine(self, rank: int) -> Engine:
        bundle = Bundle.open(self.bundle or exported(self.embedder_model_id, self.regression_head_checkpoints))
        wanted = self.device_overwrite or "auto"
        wanted = f"cuda:{wanted}" if wanted.isdigit() else wanted
        devices = choose(bundle, wanted, self.variant, self.tolerance).devices
        return Engine(bundle, devices[rank % len(devices)], self.variant, self.threads, self.tolerance)

    def _scored(
        self, engine: Engine, data: DocumentsPipeline, pool: ThreadPoolExecutor
    ) -> Iterator[tuple[list[Document], Scores]]:
        """Buffers with their scores, the next buffer read while one is computed."""
        running: deque[tuple[list[Document], Future[Scores]]] = deque()
        for documents in self._buffers(data):
            texts = [_text(document) for document in documents]
            running.append((documents, pool.submit(engine.score, texts, _columns(engine.bundle, documents))))
            if len(running) > 1:
                yield self._finished(*running.popleft())
        while running:
            yield self._finished(*running.popleft())

    def _finished(self, documents: list[Document], scores: Future[Scores]) -> tuple[list[Document], Scores]:
        with self.track_time(unit="batch"):
            return documents, scores.result()

    def _buffers(self, data: DocumentsPipeline) -> Iterator[list[Document]]:
        buffer: list[Document] = []
        size = 0
        for document in data or ():
            buffer.append(document)
            size += len(document.text or "")
            if len(buffer) >= max(self.batch_size, BUFFER_DOCUMENTS) or size >= BUFFER_CHARACTERS:
                yield buffer
                buffer, size = [], 0
        if buffer:
            yield buffer


def _text(document: Document) -> str | None:
    return _unicode(document.text)


def _columns(bundle: Bundle, documents: list[Document]) -> dict[str, list[str | None]]:
    """What the bundle's template needs beside the texts, from the documents' metadata; InputError for a missing key."""
    names = () if bundle.template is None else bundle.template.columns
    for document in documents:
        if missing := set(names) - document.metadata.keys():
            found = ", ".join(document.metadata) or "nothing"
            raise InputError(f"document {document.id!r}: the template needs metadata {min(missing)!r}, found {found}")
        for name in names:
            if not isinstance(value := document.metadata[name], str | None):
                kind = type(value).__name__
                raise InputError(f"document {document.id!r}: metadata {name!r} is a {kind}; the template needs text")
    return {name: [_unicode(document.metadata[name]) for document in documents] for name in names}


def _unicode(text: str | None) -> str | None:
    """`text`, or None for a lone surrogate, which is no text."""
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        return None
    return text


def _values(scores: Scores) -> Iterator[dict[str, float | int | None]]:
    names = [score_column(head) for head in scores.heads]
    n_windows = [None] * len(scores.values) if scores.n_windows is None else scores.n_windows.tolist()
    for row, valid, n in zip(scores.values.tolist(), scores.valid.tolist(), n_windows, strict=True):
        values = dict(zip(names, row if valid else [None] * len(names), strict=True))
        yield values if scores.n_windows is None else values | {"n_windows": n if valid else None}
