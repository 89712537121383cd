"""Score files: commits of chunks, then the finished file; each appears complete or not at all.

    OUT/a/b.parquet    the scores of the input a/b.parquet, all rows in order

Which files and rows are finished is what is there: no database, no lock. A finished file is created, never replaced:
--overwrite removes what is there before its job begins. So whatever jobs meet on one output folder, a file is wholly of
the job that its metadata names; where two runs of one job do work twice, the first to finish a file has finished it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from jql_engine.data import EMBEDDING
from jql_engine.errors import PartsError, UnreadableError
from jql_engine.files.chunks import Segment
from jql_engine.files.dictionaries import decode, is_text
from jql_engine.files.inputs import InputFile
from jql_engine.files.location import Location, is_remote
from jql_engine.files.parts import PARTS, Part, Settings, aside_for, key_of, parts_folder
from jql_engine.files.reading import Cursor, check_unchanged
from jql_engine.files.retries import retry
from jql_engine.files.settings import METADATA_KEY, check_settings, is_finished, settings_of
from jql_engine.files.storage import (
    list_files,
    open_parquet,
    remove_empty_parents,
    remove_file,
    remove_files,
)
from jql_engine.files.writing import explained, write, writing

# A row group of the finished file closes past either of these.
GROUP_ROWS = 100_000
GROUP_BYTES = 64 << 20
Kind: TypeAlias = Literal["sidecar", "append", "derived"]


@dataclass(frozen=True, slots=True)
class OutputFile:
    """Where the scores of one input file go, and what is written into its metadata."""

    out: Location
    file: InputFile
    scores: pa.Schema  # of the columns that scoring adds; derived: all columns of the output
    kind: Kind
    shared: Settings  # of the whole job, one object for all files
    own: Settings | None = None  # of this file, over the shared ones; None: those of its source

    @property
    def settings(self) -> dict[str, Any]:
        """What decides about the scores of this file; written into its metadata."""
        if self.own is not None:
            return {**self.shared, **self.own}
        return settings_of(self.shared, self.file.source, self.file.limit)

    @property
    def key(self) -> str:
        """The settings, as the names of parts give them."""
        return key_of(self.settings)

    @property
    def final(self) -> Location:
        """Place of the finished score file."""
        return self.file.source.relative.below(self.out)

    @property
    def parts(self) -> Location:
        """The folder of the parts."""
        return parts_folder(self.out, self.file.source.relative)

    @property
    def aside(self) -> Location:
        """A new name for what is not finished yet."""
        return aside_for(self.out, self.file.source.relative.text)

    @property
    def part_schema(self) -> pa.Schema:
        """Schema of a part: the columns that are copied, where there are any, and the scores."""
        fields = self.file.copied if self.kind == "sidecar" else []
        kept = (self.file.schema.metadata or {}) if self.kind == "derived" else {}
        return pa.schema([*fields, *self.scores], metadata={**kept, METADATA_KEY: json.dumps(self.settings)})

    def is_whole(self, segment: Segment) -> bool:
        """Whether the scores of `segment` are the finished file."""
        return self.kind != "append" and (segment.start, segment.stop) == (0, self.file.n_rows)

    def commit(self, segment: Segment, scores: pa.Table, copied: Sequence[pa.ChunkedArray] = ()) -> None:
        """Write the scores of a segment and what is `copied` beside them, as the finished file where it is all of it.

        Raises OutputError, also where another job has finished the file meanwhile; InputError where the source was
        changed since the run began.
        """
        schema = self.part_schema
        if n_copied := len(schema) - scores.num_columns:
            fields = list(schema)[:n_copied]
            columns = copied or [pa.chunked_array([], field.type) for field in fields]
            names = [field.name for field in fields] + scores.column_names
            scores = pa.table([*columns, *scores.columns], names=names)
        sink = pa.BufferOutputStream()
        with (
            self._representable(),
            pq.ParquetWriter(sink, schema, compression="zstd", use_dictionary=with_dictionary(schema)) as out,
        ):
            for rows in decode(scores, schema, GROUP_BYTES):
                out.write_table(rows)
        content = sink.getvalue()
        with explained(self.final):
            if self.is_whole(segment):
                check_unchanged(self.file.source)
                with self._finishing():
                    write(self.final, content, self.aside, replace=False)
            elif not is_finished(self.final, self.settings):
                write(self.parts / Part(self.key, segment.start, segment.stop).name, content, self.aside)

    def assemble(self, check: Callable[[], None] = lambda: None) -> None:
        """Write the finished file from the parts of its settings, and remove those; `check` just before it appears.

        Raises OutputError, also where another job has finished the file meanwhile; InputError where the source was
        changed or cannot be read, PartsError where parts are gone.
        """
        try:
            self._assemble(check)
        except PartsError:
            if not is_finished(self.final, self.settings):
                raise  # else another run of this job was faster
        with explained(self.final):
            parts = [(place, Part.parse(name)) for place, name in list_files(self.parts)]
            remove_files([place for place, part in parts if part is not None and part.key == self.key])
            remove_empty_parents(self.parts, self.out / PARTS)

    def _assemble(self, check: Callable[[], None]) -> None:
        tables = self._append() if self.kind == "append" else self._tables()
        schema = self._final_schema()
        dictionary = with_dictionary(schema) if self.kind == "sidecar" else True
        with (
            explained(self.final),
            self._finishing(),
            self._representable(),
            writing(self.final, self.aside, replace=False) as stream,
            pq.ParquetWriter(stream, schema, compression="zstd", use_dictionary=dictionary) as out,
        ):
            for group in _groups(tables):
                for rows in _unified(group):
                    columns = [
                        column if column.type == field.type else column.cast(field.type)
                        for column, field in zip(rows.columns, schema, strict=True)
                    ]
                    out.write_table(pa.table(columns, schema=schema))
            check_unchanged(self.file.source)
            check()

    @contextmanager
    def _finishing(self) -> Iterator[None]:
        """A finished file of the same settings is as good as ours; raises OutputError for one of others."""
        try:
            yield
        except FileExistsError:
            check_settings(self.final, self.settings)

    @contextmanager
    def _representable(self) -> Iterator[None]:
        """Raises UnreadableError for columns of the source that parquet has no place for, as objects without keys."""
        try:
            yield
        except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
            raise UnreadableError(f"{self.file.source.location} cannot be written as parquet: {error}") from error

    def _final_schema(self) -> pa.Schema:
        if self.kind != "append":
            return self.part_schema
        source = self.file.schema
        metadata = {**(source.metadata or {}), METADATA_KEY: json.dumps(self.settings)}
        return pa.schema([*source, *self.scores], metadata=metadata)

    def _tables(self) -> Iterator[pa.Table]:
        row, key, schema = 0, self.key, self.part_schema
        names = (Part.parse(name) for _, name in list_files(self.parts))
        for part in sorted(part for part in names if part is not None and part.key == key):
            if part.start != row:
                raise PartsError(f"{self.parts} lacks rows {row} to {part.start}; start the same command again")
            yield from decode(_read_part(self.parts / part.name, schema), schema, GROUP_BYTES)
            row = part.stop
        if row != self.file.n_rows:
            raise PartsError(f"{self.parts} lacks rows {row} to {self.file.n_rows}; start the same command again")

    def _append(self) -> Iterator[pa.Table]:
        """The source's own columns and the scores beside them."""
        cursor = Cursor(self.file, 0, None)
        for scores in self._tables():
            at = 0
            for batch in cursor.take(scores.num_rows):
                columns = scores.slice(at, batch.num_rows)
                at += batch.num_rows
                arrays = [*(pa.chunked_array([column]) for column in batch.columns), *columns.columns]
                yield pa.table(arrays, schema=pa.schema([*batch.schema, *self.scores]))


def _read_part(part: Location, schema: pa.Schema) -> pa.Table:
    """The rows of a part; texts, which only copied columns are, as dictionaries."""
    texts = [field.name for field in schema if is_text(field.type)]

    def read() -> pa.Table:
        with open_parquet(part, dictionaries=texts) as file:
            return file.read()

    try:
        return retry(part, read)
    except FileNotFoundError as error:
        raise PartsError(f"{part} is gone; start the same command again") from error
    except (pa.ArrowException, OSError) as error:
        if is_remote(part) and not isinstance(error, pa.ArrowException):
            raise
        remove_file(part)
        what = str(error).partition("\n")[0]
        raise PartsError(f"{part} was damaged ({what}) and is removed; start the same command again") from error


def with_dictionary(schema: pa.Schema) -> bool | list[str]:
    """Columns to encode with a dictionary: not the vectors, which read 4 times and write 3 times as fast without."""
    return [name for name in schema.names if name != EMBEDDING] if EMBEDDING in schema.names else True


def _unified(group: pa.Table) -> Iterator[pa.Table]:
    """With one dictionary a column; where its indices are too narrow for that, pieces with their own, as they came."""
    try:
        yield group.unify_dictionaries()
    except pa.ArrowInvalid:
        yield from (pa.Table.from_batches([batch]) for batch in group.to_batches())


def _groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Join consecutive tables up to the size of a row group."""
    together: list[pa.Table] = []
    rows = size = 0
    for table in tables:
        if together and (rows + table.num_rows > GROUP_ROWS or size + table.nbytes > GROUP_BYTES):
            yield pa.concat_tables(together)
            together, rows, size = [], 0, 0
        together.append(table)
        rows, size = rows + table.num_rows, size + table.nbytes
    if together:
        yield pa.concat_tables(together)
