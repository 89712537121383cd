"""Tasks -> pieces of text: each file once from front to back, again from where it broke off if a network fails."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from jql_engine.data import ChunkEnd, DocumentBatch, Failure, Piece, Segment, Task
from jql_engine.dataset import InputFile, SourceFile
from jql_engine.errors import InputError
from jql_engine.formats import batches, unreadable
from jql_engine.storage import retry, version_of


class Files(Protocol):
    """Input files by number."""

    def __getitem__(self, number: int, /) -> InputFile:
        """File `number`."""
        ...


def read(files: Files, tasks: Iterable[Task]) -> Iterator[Piece | ChunkEnd]:
    """Yield the pieces of each task's chunk, then its end.

    A segment that cannot be read is named at the end of its chunk, and nothing more is read of its file.
    """
    cursor: Cursor | None = None
    failed: dict[int, Failure] = {}
    for task in tasks:
        first, failures = 0, []
        for segment in task.chunk.segments:
            file, n_rows = files[segment.file], segment.stop - segment.start
            try:
                if segment.file in failed:
                    raise InputError(failed[segment.file].message)
                if cursor is None or cursor.file is not file or cursor.row > segment.start:
                    cursor = Cursor(file, segment.start, file_columns(file))
                cursor.skip(segment.start - cursor.row)
                yield from _pieces(cursor, segment, first)
            except InputError as error:
                failures.append(Failure(segment, str(error)))
                failed[segment.file], cursor = failures[-1], None
            first += n_rows
        yield ChunkEnd(task, tuple(failures))


def file_columns(file: InputFile) -> list[str]:
    """The columns that scoring needs."""
    return list(dict.fromkeys(name for name in (file.text_column, file.id_column) if name is not None))


class Cursor:
    """A place in a file, which moves forward."""

    def __init__(self, file: InputFile, row: int, columns: Sequence[str] | None) -> None:
        """At `row` of `file`; `columns` None reads all of them."""
        self.file, self.row = file, row
        self._columns = columns
        self._batches: Iterator[pa.RecordBatch] | None = None
        self._pending: pa.RecordBatch | None = None
        self._broke_off = False

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
            raise InputError(f"{location} ends {missing} rows before its footer says; it is damaged")
        return batch

    def _next(self) -> pa.RecordBatch | None:
        source = self.file.source
        if self._batches is None:
            if self._broke_off or isinstance(source.location, Path):  # elsewhere it is a request for every file
                check_unchanged(source)
            self._batches = batches(self.file, self.row, self._columns)
        try:
            return next(self._batches, None)
        except BaseException:
            self._batches, self._broke_off = None, True  # the next attempt opens the file again, at this row
            raise


def check_unchanged(source: SourceFile) -> None:
    """Raise InputError where a file is not the one that was found when the run began."""
    if version_of(source.location) != (source.size, source.version):
        raise InputError(f"{source.location} was changed during the run; start the same command again")


def _pieces(cursor: Cursor, segment: Segment, first: int) -> Iterator[Piece]:
    """The rows of `segment`, numbered from `first`."""
    id_column = cursor.file.id_column
    for batch in cursor.take(segment.stop - segment.start):
        table = pa.Table.from_batches([batch])
        texts, n_invalid = as_text(table[cursor.file.text_column])
        ids = None if id_column is None else table[id_column]
        yield Piece(segment, DocumentBatch.of(texts, first), ids, n_invalid)
        first += batch.num_rows


def as_text(column: pa.ChunkedArray) -> tuple[pa.LargeStringArray, int]:
    """The column as text, and how many values are not UTF-8; those become null."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    # Arrow checks UTF-8 when it turns bytes into text, but takes a column declared as text at its word.
    raw = column.cast(pa.large_binary())
    try:
        return pa.concat_arrays([pa.array([], pa.large_string()), *raw.cast(pa.large_string()).chunks]), 0
    except pa.ArrowInvalid:
        decoded = [_decode(value) for value in raw.to_pylist()]
        return pa.array(decoded, pa.large_string()), decoded.count(None) - column.null_count


def _decode(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None
