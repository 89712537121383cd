"""Tasks -> pieces of text: each file once from front to back, again from where it broke off if a network fails."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jql_engine.errors import InputError
from jql_engine.files.chunks import ChunkEnd, Failure, Piece, Segment, Task
from jql_engine.files.dictionaries import compact, cuts, encode, lengths_of
from jql_engine.files.formats import batches, unreadable
from jql_engine.files.inputs import READ_BYTES, Columns, InputFile, SourceFile
from jql_engine.files.parquet import READ_ROWS
from jql_engine.files.retries import retry
from jql_engine.files.versions import check_version, exchanged, is_exchange, version_of
from jql_engine.template import TEXT

FILES_AHEAD = 8
FILLED_BYTES = 32 << 20  # of documents that a template was filled for, at a time
FileOf: TypeAlias = Callable[[int], InputFile]
Begin: TypeAlias = Callable[[], Iterable[Piece]]


def read(file_of: FileOf, tasks: Iterable[Task]) -> Iterator[Piece | ChunkEnd]:
    """Yield the pieces of each task's chunk, then its end; `file_of` gives an input file by its number.

    A segment that cannot be read is named at the end of its chunk, and nothing more is read of its file.
    """
    pool = ThreadPoolExecutor(FILES_AHEAD, thread_name_prefix="open")
    in_order = _InOrder(file_of)
    failed: dict[int, Failure] = {}
    try:
        for task in tasks:
            segments, failures = task.chunk.segments, []
            for segment, begin in in_order.one(*segments) if len(segments) == 1 else _ahead(file_of, segments, pool):
                try:
                    if segment.file in failed:
                        raise InputError(failed[segment.file].message)
                    yield from begin()
                except InputError as error:
                    failures.append(Failure(segment, str(error)))
                    failed[segment.file] = failures[-1]
            yield ChunkEnd(task, tuple(failures))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # one may sleep between two attempts


class _InOrder:
    """Segments of large files one by one: the next goes on where the last one ended."""

    def __init__(self, file_of: FileOf) -> None:
        self._file_of = file_of
        self._cursor: Cursor | None = None

    def one(self, segment: Segment) -> Iterator[tuple[Segment, Begin]]:
        yield segment, partial(self._pieces, segment)

    def _pieces(self, segment: Segment) -> Iterator[Piece]:
        file, cursor = self._file_of(segment.file), self._cursor
        if cursor is None or cursor.file is not file or cursor.row > segment.start:
            cursor = Cursor(file, segment.start, file.columns.needed)
        self._cursor = None
        cursor.skip(segment.start - cursor.row)
        yield from _pieces(cursor, segment, 0)
        self._cursor = cursor


def _ahead(file_of: FileOf, segments: Sequence[Segment], pool: ThreadPoolExecutor) -> Iterator[tuple[Segment, Begin]]:
    """Segments of small files in their order, the next FILES_AHEAD being opened: elsewhere each waits for an answer."""
    waiting: deque[tuple[Segment, Begin]] = deque()
    first = 0
    for segment in segments:
        waiting.append((segment, pool.submit(_begin, file_of(segment.file), segment, first).result))
        first += segment.stop - segment.start
        if len(waiting) > FILES_AHEAD:
            yield waiting.popleft()
    yield from waiting


def _begin(file: InputFile, segment: Segment, first: int) -> Iterator[Piece]:
    """The rows of `segment`; READ_BYTES of them are read at once, the others as they are asked for."""
    pieces = _pieces(Cursor(file, segment.start, file.columns.needed), segment, first)
    read: list[Piece] = []
    size = 0
    while size < READ_BYTES and (piece := next(pieces, None)) is not None:
        read.append(piece)
        size += piece.texts.nbytes
    return chain(read, pieces)


class Cursor:
    """A place in a file, which moves forward."""

    def __init__(self, file: InputFile, row: int, columns: Sequence[str] | None, read_rows: int = READ_ROWS) -> None:
        """At `row` of `file`; `columns` None reads all of them, `read_rows` of parquet at a time at most."""
        self.file, self.row = file, row
        self._columns, self._read_rows = columns, read_rows
        self._batches: Iterator[pa.RecordBatch] | None = None
        self._pending: pa.RecordBatch | None = None

    def take(self, n_rows: int) -> Iterator[pa.RecordBatch]:
        """The next `n_rows` rows, a few at a time; raises InputError."""
        while n_rows:
            batch = self._pending or self._advance()
            self._pending = batch.slice(n_rows) if batch.num_rows > n_rows else None
            batch = batch.slice(0, n_rows)
            n_rows -= batch.num_rows
            self.row += batch.num_rows
            yield batch

    def skip(self, n_rows: int) -> None:
        """Pass over rows; raises InputError."""
        _, before = self.file.group_of(self.row + n_rows)
        pending = 0 if self._pending is None else self._pending.num_rows
        if before > self.row + pending and self.file.source.format == "parquet":  # nothing before it need be decoded
            n_rows -= before - self.row
            self.row, self._batches, self._pending = before, None, None
        for _ in self.take(n_rows):
            pass

    def _advance(self) -> pa.RecordBatch:
        location = self.file.source.location
        with unreadable(failed := f"{location} cannot be read to its end", failed):
            batch = retry(location, self._next)
        if batch is None:
            missing = self.file.n_rows - self.row
            raise InputError(f"{location} ends {missing:,} rows too early; it is damaged, copy it again")
        return batch

    def _next(self) -> pa.RecordBatch | None:
        if self._batches is None:
            self._batches = batches(self.file, self.row, self._columns, self._read_rows)
        try:
            return next(self._batches, None)
        except BaseException as error:
            self._batches = None  # the next attempt opens the file again, at this row
            if is_exchange(error):
                raise exchanged(self.file.source.location) from error
            raise


def check_unchanged(source: SourceFile) -> None:
    """Raise InputError where a file is not the one that was found when the run began, or is gone."""
    with unreadable(failed := f"{source.location} cannot be looked at again", failed):
        found = version_of(source.location)
    check_version(source.location, found, source.found)


def _pieces(cursor: Cursor, segment: Segment, first: int) -> Iterator[Piece]:
    """The rows of `segment`, numbered from `first`."""
    columns, location = cursor.file.columns, cursor.file.source.location
    for batch in cursor.take(segment.stop - segment.start):
        table, at = pa.Table.from_batches([batch]), 0
        with unreadable(failed := f"{location} cannot be read to its end", failed):
            for texts, n_invalid in documents(table, columns):
                copied = tuple(table[name].slice(at, len(texts)) for name in columns.copied)
                yield Piece(segment, first + at, texts, copied, n_invalid)
                at += len(texts)
        first += batch.num_rows


def documents(table: pa.Table, columns: Columns) -> Iterator[tuple[pa.DictionaryArray, int]]:
    """The documents of consecutive rows as distinct texts (large_string), and how many of them are not UTF-8.

    Those become null. All rows at once, but for a template, whose documents are held as they are: FILLED_BYTES of them.
    """
    if columns.template is None:
        yield as_text(table[columns.text])
        return
    texts = {name: as_text(table[name])[0] for name in columns.texts}
    invalid = np.zeros(table.num_rows, np.bool_)
    for name, column in texts.items():
        invalid |= (column.is_null().to_numpy(zero_copy_only=False)) & table[name].is_valid().to_numpy()
    lengths = np.sum([lengths_of(column) for column in texts.values()], axis=0)
    for start, stop in cuts(lengths, FILLED_BYTES):
        parts = {name: column.slice(start, stop - start) for name, column in texts.items()}
        parts = {name: part.dictionary.take(part.indices) for name, part in parts.items()}
        filled = columns.template.fill(parts | {TEXT: parts[columns.text]})
        yield filled.dictionary_encode(), int(invalid[start:stop].sum())


def as_text(column: pa.ChunkedArray) -> tuple[pa.DictionaryArray, int]:
    """The column as distinct texts (large_string), and how many values are not UTF-8; those become null."""
    encoded = encode(column.cast(pa.large_string()) if pa.types.is_null(column.type) else column)
    # Arrow checks UTF-8 when it turns bytes into text, but takes a column declared as text at its word.
    raw = encoded.dictionary.cast(pa.large_binary())
    try:
        return pa.DictionaryArray.from_arrays(encoded.indices, raw.cast(pa.large_string())), 0
    except pa.ArrowInvalid:
        decoded = [_decode(value) for value in raw.to_pylist()]
    valid = pa.array([text is not None for text in decoded]).take(encoded.indices)
    indices = pc.if_else(valid, encoded.indices, None)
    texts = pa.array([text or "" for text in decoded], pa.large_string())
    found = compact(pa.DictionaryArray.from_arrays(indices, texts))
    return found, found.null_count - encoded.null_count


def _decode(value: bytes) -> str | None:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None
