"""One worker: tasks in, committed chunks out; read | tokenize | execute | write, each in its thread."""

from __future__ import annotations

import resource
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jql_engine.bundle import Bundle
from jql_engine.data import ScoreBatch, Scores
from jql_engine.errors import InputError
from jql_engine.files.chunks import Chunk, ChunkDone, ChunkEnd, Failure, Piece, Segment, StageSeconds, Task
from jql_engine.files.dictionaries import Column
from jql_engine.files.output import OutputFile
from jql_engine.files.reading import read
from jql_engine.job.claim import Claim
from jql_engine.job.distinct import ChunkDocuments, DistinctDocuments
from jql_engine.job.pipeline import Stage, in_laps
from jql_engine.sessions.base import Session, SessionOptions, execute
from jql_engine.sessions.open import open_session
from jql_engine.sessions.select import Choice
from jql_engine.tokenizer import Tokenizer
from jql_engine.windows import Windows

WRITERS = 16  # small files written at once: creating one waits for the disk, or for the network


@dataclass(frozen=True, slots=True)
class Scoring:
    """What a process needs to score chunks; see jql_engine.job.pool.Spec."""

    bundle: Bundle
    device: str
    choice: Choice
    options: SessionOptions
    embeddings: np.dtype[Any] | None
    claim: Claim

    def open(
        self,
        outputs: Mapping[int, OutputFile],
        stop: threading.Event,
        executed: Callable[[int, int, int], None],
        say: Callable[[str], None],
    ) -> Callable[[Iterable[Task]], Generator[ChunkDone]]:
        """Load the graph; see jql_engine.job.pool.Spec."""
        self.bundle.check_still_there()
        session = open_session(self.bundle, self.choice, self.device, self.options, say)
        tokenizer = Tokenizer.of(self.bundle)
        return Worker(self.bundle, session, tokenizer, outputs, self.claim, self.embeddings, stop, executed).run


@dataclass(frozen=True, slots=True)
class Worker:
    """What scoring a chunk needs."""

    bundle: Bundle
    session: Session
    tokenizer: Tokenizer
    outputs: Mapping[int, OutputFile]  # by the number of the file; may change while tasks come
    claim: Claim
    embeddings: np.dtype[Any] | None = None  # the type in which embeddings are kept
    stop: threading.Event = field(default_factory=threading.Event)  # set: finish the chunk in hand and no other
    # Told of every batch: rows that have its documents, tokens of all of these rows, padding that was computed.
    executed: Callable[[int, int, int], None] = lambda *_: None

    @property
    def windows(self) -> Windows:
        """How long documents are cut."""
        return Windows.of(self.bundle)

    def run(self, tasks: Iterable[Task]) -> Generator[ChunkDone]:
        """Score the chunks of `tasks` and commit them; yield each once it is done.

        Raises OutputError where the output cannot be written; a file that cannot be read is named in its ChunkDone.
        """
        steps: dict[str, Stage] = {
            "read": self._read,
            "tokenize": self._tokenize,
            "execute": self._execute,
            "write": self._write,
        }
        for item, stages in in_laps(tasks, steps):
            yield item.done(stages)

    def _read(self, tasks: Iterator[Task]) -> Iterator[Piece | ChunkEnd]:
        until_stopped = takewhile(lambda _: not self.stop.is_set(), tasks)
        return read(lambda number: self.outputs[number].file, until_stopped)

    def _tokenize(self, items: Iterator[Piece | ChunkEnd]) -> Iterator[DistinctDocuments | _Chunk]:
        """The distinct documents of each chunk, in slices, then what else is kept of it."""
        chunk = _ChunkInHand(self.tokenizer)
        for item in items:
            if isinstance(item, Piece):
                yield from chunk.add(item)
            else:
                yield from chunk.finish(item)
                chunk = _ChunkInHand(self.tokenizer)

    def _execute(self, items: Iterator[DistinctDocuments | _Chunk]) -> Iterator[tuple[_Chunk, ScoreBatch]]:
        parts: list[ScoreBatch] = []  # of the chunk in hand
        padding, overflowed = 0, self.session.n_overflowed
        for item in items:
            if self.stop.is_set() and not parts:
                return
            if isinstance(item, DistinctDocuments):
                scores, n_padding = self._score(item)
                parts.append(scores)
                padding += n_padding
                continue
            item.padding, item.overflowed = padding, self.session.n_overflowed - overflowed
            yield item, ScoreBatch.concat(parts)
            parts, padding, overflowed = [], 0, self.session.n_overflowed

    def _score(self, documents: DistinctDocuments) -> tuple[ScoreBatch, int]:
        """Scores of `documents`, and the padding that was computed."""
        keep = None if self.embeddings is None else (self.bundle.manifest.encoder.hidden_size, self.embeddings)
        windows = self.windows.cut(documents.tokens)
        scores, padding = ScoreBatch.empty(windows.tokens, len(self.bundle.heads), keep), 0
        for batch, output in execute(self.session, windows.tokens):
            scores.put(batch.rows, output)
            padding += batch.n_padding
            n_rows = documents.n_rows[windows.document[batch.rows]]
            n_docs = int(n_rows[windows.is_first[batch.rows]].sum())
            self.executed(n_docs, int(n_rows @ np.diff(batch.offsets)), batch.n_padding)
        return self.windows.merge(documents.tokens, windows, scores), padding

    def _write(self, items: Iterator[tuple[_Chunk, ScoreBatch]]) -> Iterator[_Chunk]:
        with ThreadPoolExecutor(WRITERS, thread_name_prefix="write") as pool:
            for chunk, batch in items:
                scores = Scores.of_documents(batch, self.bundle.heads, chunk.index, chunk.truncated)
                chunk.tokens = int(scores.n_tokens.sum())
                table = scores.to_table()

                def commit(
                    place: tuple[Segment, int], chunk: _Chunk = chunk, table: pa.Table = table
                ) -> Failure | None:
                    segment, first = place
                    rows = table.slice(first, segment.stop - segment.start)
                    self.claim.check()
                    try:
                        self.outputs[segment.file].commit(segment, rows, chunk.copied.get(segment, ()))
                        return None
                    except InputError as error:
                        return Failure(segment, str(error))

                failures = [failure for failure in pool.map(commit, chunk.segments()) if failure is not None]
                chunk.end = replace(chunk.end, failures=(*chunk.end.failures, *failures))
                yield chunk


class _ChunkInHand:
    """What is kept of a chunk's pieces while they come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._documents = ChunkDocuments(tokenizer)
        self._copied: dict[Segment, tuple[Column, ...]] = {}
        self._n_invalid: Counter[Segment] = Counter()

    def add(self, piece: Piece) -> Iterator[DistinctDocuments]:
        kept = self._copied.setdefault(piece.segment, tuple(Column() for _ in piece.copied))
        for column, part in zip(kept, piece.copied, strict=True):
            column.add(part)
        self._n_invalid[piece.segment] += piece.n_invalid
        return self._documents.add(piece.first, piece.texts)

    def finish(self, end: ChunkEnd) -> Iterator[DistinctDocuments | _Chunk]:
        """The rest, less the segments that failed on the way."""
        failed = {failure.segment for failure in end.failures}
        places = list(_places(end.task.chunk))
        dropped = [slice(first, first + s.stop - s.start) for s, first in places if s in failed]
        yield self._documents.finish(end.task.chunk.n_docs, dropped)
        copied = {segment: [column.rows() for column in columns] for segment, columns in self._copied.items()}
        n_invalid = sum(n for segment, n in self._n_invalid.items() if segment not in failed)
        yield _Chunk(end, self._documents.index, self._documents.truncated, copied, n_invalid)


@dataclass(slots=True)
class _Chunk:
    """A chunk between its stages."""

    end: ChunkEnd
    index: NDArray[np.int64]  # [n]: which of the chunk's distinct documents each row has, -1 for none
    truncated: NDArray[np.bool_]  # [n]
    copied: dict[Segment, list[pa.ChunkedArray]]
    n_invalid: int
    padding: int = 0
    overflowed: int = 0
    tokens: int = 0  # of all rows

    def segments(self) -> Iterator[tuple[Segment, int]]:
        """Every segment that was read whole, and the number of its first row in the chunk."""
        failed = {failure.segment for failure in self.end.failures}
        return ((segment, first) for segment, first in _places(self.end.task.chunk) if segment not in failed)

    def done(self, stages: dict[str, StageSeconds]) -> ChunkDone:
        """The record of a chunk that is committed."""
        rows = [slice(first, first + segment.stop - segment.start) for segment, first in self.segments()]
        n_docs = sum(part.stop - part.start for part in rows)
        return ChunkDone(
            self.end.task,
            self.end.failures,
            documents=n_docs,
            null_documents=sum(int((self.index[part] < 0).sum()) for part in rows),
            invalid_utf8=self.n_invalid,
            truncated=sum(int(self.truncated[part].sum()) for part in rows),
            tokens=self.tokens,
            padding=self.padding,
            memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            stages=stages,
            overflowed=self.overflowed,
        )


def _places(chunk: Chunk) -> Iterator[tuple[Segment, int]]:
    """The segments of a chunk, and the number of the first row of each."""
    first = 0
    for segment in chunk.segments:
        yield segment, first
        first += segment.stop - segment.start
