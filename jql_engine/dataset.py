"""Find, split and read input files."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jql_engine.data import Chunk, DocumentBatch, Segment
from jql_engine.errors import InputError

CHUNK_ROWS = 20_000
CHUNK_BYTES = 32 << 20  # uncompressed text of one chunk, by the file's own statistics
READ_ROWS = 1_024  # rows decoded at a time
BUFFER_BYTES = 1 << 20  # compressed bytes read at a time; without it a whole row group is held
SUFFIX = ".parquet"


@dataclass(frozen=True, slots=True)
class InputFile:
    """One parquet file to score, as its footer describes it."""

    path: Path
    relative: Path  # of the output file, below the output folder
    text_column: str
    id_column: str | None
    schema: pa.Schema
    group_rows: tuple[int, ...]
    group_bytes: tuple[int, ...]  # uncompressed bytes of the text column

    @property
    def n_rows(self) -> int:
        """Rows of all row groups."""
        return sum(self.group_rows)

    @property
    def id_field(self) -> pa.Field | None:
        """The column that goes into the output as it is."""
        return None if self.id_column is None else self.schema.field(self.id_column)


@dataclass(frozen=True, slots=True)
class ChunkDocuments:
    """What was read for one chunk."""

    chunk: Chunk
    documents: DocumentBatch
    ids: tuple[pa.ChunkedArray | None, ...]  # of each segment
    n_invalid: int  # texts that are not UTF-8; null in `documents`


def find_files(inputs: Sequence[str]) -> list[tuple[Path, Path]]:
    """(path, path below the output folder) of every parquet file that `inputs` name, in a stable order.

    A folder gives all *.parquet files in it, at their paths inside of it; a glob gives what it matches, at the paths
    below its fixed part; a file gives its name. Raises InputError: nothing there, nothing matched, or two inputs
    that would write one output.
    """
    found: dict[Path, Path] = {}
    for given in inputs:
        for path, relative in _expand(given):
            if found.setdefault(relative, path).resolve() != path.resolve():
                raise InputError(
                    f"{found[relative]} and {path} would both be written to {relative}; give their common parent "
                    "folder, or run them into two --out folders"
                )
    return [(path, relative) for relative, path in found.items()]


def open_file(path: Path, relative: Path, text_column: str, id_column: str | None) -> InputFile:
    """Read the footer of a parquet file and check its columns; raises InputError.

    `id_column` None takes the column `id` if there is one.
    """
    try:
        with pq.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a complete parquet file: {error}") from error
    _check_column(path, schema, text_column, "--text-column")
    _check_text_type(path, text_column, schema.field(text_column).type)
    if id_column is not None:
        _check_column(path, schema, id_column, "--id-column")
    elif schema.names.count("id") == 1:
        id_column = "id"
    leaves = [i for i in range(metadata.num_columns) if metadata.schema.column(i).path == text_column]
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    sizes = tuple(group.column(leaves[0]).total_uncompressed_size for group in groups)
    return InputFile(path, relative, text_column, id_column, schema, tuple(g.num_rows for g in groups), sizes)


def split(files: Sequence[InputFile]) -> Iterator[Chunk]:
    """Cut large files into chunks and join small ones, in order.

    A chunk holds about CHUNK_ROWS rows or CHUNK_BYTES of text; the cut depends on the files' footers alone.
    """
    together: list[Segment] = []
    rows = size = 0
    for number, file in enumerate(files):
        pieces = list(_pieces(number, file))
        n_rows, n_bytes = file.n_rows, sum(file.group_bytes)
        if together and (len(pieces) > 1 or rows + n_rows > CHUNK_ROWS or size + n_bytes > CHUNK_BYTES):
            yield Chunk(tuple(together))
            together, rows, size = [], 0, 0
        if len(pieces) > 1:
            yield from (Chunk((piece,)) for piece in pieces)
        else:
            together += pieces
            rows, size = rows + n_rows, size + n_bytes
    if together:
        yield Chunk(tuple(together))


def read(files: Sequence[InputFile], chunks: Sequence[Chunk]) -> Iterator[ChunkDocuments]:
    """Read `chunks` in their order, each file once from front to back; raises InputError."""
    cursor: _Cursor | None = None
    for chunk in chunks:
        texts, ids, n_invalid = [], [], 0
        for segment in chunk.segments:
            file = files[segment.file]
            if cursor is None or cursor.file is not file:
                cursor = _Cursor(file, segment.start)
            table = cursor.take(segment.stop - segment.start)
            column, invalid = _as_text(table[file.text_column])
            texts.append(column)
            ids.append(None if file.id_column is None else table[file.id_column])
            n_invalid += invalid
        yield ChunkDocuments(chunk, DocumentBatch.of(pa.concat_arrays(texts)), tuple(ids), n_invalid)


class _Cursor:
    """The rows of one file from `start` on, a few at a time."""

    def __init__(self, file: InputFile, start: int) -> None:
        self.file = file
        first, before = 0, 0
        while first < len(file.group_rows) and before + file.group_rows[first] <= start:
            before += file.group_rows[first]
            first += 1
        columns = list(dict.fromkeys(name for name in (file.text_column, file.id_column) if name is not None))
        self._schema = pa.schema([file.schema.field(name) for name in columns])
        self._batches = self._decode(columns, list(range(first, len(file.group_rows))))
        self._pending: list[pa.RecordBatch] = []
        self.take(start - before)

    def take(self, n_rows: int) -> pa.Table:
        """The next `n_rows` rows."""
        taken = []
        while n_rows:
            batch = self._pending.pop() if self._pending else next(self._batches, None)
            if batch is None:
                raise InputError(f"{self.file.path} ends {n_rows} rows before its footer says; it is damaged")
            if batch.num_rows > n_rows:
                self._pending.append(batch.slice(n_rows))
                batch = batch.slice(0, n_rows)
            taken.append(batch)
            n_rows -= batch.num_rows
        return pa.Table.from_batches(taken, self._schema)

    def _decode(self, columns: list[str], groups: list[int]) -> Iterator[pa.RecordBatch]:
        try:
            with pq.ParquetFile(self.file.path, buffer_size=BUFFER_BYTES) as file:
                for batch in file.iter_batches(READ_ROWS, row_groups=groups, columns=columns):
                    yield pa.RecordBatch.from_arrays([batch.column(name) for name in columns], schema=self._schema)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{self.file.path} cannot be read to its end: {error}") from error


def _expand(given: str) -> Iterator[tuple[Path, Path]]:
    path = Path(given)
    if path.is_dir():
        files = sorted(file for file in path.rglob(f"*{SUFFIX}") if file.is_file() and _visible(file.relative_to(path)))
        if not files:
            raise InputError(f"folder {path} holds no *{SUFFIX} file")
        yield from ((file, file.relative_to(path)) for file in files)
    elif path.is_file():
        yield path, Path(path.name)
    elif glob.has_magic(given):
        root = fixed_part(given)
        matches = sorted(file for file in map(Path, glob.glob(given, recursive=True)) if file.is_file())  # noqa: PTH207
        if not matches:
            raise InputError(f"{given} matches no file")
        yield from ((file, file.relative_to(root)) for file in matches)
    else:
        raise InputError(f"{path} does not exist; give parquet files, folders or globs")


def fixed_part(pattern: str) -> Path:
    """The folder of a glob before its first wildcard."""
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:fixed])


def _visible(relative: Path) -> bool:
    """False for what a writer has not finished: names with a leading dot or underscore."""
    return not any(part.startswith((".", "_")) for part in relative.parts)


def _check_column(path: Path, schema: pa.Schema, column: str, option: str) -> None:
    if (count := schema.names.count(column)) != 1:
        found = f"{count} columns named" if count else "no column"
        raise InputError(f"{path} has {found} {column!r}; it has {', '.join(schema.names)}: name one with {option}")


def _check_text_type(path: Path, column: str, found: pa.DataType) -> None:
    value = found.value_type if pa.types.is_dictionary(found) else found
    is_bytes = pa.types.is_binary(value) or pa.types.is_large_binary(value) or pa.types.is_binary_view(value)
    is_text = pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)
    if not (is_bytes or is_text or pa.types.is_null(value)):
        raise InputError(f"{path}: column {column!r} is {found}, expected text (a string or UTF-8 binary type)")


def _pieces(number: int, file: InputFile) -> Iterator[Segment]:
    """Segments of one file: row groups joined while they fit in a chunk, cut where one alone does not."""
    start = stop = size = 0
    for n_rows, n_bytes in zip(file.group_rows, file.group_bytes, strict=True):
        n_parts = min(n_rows, max(1, -(-n_rows // CHUNK_ROWS), -(-n_bytes // CHUNK_BYTES)))
        for part in range(n_parts):
            rows = n_rows * (part + 1) // n_parts - n_rows * part // n_parts
            if stop > start and (stop - start + rows > CHUNK_ROWS or size + n_bytes // n_parts > CHUNK_BYTES):
                yield Segment(number, start, stop)
                start, size = stop, 0
            stop, size = stop + rows, size + n_bytes // n_parts
    yield Segment(number, start, stop)


def _as_text(column: pa.ChunkedArray) -> tuple[pa.LargeStringArray, int]:
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
