"""Columns of text whose equal values are held once: a dictionary of values, and for each row its place in it.

Parquet holds them so, and a few kilobytes of it may stand for gigabytes of text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

JOIN_BYTES = 4 << 20  # of values that wait to be compared with those before them, at least


def is_text(kind: pa.DataType) -> bool:
    """Whether values of `kind` are strings or bytes of any length, in a dictionary or not."""
    return _large(kind.value_type if pa.types.is_dictionary(kind) else kind) is not None


def encode(column: pa.ChunkedArray) -> pa.DictionaryArray:
    """A column that `is_text` as int32 indices into distinct large_string or large_binary values; UTF-8 unchecked."""
    if not pa.types.is_dictionary(column.type):
        column = column.cast(_large(column.type)).dictionary_encode()
    kind = pa.dictionary(pa.int32(), _large(column.type.value_type))
    return join([pa.array([], kind), *(_retyped(chunk, kind) for chunk in column.chunks)])


def join(parts: Sequence[pa.DictionaryArray]) -> pa.DictionaryArray:
    """Consecutive parts of a column of one type as one, every value that is used once."""
    return compact(pa.concat_arrays(parts))


def compact(array: pa.DictionaryArray) -> pa.DictionaryArray:
    """The same rows without the values that none of them has; pa.ArrowIndexError where a row's value is not there.

    One that is ordered keeps all: parts of it could not be joined in its order.
    """
    used = array.indices.drop_null().unique()
    check_indices(used, len(array.dictionary))
    if len(used) == len(array.dictionary) or array.type.ordered:
        return array
    indices = pc.index_in(array.indices, used).cast(array.type.index_type)  # arrays of one column have one type
    return pa.DictionaryArray.from_arrays(indices, array.dictionary.take(used))


def check_indices(indices: pa.Array, n_values: int) -> None:
    """Raise pa.ArrowIndexError for a place that is none in a dictionary of `n_values`, as damaged files have them."""
    bounds = pc.min_max(indices).as_py()
    if bounds["min"] is not None and not 0 <= bounds["min"] <= bounds["max"] < n_values:
        raise pa.ArrowIndexError(f"a dictionary of {n_values} values is asked for number {bounds['max']}")


class Column:
    """Rows of one column that arrive in parts; equal texts are held once, whichever parts they came in."""

    def __init__(self) -> None:
        self._parts: list[pa.Array] = []
        self._kind: pa.DataType | None = None
        self._known = self._new = 0  # bytes of the first part, which earlier ones were joined to, and of the others

    def add(self, part: pa.ChunkedArray) -> None:
        """Append the rows of a column."""
        if not is_text(part.type):
            self._parts, self._kind = self._parts + part.chunks, part.type
            return
        self._parts.append(encode(part))
        self._kind = self._parts[-1].type
        self._new += self._parts[-1].nbytes
        if self._new > max(JOIN_BYTES, self._known):  # so that each value is compared a few times at most
            self._parts = [join(self._parts)]
            self._known, self._new = self._parts[0].nbytes, 0

    def rows(self) -> pa.ChunkedArray:
        """All rows so far, of one part at least; texts as `encode` gives them."""
        return pa.chunked_array(self._parts, self._kind)


def decode(table: pa.Table, schema: pa.Schema, n_bytes: int) -> Iterator[pa.Table]:
    """`table` with the types of `schema`, in slices of at most about `n_bytes` once decoded."""
    columns = [column.unify_dictionaries().combine_chunks() for column in table.columns]
    sizes = np.full(table.num_rows, max(1, table.nbytes // max(1, table.num_rows)), np.int64)
    for column, field in zip(columns, schema, strict=True):
        if pa.types.is_dictionary(column.type) and not pa.types.is_dictionary(field.type):
            sizes += lengths_of(column)
    for start, stop in cuts(sizes, n_bytes):
        arrays = [_decoded(c.slice(start, stop - start), f.type) for c, f in zip(columns, schema, strict=True)]
        yield pa.table(arrays, schema=schema)


def _large(kind: pa.DataType) -> pa.DataType | None:
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.large_binary()
    return None


def _retyped(array: pa.DictionaryArray, kind: pa.DictionaryType) -> pa.DictionaryArray:
    array = compact(array)
    return pa.DictionaryArray.from_arrays(array.indices.cast(kind.index_type), array.dictionary.cast(kind.value_type))


def lengths_of(array: pa.DictionaryArray) -> NDArray[np.int64]:
    """Bytes of each row's value, int64 [N]."""
    lengths = pc.binary_length(array.dictionary).take(array.indices)
    return np.asarray(lengths.fill_null(0).to_numpy(zero_copy_only=False), np.int64)


def cuts(sizes: NDArray[np.int64], n_bytes: int) -> Iterator[tuple[int, int]]:
    """Rows [start, stop) of at most `n_bytes` together, one at least; an empty stretch where there are no rows."""
    ends, start = np.cumsum(sizes), 0
    while True:
        before = ends[start - 1] if start else 0
        stop = min(len(sizes), max(start + 1, int(np.searchsorted(ends, before + n_bytes, side="right"))))
        yield start, stop
        if stop >= len(sizes):
            return
        start = stop


def _decoded(array: pa.Array, kind: pa.DataType) -> pa.Array:
    if not pa.types.is_dictionary(array.type):
        return array if array.type == kind else array.cast(kind)  # pyarrow 26 breaks list<null> by a cast to itself
    if pa.types.is_dictionary(kind):
        values = array.dictionary.cast(kind.value_type)
        return pa.DictionaryArray.from_arrays(array.indices.cast(kind.index_type), values, ordered=kind.ordered)
    return array.dictionary.take(array.indices).cast(kind)
