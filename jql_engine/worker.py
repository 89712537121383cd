"""One worker: tasks in, committed chunks out; read | tokenise | execute | write, each in its thread."""

from __future__ import annotations

import resource
import threading
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from jql_engine.bundle import Bundle
from jql_engine.claim import Claim
from jql_engine.data import (
    Batch,
    ChunkDone,
    ChunkEnd,
    DocumentBatch,
    Piece,
    ScoreBatch,
    Scores,
    Segment,
    StageSeconds,
    Task,
    TokenBatch,
)
from jql_engine.dataset import InputFile
from jql_engine.execution import execute
from jql_engine.output import Target
from jql_engine.parity import open_certified
from jql_engine.pipeline import StageTime, pipeline
from jql_engine.reading import read
from jql_engine.sessions import Session, SessionOptions
from jql_engine.sessions.choice import Choice
from jql_engine.tokens import Tokenizer

T = TypeVar("T")
TOGETHER_BYTES = 4 << 20  # text in one call of the tokenizer
WRITERS = 8  # small files written at once: creating one waits for the disk, or for the network
STAGES = ("read", "tokenise", "execute", "write")


@dataclass(frozen=True, slots=True)
class Scoring:
    """What a process needs to score chunks; see jql_engine.pool.Spec."""

    bundle: Bundle
    device: str
    choice: Choice
    options: SessionOptions
    embeddings: np.dtype[Any] | None
    claim: Claim

    def open(
        self,
        targets: Mapping[int, Target],
        stop: threading.Event,
        executed: Callable[[int, int, int], None],
        say: Callable[[str], None],
    ) -> Callable[[Iterable[Task]], Generator[ChunkDone]]:
        """Load the graph; see jql_engine.pool.Spec."""
        self.bundle.check_still_there()
        session = open_certified(self.bundle, self.choice, self.device, self.options, say)
        tokenizer = Tokenizer.of(self.bundle)

        def count(batch: Batch) -> None:
            executed(len(batch.rows), batch.n_tokens, batch.n_padding)

        return Worker(self.bundle, session, tokenizer, targets, self.claim, self.embeddings, stop, count).run


@dataclass(frozen=True, slots=True)
class Worker:
    """What scoring a chunk needs."""

    bundle: Bundle
    session: Session
    tokenizer: Tokenizer
    targets: Mapping[int, Target]  # by the number of the file; may change while tasks come
    claim: Claim
    embeddings: np.dtype[Any] | None = None  # the type in which embeddings are kept
    stop: threading.Event = field(default_factory=threading.Event)  # set: finish the chunk in hand and no other
    executed: Callable[[Batch], None] = lambda _: None  # told of every batch

    def run(self, tasks: Iterable[Task]) -> Generator[ChunkDone]:
        """Score the chunks of `tasks` and commit them; yield each once it is done.

        Raises OutputError where the output cannot be written; a file that cannot be read is named in its ChunkDone.
        """
        clocks = [StageTime(name) for name in STAGES]
        steps = (self._read, self._tokenise, self._execute, self._write)
        lap = dict.fromkeys(STAGES, StageSeconds(0, 0, 0))
        for item in pipeline(tasks, list(zip(clocks, steps, strict=True))):
            now = {clock.name: clock.seconds() for clock in clocks}
            yield item.done({name: now[name] - lap[name] for name in STAGES})
            lap = now

    def _read(self, tasks: Iterator[Task]) -> Iterator[Piece | ChunkEnd]:
        return read(_Files(self.targets), self._until_stopped(tasks))

    def _tokenise(self, items: Iterator[Piece | ChunkEnd]) -> Iterator[_Chunk]:
        pieces: list[Piece] = []
        waiting: list[DocumentBatch] = []  # together, so that the tokenizer's threads get enough to do
        tokens: list[TokenBatch] = []
        size = 0
        for item in items:
            if isinstance(item, Piece):
                pieces.append(item)
                waiting.append(item.documents)
                size += item.documents.texts.nbytes
            if waiting and (isinstance(item, ChunkEnd) or size > TOGETHER_BYTES):
                tokens.append(self.tokenizer.encode(DocumentBatch.concat(waiting)))
                waiting, size = [], 0
            if isinstance(item, ChunkEnd):
                yield _Chunk.of(item, pieces, TokenBatch.concat(tokens))
                pieces, tokens = [], []

    def _execute(self, chunks: Iterator[_Chunk]) -> Iterator[tuple[_Chunk, ScoreBatch]]:
        keep = None if self.embeddings is None else (self.bundle.manifest.encoder.hidden_size, self.embeddings)
        for chunk in self._until_stopped(chunks):
            scores = ScoreBatch.empty(chunk.tokens, len(self.bundle.heads), keep)
            overflowed = self.session.n_overflowed
            for batch, output in execute(self.session, chunk.tokens):
                scores.put(batch.rows, output)
                chunk.padding += batch.n_padding
                self.executed(batch)
            chunk.overflowed = self.session.n_overflowed - overflowed
            yield chunk, scores

    def _write(self, items: Iterator[tuple[_Chunk, ScoreBatch]]) -> Iterator[_Chunk]:
        with ThreadPoolExecutor(WRITERS, thread_name_prefix="write") as pool:
            for chunk, scores in items:
                table = Scores.spread(scores, self.bundle.heads, chunk.end.task.chunk.n_docs).to_table()

                def commit(place: tuple[Segment, int], chunk: _Chunk = chunk, table: pa.Table = table) -> None:
                    segment, first = place
                    rows = table.slice(first, segment.stop - segment.start)
                    self.targets[segment.file].commit(segment, rows, chunk.ids.get(segment))

                self.claim.check()
                list(pool.map(commit, chunk.segments()))
                yield chunk

    def _until_stopped(self, items: Iterator[T]) -> Iterator[T]:
        for item in items:
            if self.stop.is_set():
                return
            yield item


@dataclass(frozen=True, slots=True)
class _Files:
    """The input files of targets."""

    targets: Mapping[int, Target]

    def __getitem__(self, number: int, /) -> InputFile:
        return self.targets[number].file


@dataclass(slots=True)
class _Chunk:
    """A chunk between its stages."""

    end: ChunkEnd
    tokens: TokenBatch
    ids: dict[Segment, pa.ChunkedArray]
    n_invalid: int
    padding: int = 0
    overflowed: int = 0

    @classmethod
    def of(cls, end: ChunkEnd, pieces: Sequence[Piece], tokens: TokenBatch) -> _Chunk:
        """Join what was read, less the segments that failed on the way."""
        failed = {failure.segment for failure in end.failures}
        for piece in pieces:
            if piece.segment in failed:
                tokens = tokens.without(piece.documents.rows)
        kept = [piece for piece in pieces if piece.segment not in failed]
        ids: dict[Segment, list[pa.Array]] = defaultdict(list)
        for piece in kept:
            ids[piece.segment] += [] if piece.ids is None else piece.ids.chunks
        joined = {segment: pa.chunked_array(chunks) for segment, chunks in ids.items() if chunks}
        return cls(end, tokens, joined, sum(piece.n_invalid for piece in kept))

    def segments(self) -> Iterator[tuple[Segment, int]]:
        """Every segment that was read whole, and the number of its first row in the chunk."""
        failed = {failure.segment for failure in self.end.failures}
        first = 0
        for segment in self.end.task.chunk.segments:
            if segment not in failed:
                yield segment, first
            first += segment.stop - segment.start

    def done(self, stages: dict[str, StageSeconds]) -> ChunkDone:
        """The figures."""
        n_docs = sum(segment.stop - segment.start for segment, _ in self.segments())
        return ChunkDone(
            self.end.task,
            self.end.failures,
            documents=n_docs,
            null_documents=n_docs - len(self.tokens.rows),
            invalid_utf8=self.n_invalid,
            truncated=int(self.tokens.truncated.sum()),
            tokens=len(self.tokens.ids),
            padding=self.padding,
            memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            stages=stages,
            overflowed=self.overflowed,
        )
