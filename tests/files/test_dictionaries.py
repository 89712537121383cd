from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jql_engine.files.dictionaries import Column, compact, decode, encode, is_text, join

TEXT = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()]
VALUES = ["a", None, "", "süß", "a", "b" * 50]


@pytest.mark.parametrize("kind", [*TEXT, pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int32(), pa.binary())])
def test_text_of_every_type_is_encoded_and_comes_back(kind):
    array = pa.array(VALUES, kind.value_type if pa.types.is_dictionary(kind) else kind)
    array = array.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else array
    column = pa.chunked_array([array, array.slice(0, 0), array.slice(2)])
    assert is_text(kind)
    encoded = encode(column)
    assert encoded.type.index_type == pa.int32() and len(encoded.dictionary) == 4
    table = pa.table({"x": encoded})
    [back] = decode(table, pa.schema([("x", kind)]), 1 << 20)
    assert back["x"].type == kind and back["x"].to_pylist() == column.to_pylist()


@pytest.mark.parametrize("kind", [pa.int64(), pa.null(), pa.list_(pa.string()), pa.dictionary(pa.int32(), pa.int64())])
def test_other_types_are_no_text(kind):
    assert not is_text(kind)


def test_bytes_that_are_no_utf8_stay_what_they_are():
    array = pa.array([b"\xff", b"a", b"\xff"]).view(pa.string())
    [back] = decode(pa.table({"x": encode(pa.chunked_array([array]))}), pa.schema([("x", pa.string())]), 1 << 20)
    assert back["x"].cast(pa.binary()).to_pylist() == [b"\xff", b"a", b"\xff"]


def test_values_that_no_row_has_are_dropped():
    array = pa.DictionaryArray.from_arrays(pa.array([3, None, 1, 3]), pa.array(list("abcd")))
    found = compact(array)
    assert found.to_pylist() == ["d", None, "b", "d"] and sorted(found.dictionary.to_pylist()) == ["b", "d"]


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint32(), pa.int64()])
def test_indices_keep_their_type(kind):
    """As pandas writes categories: batches that lack a value are joined with batches that have all."""
    array = pa.DictionaryArray.from_arrays(pa.array([1, 1], kind), pa.array(["a", "b"]))
    found = compact(array)
    assert found.type == array.type and len(found.dictionary) == 1


@given(st.lists(st.lists(st.sampled_from(["a", "bb", None, ""]), max_size=5), min_size=1, max_size=5))
@settings(deadline=None, max_examples=50)
def test_joined_parts_hold_each_value_once(parts):
    found = join([pa.array(part, pa.large_string()).dictionary_encode() for part in parts])
    rows = [value for part in parts for value in part]
    assert found.to_pylist() == rows
    assert sorted(found.dictionary.to_pylist()) == sorted({value for value in rows if value is not None})


def test_a_column_holds_equal_texts_of_all_its_parts_once(monkeypatch):
    monkeypatch.setattr("jql_engine.files.dictionaries.JOIN_BYTES", 5_000)
    column, rows = Column(), []
    for i in range(40):
        part = [f"{(i + k) % 7}" * 1_000 for k in range(3)]
        rows += part
        column.add(pa.chunked_array([part]))
    found = column.rows()
    assert found.to_pylist() == rows
    assert sum(chunk.nbytes for chunk in found.chunks) < 25_000


def test_numbers_are_kept_as_they_are():
    column = Column()
    column.add(pa.chunked_array([[1, None], [2]]))
    assert column.rows().equals(pa.chunked_array([[1, None], [2]]))


@given(st.lists(st.one_of(st.none(), st.sampled_from(["", "a" * 30, "b" * 100])), max_size=12), st.integers(1, 300))
@settings(deadline=None, max_examples=50)
def test_decoded_slices_are_bounded_and_together_all_rows(values, n_bytes):
    array = pa.array(values, pa.large_string()).dictionary_encode()
    table = pa.table({"x": array, "n": list(range(len(values)))})
    schema = pa.schema([("x", pa.string()), ("n", pa.int64())])
    found = list(decode(table, schema, n_bytes))
    assert pa.concat_tables(found).to_pydict() == {"x": values, "n": list(range(len(values)))}
    for part in found:
        assert part.num_rows <= 1 or sum(len(text or "") for text in part["x"].to_pylist()) <= n_bytes
