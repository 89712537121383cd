"""Parquet and JSON Lines: what a file holds, and its rows from any row on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj
import pyarrow.parquet as pq

from jql_engine.errors import EngineError, UnreadableError
from jql_engine.files.dictionaries import check_indices, compact
from jql_engine.files.inputs import SUFFIXES, InputFile, SourceFile, check_columns
from jql_engine.files.storage import Location, open_parquet, open_read, retry

READ_ROWS = 2_048  # rows handed out at a time, at most
READ_BYTES = 4 << 20  # handed out at a time, by the row group's own statistics; lines of JSON parsed at a time
LINE_BYTES = 256 << 20  # of a line of JSON, which is held whole
DECODED_BYTES = 32 << 20  # decoded at a time, at most, if each row has the largest of all values
UNKNOWN_BYTES = 1 << 19  # that a text is taken to have, at most, where only the mean is known
TEXT = ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY")
LENGTH_BYTES = 4  # before each value of a dictionary page
# How a page begins that is a dictionary (parquet.thrift, PageHeader): fields 1 and 2, its type and its size unpacked.
DICTIONARY_PAGE = re.compile(rb"\x15\x04\x15([\x80-\xff]{0,4}[\x00-\x7f])", re.DOTALL)
DICTIONARY_HEADER = 8  # bytes
BUFFER_BYTES = 1 << 20  # compressed bytes read at a time; without it a whole row group is held


def open_file(source: SourceFile, text_column: str, id_column: str | None = None) -> InputFile:
    """Look into an input file and check its columns; raises InputError.

    `id_column` None takes the column `id` if there is one.
    """
    describe = _describe_parquet if source.format == "parquet" else _describe_lines
    with unreadable(f"{source.location} cannot be read", f"{_found(source)} is not a complete {source.format} file"):
        return retry(source.location, lambda: describe(source, text_column, id_column))


@contextmanager
def unreadable(failed: str, damaged: str) -> Iterator[None]:
    """Raise whatever a file system, pyarrow or Python raises inside as an UnreadableError.

    What damage leads to cannot be foreseen: a footer's names alone give UnicodeDecodeError in places of pyarrow that
    differ between its releases. Not our own beliefs, and not a machine out of memory; an allocation that pyarrow
    refuses is mostly a length that was damaged.
    """
    try:
        yield
    except (EngineError, AssertionError):
        raise
    except (pa.ArrowException, OSError, EOFError) as error:
        raise UnreadableError(f"{damaged}: {error}") from error
    except UnicodeDecodeError as error:
        raise UnreadableError(f"{damaged}: {error.object!r} is a name in it, and no UTF-8") from error
    except MemoryError:
        raise
    except Exception as error:
        raise UnreadableError(f"{failed}: {type(error).__name__}: {error}") from error


def _found(source: SourceFile) -> str:
    if source.suffix:
        return str(source.location)
    return f"{source.location} has a name that ends in none of {', '.join(SUFFIXES)}; it was taken for parquet, and"


def batches(file: InputFile, start: int, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    """Rows of `file` from `start` to its end, a few at a time; `columns` None gives all of a parquet file.

    Text may come as a dictionary where `columns` are given. Whatever the file system or pyarrow raises comes out as it
    is; InputError where the file was changed since it was found.
    """
    if start >= file.n_rows:
        return
    group, before = file.group_of(start)
    read = _parquet_batches if file.source.format == "parquet" else _line_batches
    skip, left = start - before, file.n_rows - start
    for batch in read(file, group, columns):
        passed = min(skip, batch.num_rows)
        batch = batch.slice(passed, left)
        skip, left = skip - passed, left - batch.num_rows
        if batch.num_rows:
            yield batch
        if not left:
            break


def _describe_parquet(source: SourceFile, text_column: str, id_column: str | None) -> InputFile:
    with open_parquet(source.location) as file:
        schema, metadata = file.schema_arrow, file.metadata
    id_column = check_columns(source.location, schema, text_column, id_column)
    leaves = [i for i in range(metadata.num_columns) if metadata.schema.column(i).path == text_column]
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    texts = [group.column(leaves[0]) for group in groups]
    for number, (group, column) in enumerate(zip(groups, texts, strict=True)):
        if not 0 <= group.num_rows == column.num_values or column.total_uncompressed_size < 0:
            raise UnreadableError(
                f"{source.location} is damaged: row group {number} has {group.num_rows} rows and {column.num_values} "
                f"texts in {column.total_uncompressed_size} bytes"
            )
    sizes = tuple(column.total_uncompressed_size for column in texts)
    return InputFile(source, text_column, id_column, schema, tuple(g.num_rows for g in groups), sizes)


def _parquet_batches(file: InputFile, first: int, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    with open_read(file.source.location, file.source.found) as stream:
        footer = pq.read_metadata(stream)
        for number in range(first, len(file.group_rows)):
            group = _Group(stream, footer, number)
            if columns is None:
                for batch in group.batches():
                    for array in batch.columns:
                        if pa.types.is_dictionary(array.type):
                            check_indices(array.indices, len(array.dictionary))
                    # All of them by position: two may have one name.
                    yield pa.RecordBatch.from_arrays(batch.columns, schema=file.schema)
            else:
                yield from _joined(group.batches(columns), columns)


class _Group:
    """A row group, read so many rows at a time that what they hold is bounded once it is decoded.

    Encoded bytes bound that of most encodings alone. Of a dictionary each row may have the largest value, and with
    DELTA_BYTE_ARRAY almost all of the row before.
    """

    def __init__(self, stream: BinaryIO, footer: pq.FileMetaData, number: int) -> None:
        self._stream, self._footer, self._number = stream, footer, number
        self._group = footer.row_group(number)
        self._leaves = [self._group.column(i) for i in range(self._group.num_columns)]

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """All rows, a few at a time; with `columns` those, of which text may come as dictionaries."""
        leaves = [leaf for leaf in self._leaves if columns is None or _is_part(leaf, columns)]
        dictionaries = [leaf.path_in_schema for leaf in leaves if columns is not None and self._is_dictionary(leaf)]
        decoded = [leaf for leaf in leaves if leaf.path_in_schema not in dictionaries and leaf.physical_type in TEXT]
        size = sum(leaf.total_uncompressed_size for leaf in leaves)
        widest = sum(self._widest(leaf) * leaf.num_values for leaf in decoded) // max(1, self._group.num_rows)
        if sum(leaf.total_uncompressed_size for leaf in decoded) > UNKNOWN_BYTES:
            widest = max(widest, UNKNOWN_BYTES)
        n_rows = min(READ_ROWS, READ_BYTES * self._group.num_rows // max(1, size), DECODED_BYTES // max(1, widest))
        return self._read(max(1, n_rows), columns, dictionaries)

    def _read(
        self, n_rows: int, columns: Sequence[str] | None, dictionaries: Sequence[str]
    ) -> Iterator[pa.RecordBatch]:
        options: Any = {"buffer_size": BUFFER_BYTES, "pre_buffer": False, "read_dictionary": dictionaries}
        with pq.ParquetFile(self._stream, metadata=self._footer, **options) as parquet:
            missing = self._group.num_rows
            for batch in parquet.iter_batches(n_rows, row_groups=[self._number], columns=columns):
                missing -= batch.num_rows
                yield batch
        if missing:  # the rows after it would be taken for others
            expected = self._group.num_rows
            raise EOFError(f"row group {self._number} lacks {missing} of the {expected} rows that its footer says")

    def _is_dictionary(self, leaf: pq.ColumnChunkMetaData) -> bool:
        """Whether all of the values are in the dictionary, and it is not too large to be handed out with each batch.

        Arrow adds what comes after a dictionary that was full to it, and hands out all of it each time: of 20,000
        texts of 4 kB, of which the first megabyte is in a dictionary, that took 311 MB and 3 to 30 times as long.
        """
        size = self._dictionary_bytes(leaf)
        others = leaf.total_uncompressed_size - size
        return leaf.physical_type == "BYTE_ARRAY" and 0 < size <= DECODED_BYTES and others <= 8 * leaf.num_values

    def _widest(self, leaf: pq.ColumnChunkMetaData) -> int:
        """Bytes that one decoded value may have, where the mean does not tell."""
        size: int = leaf.total_uncompressed_size
        if "DELTA_BYTE_ARRAY" in leaf.encodings or size <= UNKNOWN_BYTES:
            return size
        in_dictionary = self._dictionary_bytes(leaf)
        if leaf.physical_type == "BYTE_ARRAY" and UNKNOWN_BYTES < in_dictionary <= DECODED_BYTES:
            return self._widest_of_dictionary(leaf, in_dictionary)
        return in_dictionary

    def _widest_of_dictionary(self, leaf: pq.ColumnChunkMetaData, n_bytes: int) -> int:
        """Bytes of the largest value, if the first row comes with a whole dictionary of `n_bytes`."""
        name = leaf.path_in_schema
        column = next(self._read(1, [name], [name]))[0]
        if not pa.types.is_dictionary(column.type):  # within a list or a struct
            return n_bytes
        lengths = pc.binary_length(column.dictionary)
        whole = pc.sum(lengths).as_py() + LENGTH_BYTES * len(lengths) == n_bytes
        return pc.max(lengths).as_py() if whole else n_bytes

    def _dictionary_bytes(self, leaf: pq.ColumnChunkMetaData) -> int:
        """Of the dictionary's values; 0 where there is none, all of the column where that is not known."""
        size: int = leaf.total_uncompressed_size
        if not {"RLE_DICTIONARY", "PLAIN_DICTIONARY"}.intersection(leaf.encodings):
            return 0
        if leaf.dictionary_page_offset is None or size <= UNKNOWN_BYTES:
            return size
        self._stream.seek(leaf.dictionary_page_offset)
        header = DICTIONARY_PAGE.match(self._stream.read(DICTIONARY_HEADER))
        return size if header is None else min(size, _zigzag(header[1]))


def _is_part(leaf: pq.ColumnChunkMetaData, columns: Sequence[str]) -> bool:
    return any(f"{leaf.path_in_schema}.".startswith(f"{name}.") for name in columns)


def _zigzag(encoded: bytes) -> int:
    """A number as Thrift's compact protocol writes it."""
    value = sum((byte & 0x7F) << 7 * i for i, byte in enumerate(encoded))
    return value >> 1


def _joined(batches: Iterable[pa.RecordBatch], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Consecutive batches together, up to READ_ROWS or READ_BYTES; of dictionaries only the values that are used."""
    together: list[pa.RecordBatch] = []
    n_rows = n_bytes = 0
    for batch in map(_compacted, batches):
        size = batch.nbytes
        if together and (n_rows + batch.num_rows > READ_ROWS or n_bytes + size > READ_BYTES):
            yield _one(together, columns)
            together, n_rows, n_bytes = [], 0, 0
        together.append(batch)
        n_rows, n_bytes = n_rows + batch.num_rows, n_bytes + size
    if together:
        yield _one(together, columns)


def _compacted(batch: pa.RecordBatch) -> pa.RecordBatch:
    if not any(map(pa.types.is_dictionary, batch.schema.types)):
        return batch
    arrays = [compact(array) if pa.types.is_dictionary(array.type) else array for array in batch.columns]
    return pa.RecordBatch.from_arrays(arrays, names=batch.schema.names)


def _one(batches: list[pa.RecordBatch], columns: Sequence[str]) -> pa.RecordBatch:
    arrays = [pa.concat_arrays([batch.column(name) for batch in batches]) for name in columns]
    return pa.RecordBatch.from_arrays(arrays, names=list(columns))


def _describe_lines(source: SourceFile, text_column: str, id_column: str | None) -> InputFile:
    """Cut the file into groups of about READ_BYTES of whole lines, counting the lines of each."""
    rows, sizes, first, is_first = [], [], b"", True
    for block in _blocks(source.location):
        rows.append(len(_lines(block)))
        sizes.append(len(block))
        first = block if is_first else first
        is_first = is_first and not rows[-1]
    schema = _schema_of_lines(source.location, first, text_column, id_column)
    id_column = check_columns(source.location, schema, text_column, id_column)
    needed = [schema.field(name) for name in dict.fromkeys((text_column, id_column)) if name is not None]
    _parse(source.location, first, 0, pa.schema(needed))
    return InputFile(source, text_column, id_column, schema, tuple(rows), tuple(sizes))


def _schema_of_lines(location: Location, block: bytes, text_column: str, id_column: str | None) -> pa.Schema:
    """The keys of a block; only the types of the text and the id are looked at, the others may be anything."""
    if not _lines(block):
        return pa.schema([(name, pa.string()) for name in dict.fromkeys((text_column, id_column or text_column))])
    keys: dict[str, None] = {}
    ids = []
    for value in _objects(location, _lines(block), 0):
        keys |= dict.fromkeys(value)
        ids.append(value.get(id_column or "id"))
    types = {id_column or "id": _type_of(ids), text_column: pa.string()}
    return pa.schema([(key.encode(errors="replace").decode(), types.get(key, pa.null())) for key in keys])


def _type_of(ids: list[Any]) -> pa.DataType:
    """Of the column of ids: of all, else of the first one, which the others will be measured by."""
    ids = [value for value in ids if value is not None]
    for values, kind in (ids, None), (ids, pa.uint64()), (ids[:1], None):
        with suppress(ValueError, TypeError, OverflowError):
            return pa.array(values, kind).type if values else pa.string()
    return pa.int64()  # an integer beyond 64 bits


def _line_batches(file: InputFile, first: int, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    assert columns is not None
    schema = pa.schema([file.schema.field(name) for name in columns])
    location, before = file.source.location, sum(file.group_rows[:first])
    with _opened(location, file.source.found) as stream:
        _skip(stream, sum(file.group_bytes[:first]))
        for size in file.group_bytes[first:]:
            block = _exactly(stream, size)
            table = _parse(location, block, before, schema)
            before += table.num_rows
            yield from table.combine_chunks().to_batches()


def _blocks(location: Location) -> Iterator[bytes]:
    """The file in blocks of about READ_BYTES that end with a line."""
    with _opened(location) as stream:
        rest: list[bytes] = []
        n_bytes, n_lines = 0, 0
        while block := _some(stream, READ_BYTES):
            end = block.rfind(b"\n") + 1
            if not end:
                rest.append(block)
                n_bytes += len(block)
                if n_bytes > LINE_BYTES:
                    raise UnreadableError(
                        f"{location}: line {n_lines + 1} is longer than {LINE_BYTES >> 20} MiB; cut it, or leave the "
                        "file out"
                    )
                continue
            whole = b"".join([*rest, block[:end]])
            yield whole
            rest, n_bytes = ([block[end:]] if block[end:] else []), len(block) - end
            n_lines += whole.count(b"\n")
        if rest:
            yield b"".join(rest)


@contextmanager
def _opened(location: Location, expected: tuple[int, str] | None = None) -> Iterator[pa.NativeFile]:
    kind = {".gz": "gzip", ".zst": "zstd"}.get(Path(location.name.partition("?")[0]).suffix)
    with open_read(location, expected) as raw, pa.input_stream(raw, compression=kind) as stream:
        yield stream


def _some(stream: pa.NativeFile, n_bytes: int) -> bytes:
    """The next `n_bytes` at most; `read` of pyarrow 26 would lose that much memory each time that it raises."""
    content: bytes = stream.read_buffer(n_bytes).to_pybytes()
    return content


def _skip(stream: pa.NativeFile, n_bytes: int) -> None:
    while n_bytes:
        n_bytes -= len(_exactly(stream, min(n_bytes, READ_BYTES)))


def _exactly(stream: pa.NativeFile, n_bytes: int) -> bytes:
    parts = []
    while n_bytes:
        part = _some(stream, n_bytes)
        if not part:
            raise EOFError(f"{n_bytes} bytes are missing at the end")
        parts.append(part)
        n_bytes -= len(part)
    return b"".join(parts)


def _lines(block: bytes) -> list[bytes]:
    """Those that are not blank."""
    return [line for line in block.split(b"\n") if line and not line.isspace()]


def _parse(location: Location, block: bytes, before: int, schema: pa.Schema) -> pa.Table:
    """The columns of `schema` of a block whose first row is number `before`; raises UnreadableError."""
    lines = _lines(block)
    options = pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    # One block: a line that is cut by two block borders is refused.
    whole = pj.ReadOptions(block_size=max(1 << 16, len(block) + 1), use_threads=False)
    # It leaves out keys of an object that the first ones had not. pyarrow 26 dies of a segmentation fault where the
    # first line is null.
    is_flat = not any(pa.types.is_nested(field.type) for field in schema)
    if is_flat and all(line.lstrip().startswith(b"{") for line in lines):
        with suppress(pa.ArrowInvalid):
            table = pj.read_json(pa.BufferReader(block), whole, options)
            if table.num_rows == len(lines):
                return table
    return _parse_slowly(location, lines, before, schema)


def _parse_slowly(location: Location, lines: list[bytes], before: int, schema: pa.Schema) -> pa.Table:
    """The same by Python, which takes lone surrogates, NaN and keys given twice, and knows what is wrong where."""
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    for value in _objects(location, lines, before):
        for name, values in columns.items():
            values.append(value.get(name))
    return pa.table([_array(location, columns[field.name], before, field) for field in schema], schema=schema)


def _objects(location: Location, lines: list[bytes], before: int) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, before + 1):
        try:
            # Bytes that are not UTF-8 stay what they are until the text is looked at.
            value = json.loads(line.decode("utf-8-sig", "surrogateescape"))
        except (ValueError, RecursionError) as error:
            raise UnreadableError(f"{location}: document {number} is no JSON: {error}") from error
        if not isinstance(value, dict):
            raise UnreadableError(f"{location}: document {number} is a {type(value).__name__}, expected an object")
        yield value


def _array(location: Location, values: list[Any], before: int, field: pa.Field) -> pa.Array:
    try:
        if pa.types.is_string(field.type):
            # Lone surrogates become bytes that are not UTF-8, as they are in a damaged parquet file.
            encoded = [value if value is None else value.encode(errors="surrogatepass") for value in values]
            return pa.array(encoded, pa.binary()).view(pa.string())
        if _loses(values, field.type):
            raise TypeError("pyarrow would make it fit")
        return pa.array(values, field.type)
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        if len(values) > 1:  # which one?
            for i, value in enumerate(values):
                _array(location, [value], before + i, field)
        expected = "text" if pa.types.is_string(field.type) else f"{field.type} as in the documents before it"
        raise UnreadableError(
            f"{location}: document {before + 1}: {field.name!r} is a {type(values[0]).__name__}, expected {expected}"
        ) from error


def _loses(values: list[Any], kind: pa.DataType) -> bool:
    """Whether pyarrow would cut off a fraction or leave out a key, as it does without a word."""
    if pa.types.is_integer(kind):
        return any(isinstance(value, float) and not value.is_integer() for value in values)
    if pa.types.is_list(kind):
        return any(_loses(value, kind.value_type) for value in values if isinstance(value, list))
    if pa.types.is_struct(kind):
        objects, known = [value for value in values if isinstance(value, dict)], {field.name for field in kind}
        return any(value.keys() - known for value in objects) or any(
            _loses([value.get(field.name) for value in objects], field.type) for field in kind
        )
    return False
