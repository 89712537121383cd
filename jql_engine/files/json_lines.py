"""JSON Lines: what a file holds, and its rows from any block of lines on."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.json as pj

from jql_engine.errors import InputError, UnreadableError
from jql_engine.files.inputs import READ_BYTES, Columns, InputFile, SourceFile, check_columns
from jql_engine.files.location import Location
from jql_engine.files.storage import open_read

RAW_BYTES = frozenset(map(chr, range(0xDC80, 0xDD00)))  # what surrogateescape makes of bytes that are no UTF-8
LINE_BYTES = 256 << 20  # of a line of JSON, which is held whole


def describe_lines(source: SourceFile, columns: Columns) -> InputFile:
    """Cut the file into groups of about READ_BYTES of whole lines, counting the lines of each."""
    rows, sizes, first, is_first = [], [], b"", True
    for block in _blocks(source.location):
        rows.append(len(_lines(block)))
        sizes.append(len(block))
        first = block if is_first else first
        is_first = is_first and not rows[-1]
    schema = _schema_of_lines(source.location, first, columns)
    try:
        columns = check_columns(source.location, schema, columns)
    except InputError as error:
        raise InputError(f"{error} (keys of its first {len(_lines(first)):,} lines)") from error
    _parse(source.location, first, 0, pa.schema([schema.field(name) for name in columns.needed]))
    return InputFile(source, columns, schema, tuple(rows), tuple(sizes))


def _schema_of_lines(location: Location, block: bytes, columns: Columns) -> pa.Schema:
    """The keys of a block; only the types of the columns that are read are looked at, the others may be anything."""
    if not _lines(block):
        return pa.schema([(name, pa.string()) for name in columns.needed])
    keys: dict[str, None] = {}
    copied: dict[str, list[Any]] = {name: [] for name in (*columns.copied, "id")}
    for value in _objects(location, _lines(block), 0):
        keys |= dict.fromkeys(value)
        for name, values in copied.items():
            values.append(value.get(name))
    types = {name: _type_of(values) for name, values in copied.items()} | dict.fromkeys(columns.texts, pa.string())
    return pa.schema([(key.encode(errors="replace").decode(), types.get(key, pa.null())) for key in keys])


def _type_of(values: list[Any]) -> pa.DataType:
    """Of a column that is copied: of all values, else of the first, which the others will be measured by."""
    values = [value for value in values if value is not None]
    if not values or isinstance(values[0], str):  # which may be no UTF-8: pyarrow refuses it
        return pa.string()
    tries = [(values, None), (values[:1], None)]
    if all(type(value) is int for value in values):  # of others pyarrow would cut off fractions
        tries.insert(1, (values, pa.uint64()))
    for some, kind in tries:
        with suppress(ValueError, TypeError, OverflowError):
            return pa.array(some, kind).type
    return pa.int64()  # an integer beyond 64 bits


def line_batches(file: InputFile, first: int, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    """Rows from block `first` on, of these `columns`."""
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
    kind = {".gz": "gzip", ".zst": "zstd"}.get(Path(location.name.partition("?")[0]).suffix.lower())
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
    """Those that are not blank, nor a byte order mark alone."""
    return [line for line in block.split(b"\n") if (bare := line.removeprefix(codecs.BOM_UTF8)) and not bare.isspace()]


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
        except RecursionError as error:
            raise UnreadableError(f"{location}: document {number} is nested too deeply; leave it out") from error
        except ValueError as error:
            raise UnreadableError(f"{location}: document {number} is no JSON: {error}") from error
        if not isinstance(value, dict):
            raise UnreadableError(f"{location}: document {number} is a {type(value).__name__}, expected an object")
        yield value


def _array(location: Location, values: list[Any], before: int, field: pa.Field) -> pa.Array:
    try:
        if pa.types.is_string(field.type):
            encoded = [value if value is None else _as_bytes(value) for value in values]
            return pa.array(encoded, pa.binary()).view(pa.string())
        if _loses(values, field.type):
            raise TypeError("pyarrow would make it fit")
        return pa.array(values, field.type)
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        if len(values) > 1:  # which one?
            for i, value in enumerate(values):
                _array(location, [value], before + i, field)
        as_before = " as in the documents before it" if before else ""
        expected = "text" if pa.types.is_string(field.type) else f"{field.type}{as_before}"
        raise UnreadableError(
            f"{location}: document {before + 1}: {field.name!r} is a {type(values[0]).__name__}, expected {expected}"
        ) from error


def _as_bytes(text: str) -> bytes:
    """The bytes that were read; of an escaped lone surrogate some that are no UTF-8, as those of a damaged file."""
    with suppress(UnicodeEncodeError):
        return text.encode()
    kept = b"".join(c.encode(errors="surrogateescape" if c in RAW_BYTES else "surrogatepass") for c in text)
    try:
        kept.decode()
    except UnicodeDecodeError:
        return kept
    return text.encode(errors="surrogatepass")  # not the bytes, which would not be here: escapes that spell them


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
