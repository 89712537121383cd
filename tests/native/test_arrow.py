from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from jql_engine.engine import Engine
from jql_engine.probe_texts import ODDITIES, SENTENCES
from tests.inputs import not_utf8
from tests.native.binding import JqlError

TYPES = [pa.string(), pa.large_string(), pa.string_view()]
TEXTS = [*SENTENCES[:9], None, "", *ODDITIES[:20], None]


@pytest.fixture(scope="module")
def expected(xlmr):
    return Engine(xlmr, device="cpu").score(TEXTS).to_table()


def equal(found, expected):
    assert found.schema.names == expected.schema.names and found.schema.types == expected.schema.types
    for name in found.schema.names:
        one, other = (table[name].combine_chunks() for table in (found, expected))
        assert one.is_valid().equals(other.is_valid()), name
        if pa.types.is_floating(one.type):
            values = [column.drop_null().to_numpy() for column in (one, other)]
            np.testing.assert_allclose(*values, atol=1e-5, rtol=0)
        else:
            assert one.equals(other), name


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_texts_of_every_type_in_chunks(native, expected, kind):
    array = pa.array(["before", *TEXTS, "after"], kind).slice(1, len(TEXTS))
    chunks = pa.chunked_array([array.slice(0, 5), array.slice(5, 0), array.slice(5, 3), array.slice(8)])
    found = native.score_arrow(chunks, None)
    batches = list(found)
    assert [len(batch) for batch in batches] == [5, 0, 3, len(TEXTS) - 8]
    equal(pa.Table.from_batches(batches), expected)


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_a_column_of_record_batches(native, expected, kind):
    table = pa.table({"id": np.arange(len(TEXTS)), "text": pa.array(TEXTS, kind)})
    batches = [*table.slice(0, 7).to_batches(), *table.slice(7).to_batches()]
    reader = pa.RecordBatchReader.from_batches(table.schema, batches)
    equal(native.score_arrow(reader, "text").read_all(), expected)


def test_null_rows_of_a_struct(native):
    texts = pa.array(["a", "b", None, "d"])
    rows = pa.StructArray.from_arrays([texts], ["text"], mask=pa.array([False, True, False, False])).slice(1)
    found = native.score_arrow(pa.chunked_array([rows]), "text").read_all()
    assert found["n_tokens"].is_valid().to_pylist() == [False, False, True]


def test_a_stream_without_arrays(native):
    assert native.score_arrow(pa.chunked_array([], pa.string()), None).read_all().num_rows == 0


def test_long_views_in_several_buffers(native):
    parts = pa.concat_arrays([pa.array([sentence * 3, "short"], pa.string_view()) for sentence in SENTENCES])
    found = native.score_arrow(pa.chunked_array([parts]), None).read_all()
    wanted = native.score([text for sentence in SENTENCES for text in (sentence * 3, "short")])
    assert found["n_tokens"].to_pylist() == wanted.n_tokens.tolist()


@pytest.mark.parametrize(
    ("stream", "column", "sentence"),
    [
        (pa.table({"text": ["a"]}), None, "JQL_UNSUPPORTED: .*name a column"),
        (pa.table({"text": ["a"]}), "body", "JQL_INVALID_ARGUMENT: the Arrow stream has no column body; it has: text"),
        (pa.table([["a"], ["b"]], ["text", "text"]), "text", "JQL_INVALID_ARGUMENT: .* two columns text; rename one"),
        (pa.table({"text": [1]}), "text", 'JQL_UNSUPPORTED: the Arrow stream gives the format "l"'),
        (pa.chunked_array([["a"]]), "text", "JQL_INVALID_ARGUMENT: .*column must be NULL"),
        (pa.chunked_array([pa.array(["a"]).dictionary_encode()]), None, "JQL_UNSUPPORTED: .*by dictionary"),
    ],
)
def test_streams_that_are_no_text(native, stream, column, sentence):
    with pytest.raises(JqlError, match=sentence):
        native.score_arrow(stream, column)


def test_invalid_utf8_is_an_error_of_the_stream(native):
    reader = native.score_arrow(pa.chunked_array([pa.array(["fine"]), not_utf8()]), None)
    assert reader.read_next_batch().num_rows == 1
    with pytest.raises(pa.ArrowInvalid, match="text 2 is not UTF-8"):
        reader.read_next_batch()


def test_an_error_of_the_input_is_passed_on(native):
    def batches():
        yield pa.record_batch({"text": ["a"]})
        raise OSError("the disk is gone")

    reader = pa.RecordBatchReader.from_batches(pa.schema({"text": pa.string()}), batches())
    scores = native.score_arrow(reader, "text")
    assert scores.read_next_batch().num_rows == 1
    with pytest.raises(OSError, match=r"the Arrow stream of texts failed: .*the disk is gone"):
        scores.read_next_batch()


def test_a_column_may_outlive_its_batch(native):
    reader = native.score_arrow(pa.chunked_array([["a", None]]), None)
    column = reader.read_next_batch().column(0)
    del reader
    assert column.is_valid().to_pylist() == [True, False]
