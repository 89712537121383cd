"""Damaged parquet files, read as a job does and compared with what pyarrow reads of them at once."""

from __future__ import annotations

import pickle
import random
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jql_engine.errors import InputError
from jql_engine.files.chunks import Chunk, Piece, Task, split
from jql_engine.files.formats import open_file
from jql_engine.files.inputs import Columns, InputFile, find_files
from jql_engine.files.reading import as_text, read
from tests.fuzzing.mutate import cut, damage, damage_thrift

N_ROWS = 60
CHUNK_ROWS, CHUNK_BYTES = 16, 2_048
MOST_CHUNKS = 5_000


class ParquetKind:
    """String, large, dictionary and nested columns, several codecs, row groups, with and without statistics."""

    may_crash = True

    def __init__(self, bases: Path) -> None:
        self.bases = base_files()

    def write(self, rng: random.Random, folder: Path) -> Path:
        """Damage in the footer, in a page's header, or anywhere."""
        content = rng.choice(self.bases)
        kind = rng.randrange(8)
        if kind < 3:
            content = _with_footer(rng, content)
        elif kind == 3:
            content = damage(rng, content, len(content) - 8 - _footer_size(content), len(content))
        elif kind == 4:
            content = _with_page_header(rng, content)
        elif kind == 5:
            content = content.replace(*rng.choice([(b"text", b"t\xe9xt"), (b"note", b"n\xf6te"), (b"id", b"\xffd")]))
        elif kind == 6:
            content = damage(rng, content)
        else:
            content = cut(rng, content)
        file = folder / "case.parquet"
        file.write_bytes(content)
        return file

    def read(self, file: Path) -> None:
        """Every chunk alone and all in a row, both what pyarrow reads of the row groups."""
        found = opened(file)
        chunks = list(islice(split([found], CHUNK_ROWS, CHUNK_BYTES), MOST_CHUNKS + 1))
        assert len(chunks) <= MOST_CHUNKS, f"{found.n_rows} rows would be {len(chunks)} chunks or more"
        in_a_row = rows_of(found, [chunks])
        alone = rows_of(found, [[chunk] for chunk in chunks])
        columns = list(found.columns.needed)
        # One by one: where a page has a value too many, pyarrow gives it to the row group after it.
        groups = [pq.ParquetFile(file).read_row_group(i, columns) for i in range(len(found.group_rows))]
        table = pa.concat_tables(groups) if groups else found.schema.empty_table()
        expected = as_text(table["text"])[0].to_pylist()
        assert in_a_row[0] == alone[0] == expected, "other texts than pyarrow's"
        if found.columns.id:
            ids = repr(as_values(table[found.columns.id]))  # NaN equals nothing
            assert repr(in_a_row[1]) == repr(alone[1]) == ids, "other ids than pyarrow's"


def opened(file: Path) -> InputFile:
    """As a job hands it to a worker process."""
    [source] = find_files([str(file)]).files
    found = open_file(source, Columns())
    found.schema.serialize()
    return pickle.loads(pickle.dumps(found))


def rows_of(file: InputFile, runs: list[list[Chunk]]) -> tuple[list[str | None], list[Any]]:
    """Texts and ids of the chunks, read anew for each run; raises InputError."""
    texts, ids = [], []
    for chunks in runs:
        n_expected, n_read = sum(chunk.n_docs for chunk in chunks), 0
        for item in read(lambda _: file, [Task(number, chunk) for number, chunk in enumerate(chunks)]):
            if isinstance(item, Piece):
                texts += item.texts.to_pylist()
                ids += [value for column in item.copied for value in as_values(column)]
                n_read += len(item.texts)
            elif item.failures:
                raise InputError(item.failures[0].message)
        assert n_read == n_expected, f"{n_read} rows, expected {n_expected}"
    return texts, ids


def as_values(column: pa.ChunkedArray) -> list[Any]:
    """Python values, texts as bytes: they may be no UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    return column.to_pylist()


def base_files() -> list[bytes]:
    """Sound files, the same in every process."""
    rng = random.Random(0)
    words = ["water", "boils", "süß", "月亮", "🌙", "lower", "mountain", "\n", "x" * 50]
    texts = [None if i % 9 == 4 else " ".join(rng.choices(words, k=rng.randrange(12))) for i in range(N_ROWS)]
    few = pa.array([f"text {i % 5}" for i in range(N_ROWS)])
    ids, notes = pa.array(range(N_ROWS)), [{"note": [f"{i}"] * (i % 3)} for i in range(N_ROWS)]
    plain = pa.table({"text": texts, "id": ids})
    return [
        _written(plain, compression="none"),
        _written(plain, compression="none", use_dictionary=False, row_group_size=25),
        _written(plain, compression="snappy", row_group_size=20, write_statistics=False),
        _written(plain, compression="zstd", data_page_size=200, write_batch_size=8),
        _written(plain, compression="gzip", data_page_version="2.0", use_dictionary=False),
        _written(plain, compression="none", column_encoding={"text": "DELTA_BYTE_ARRAY"}, use_dictionary=False),
        _written(plain, compression="lz4", write_page_index=True, write_page_checksum=True),
        _written(pa.table({"note": notes, "text": pa.array(texts, pa.large_string())}), row_group_size=30),
        _written(pa.table({"id": few, "text": few.dictionary_encode()}), store_schema=True),
        _written(pa.table({"text": few.cast(pa.binary()), "id": pa.array(texts)}), store_schema=False),
        _written(pa.table({"text": texts}), compression="none", store_schema=False, row_group_size=7),
        _written(pa.table({"id": [1.5, None] * 30, "text": pa.array([None] * 60, pa.string()), "note": few})),
    ]


def _written(table: pa.Table, **options: Any) -> bytes:
    stream = BytesIO()
    pq.write_table(table, stream, **options)
    return stream.getvalue()


def _footer_size(content: bytes) -> int:
    return int.from_bytes(content[-8:-4], "little")


def _with_footer(rng: random.Random, content: bytes) -> bytes:
    """The same with other values in its footer, whose length is right, or not."""
    start = len(content) - 8 - _footer_size(content)
    footer, _ = damage_thrift(rng, content[start:])
    length = (
        len(footer) if rng.random() < 0.95 else rng.choice([0, 1, len(footer) - 1, len(footer) + 1, 2**31, 2**32 - 1])
    )
    return content[:start] + footer + length.to_bytes(4, "little") + content[-4:]


def _with_page_header(rng: random.Random, content: bytes) -> bytes:
    metadata = pq.read_metadata(BytesIO(content))
    group = metadata.row_group(rng.randrange(metadata.num_row_groups))
    column = group.column(rng.randrange(group.num_columns))
    start = rng.choice([column.data_page_offset, column.dictionary_page_offset or column.data_page_offset])
    header, length = damage_thrift(rng, content[start:])
    if rng.random() < 0.5:  # nothing after it moves
        header = (header + b"\0" * length)[:length]
    return content[:start] + header + content[start + length :]
