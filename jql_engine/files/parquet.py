"""Parquet: what a file holds, and its rows from any row group on, a bounded number of bytes at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jql_engine.errors import UnreadableError
from jql_engine.files.dictionaries import compact
from jql_engine.files.inputs import READ_BYTES, Columns, InputFile, SourceFile, check_columns
from jql_engine.files.storage import open_parquet, open_read

READ_ROWS = 2_048  # of text handed out at a time, at most
DECODED_BYTES = 32 << 20  # decoded at a time, at most, if each row has the largest of all values
UNKNOWN_BYTES = 1 << 19  # that a text is taken to have, at most, where only the mean is known
TEXT = ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY")
LENGTH_BYTES = 4  # before each value of a dictionary page
# How a page begins that is a dictionary (parquet.thrift, PageHeader): fields 1 and 2, its type and its size unpacked.
DICTIONARY_PAGE = re.compile(rb"\x15\x04\x15([\x80-\xff]{0,4}[\x00-\x7f])", re.DOTALL)
DICTIONARY_HEADER = 8  # bytes
BUFFER_BYTES = 1 << 20  # compressed bytes read at a time; without it a whole row group is held


def describe_parquet(source: SourceFile, columns: Columns) -> InputFile:
    """What the footer says; raises InputError where a column is missing or the footer is damaged."""
    with open_parquet(source.location) as file:
        schema, metadata = file.schema_arrow, file.metadata
    columns = check_columns(source.location, schema, columns)
    leaves = [i for i in range(metadata.num_columns) if metadata.schema.column(i).path in columns.texts]
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    sizes = []
    for number, group in enumerate(groups):
        texts = [group.column(leaf) for leaf in leaves]
        for column in texts:
            if not 0 <= group.num_rows == column.num_values or column.total_uncompressed_size < 0:
                raise UnreadableError(
                    f"{source.location} is damaged: row group {number} has {group.num_rows} rows and "
                    f"{column.num_values} texts in {column.total_uncompressed_size} bytes"
                )
        sizes.append(sum(column.total_uncompressed_size for column in texts))
    return InputFile(source, columns, schema, tuple(g.num_rows for g in groups), tuple(sizes))


def describe_whole(source: SourceFile) -> InputFile:
    """What the footer says of all columns together; raises UnreadableError where it is damaged."""
    with open_parquet(source.location) as file:
        schema, metadata = file.schema_arrow, file.metadata
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    rows = tuple(group.num_rows for group in groups)
    if min(rows, default=0) < 0:
        raise UnreadableError(f"{source.location} is damaged: a row group has {min(rows)} rows")
    sizes = tuple(sum(group.column(i).total_uncompressed_size for i in range(group.num_columns)) for group in groups)
    return InputFile(source, Columns(), schema, rows, sizes)


def parquet_batches(
    file: InputFile, first: int, columns: Sequence[str] | None, read_rows: int = READ_ROWS
) -> Iterator[pa.RecordBatch]:
    """Rows from row group `first` on, at most `read_rows` at a time; `columns` None gives all, as in the file."""
    with open_read(file.source.location, file.source.found) as stream:
        footer = pq.read_metadata(stream)
        for number in range(first, len(file.group_rows)):
            group = _Group(stream, footer, number)
            if columns is None:
                for batch in map(_compacted, group.batches(None, read_rows)):
                    # All of them by position: two may have one name.
                    yield pa.RecordBatch.from_arrays(batch.columns, schema=file.schema)
            else:
                yield from _joined(group.batches(columns, read_rows), columns, read_rows)


class _Group:
    """A row group, read so many rows at a time that what they hold is bounded once it is decoded.

    Encoded bytes bound that of most encodings alone. Of a dictionary each row may have the largest value, and with
    DELTA_BYTE_ARRAY almost all of the row before.
    """

    def __init__(self, stream: BinaryIO, footer: pq.FileMetaData, number: int) -> None:
        self._stream, self._footer, self._number = stream, footer, number
        self._group = footer.row_group(number)
        self._leaves = [self._group.column(i) for i in range(self._group.num_columns)]

    def batches(self, columns: Sequence[str] | None, read_rows: int) -> Iterator[pa.RecordBatch]:
        """All rows, a few at a time; with `columns` those, of which text may come as dictionaries."""
        leaves = [leaf for leaf in self._leaves if columns is None or _is_part(leaf, columns)]
        dictionaries = [leaf.path_in_schema for leaf in leaves if columns is not None and self._is_dictionary(leaf)]
        decoded = [leaf for leaf in leaves if leaf.path_in_schema not in dictionaries and leaf.physical_type in TEXT]
        size = sum(leaf.total_uncompressed_size for leaf in leaves)
        widest = sum(self._widest(leaf) * leaf.num_values for leaf in decoded) // max(1, self._group.num_rows)
        if sum(leaf.total_uncompressed_size for leaf in decoded) > UNKNOWN_BYTES:
            widest = max(widest, UNKNOWN_BYTES)
        n_rows = min(read_rows, READ_BYTES * self._group.num_rows // max(1, size), DECODED_BYTES // max(1, widest))
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


def _joined(batches: Iterable[pa.RecordBatch], columns: Sequence[str], read_rows: int) -> Iterator[pa.RecordBatch]:
    """Consecutive batches together, up to `read_rows` or READ_BYTES; of dictionaries only the values that are used."""
    together: list[pa.RecordBatch] = []
    n_rows = n_bytes = 0
    for batch in map(_compacted, batches):
        size = batch.nbytes
        if together and (n_rows + batch.num_rows > read_rows or n_bytes + size > READ_BYTES):
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
