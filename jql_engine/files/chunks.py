"""Chunks, the unit of work and of commit, and what stages of a job hand on of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from jql_engine.files.inputs import InputFile

# Opening and writing files takes its time: with more of them in a chunk, reading would be over before writing begins.
CHUNK_FILES = 100
# Of a chunk whose rows are copied with all of their columns, all of which count.
WHOLE_ROWS = 100_000
WHOLE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows [start, stop) of input file number `file`."""

    file: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        assert 0 <= self.start <= self.stop, self


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive rows of one large file, or several small files: the unit of work and of commit."""

    segments: tuple[Segment, ...]

    @property
    def n_docs(self) -> int:
        """Rows in all segments; row numbers run through the segments in order."""
        return sum(segment.stop - segment.start for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Piece:
    """A few consecutive rows of one chunk, as they were read."""

    segment: Segment
    first: int  # number of the first of the rows in the chunk
    texts: pa.DictionaryArray  # [N], distinct values of large_string; null where there is no text to score
    copied: tuple[pa.ChunkedArray, ...]  # [N] each, the columns that go into the output as they are
    n_invalid: int  # texts that are not UTF-8; null in `texts`


@dataclass(frozen=True, slots=True)
class Failure:
    """A segment of a chunk that could not be read."""

    segment: Segment
    message: str


@dataclass(frozen=True, slots=True)
class Task:
    """A chunk and its number in the job."""

    number: int
    chunk: Chunk


@dataclass(frozen=True, slots=True)
class ChunkEnd:
    """All of a chunk was read; follows its pieces."""

    task: Task
    failures: tuple[Failure, ...] = ()


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """How one stage spent its time."""

    busy: float
    starved: float  # waiting for input
    blocked: float  # waiting for room

    def __add__(self, other: StageSeconds) -> StageSeconds:
        return StageSeconds(self.busy + other.busy, self.starved + other.starved, self.blocked + other.blocked)

    def __sub__(self, other: StageSeconds) -> StageSeconds:
        return StageSeconds(self.busy - other.busy, self.starved - other.starved, self.blocked - other.blocked)


@dataclass(frozen=True, slots=True)
class ChunkDone:
    """What was done for one chunk; its scores are committed."""

    task: Task
    failures: tuple[Failure, ...] = ()
    documents: int = 0  # rows read, scored or not
    null_documents: int = 0  # rows without a text, invalid UTF-8 included
    invalid_utf8: int = 0
    truncated: int = 0
    tokens: int = 0
    padding: int = 0
    memory_bytes: int = 0  # the most that the worker's process has held so far
    stages: dict[str, StageSeconds] = field(default_factory=dict)  # since the chunk before
    overflowed: int = 0  # documents that overflowed fp16 and were recomputed in fp32


def split(files: Sequence[InputFile], chunk_rows: int, chunk_bytes: int) -> Iterator[Chunk]:
    """Cut large files into chunks and join small ones, in order.

    A chunk holds at most about `chunk_rows` rows, `chunk_bytes` of text and CHUNK_FILES files; the cut depends on the
    files' footers alone.
    """
    together: list[Segment] = []
    rows = size = 0
    for number, file in enumerate(files):
        pieces = list(_pieces(number, file, chunk_rows, chunk_bytes))
        n_rows, n_bytes = file.n_rows, sum(file.group_bytes)
        full = rows + n_rows > chunk_rows or size + n_bytes > chunk_bytes or len(together) == CHUNK_FILES
        if together and (len(pieces) > 1 or full):
            yield Chunk(tuple(together))
            together, rows, size = [], 0, 0
        if len(pieces) > 1:
            yield from (Chunk((piece,)) for piece in pieces)
        else:
            together += pieces
            rows, size = rows + n_rows, size + n_bytes
    if together:
        yield Chunk(tuple(together))


def _pieces(number: int, file: InputFile, chunk_rows: int, chunk_bytes: int) -> Iterator[Segment]:
    """Segments of one file: row groups joined while they fit in a chunk, cut where one alone does not."""
    start = stop = size = 0
    for n_rows, n_bytes in zip(file.group_rows, file.group_bytes, strict=True):
        n_parts = min(n_rows, max(1, -(-n_rows // chunk_rows), -(-n_bytes // chunk_bytes)))
        for part in range(n_parts):
            rows = n_rows * (part + 1) // n_parts - n_rows * part // n_parts
            if stop > start and (stop - start + rows > chunk_rows or size + n_bytes // n_parts > chunk_bytes):
                yield Segment(number, start, stop)
                start, size = stop, 0
            stop, size = stop + rows, size + n_bytes // n_parts
    yield Segment(number, start, stop)
