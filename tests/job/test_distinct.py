from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jql_engine.data import DocumentBatch, TokenBatch
from jql_engine.job import distinct
from jql_engine.job.distinct import ChunkDocuments
from jql_engine.tokenizer import Tokenizer
from jql_export import probes
from tests.files.test_formats import lines
from tests.job.test_run import score

LONG = " ".join(probes.SENTENCES * 3)
POOL = ["Water", "", None, probes.SENTENCES[0], probes.SENTENCES[1], LONG, LONG + " more", "Water "]


@pytest.fixture(scope="module")
def tokenizer(bundle) -> Tokenizer:
    return Tokenizer.of(bundle)


@given(st.lists(st.lists(st.sampled_from(POOL), min_size=1, max_size=6), max_size=8), st.sampled_from([10, 10_000_000]))
@settings(deadline=None, max_examples=60)
def test_every_row_leads_to_its_tokens_however_a_chunk_is_cut(tokenizer, parts, limit):
    texts = [text for part in parts for text in part]
    expected = tokenizer.encode(DocumentBatch.of(pa.array(texts, pa.large_string())))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distinct, "SLICE_TOKENS", limit)
        patch.setattr(distinct, "TOGETHER_BYTES", 100)
        chunk, slices, row = ChunkDocuments(tokenizer), [], 0
        for part in parts:
            slices += chunk.add(row, pa.array(part, pa.large_string()).dictionary_encode())
            row += len(part)
        slices.append(chunk.finish(row))
    documents = [d.tokens.slice(i).ids.tolist() for d in slices for i in range(len(d.tokens.rows))]
    rows = np.flatnonzero(chunk.index >= 0)
    assert rows.tolist() == expected.rows.tolist()
    assert [documents[i] for i in chunk.index[rows]] == [
        expected.slice(i).ids.tolist() for i in range(len(expected.rows))
    ]
    assert chunk.truncated[rows].tolist() == expected.truncated.tolist()
    assert np.concatenate([d.n_rows for d in slices]).tolist() == np.bincount(chunk.index[rows]).tolist()
    for part in slices:
        ids = [tuple(part.tokens.slice(i).ids) for i in range(len(part.tokens.rows))]
        assert len(set(ids)) == len(ids)
    assert len(slices) == 1 or limit == 10


def test_documents_of_rows_that_are_dropped_are_not_scored(tokenizer):
    chunk = ChunkDocuments(tokenizer)
    assert list(chunk.add(0, pa.array(["a", "b", "a"], pa.large_string()).dictionary_encode())) == []
    assert list(chunk.add(5, pa.array(["c", "b"], pa.large_string()).dictionary_encode())) == []
    left = chunk.finish(8, [slice(0, 5)])
    assert chunk.index.tolist() == [-1, -1, -1, -1, -1, 1, 0, -1] and left.n_rows.tolist() == [1, 1]


def test_tokens_are_taken_in_any_order_and_as_often_as_asked():
    tokens = TokenBatch(
        np.arange(3), np.arange(6, dtype=np.int32), np.array([0, 1, 1, 6]), np.array([True, False, False])
    )
    found = tokens.take(np.array([2, 0, 2, 1]))
    assert found.ids.tolist() == [1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5] and found.lengths.tolist() == [5, 1, 5, 0]
    assert found.truncated.tolist() == [False, True, False, False]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_equal_texts_of_a_chunk_get_the_same_bits(engine, tmp_path, name):
    """Also where only what is cut off differs; in batches of one length the bits would differ."""
    texts = [*probes.SENTENCES[:5], LONG, LONG + " more", None] * 30
    if name == "a.parquet":
        pq.write_table(pa.table({"text": texts}), tmp_path / name, row_group_size=17)
    else:
        lines(tmp_path / name, *[{"text": text} for text in texts])
    summary = score(engine, tmp_path / "out", tmp_path / name)
    found = pq.read_table(tmp_path / "out/a.parquet")
    for head in engine.heads:
        values = found[f"score_{head}"].to_pylist()
        assert values == values[:8] * 30 and values[5] == values[6]
    lengths = found["n_tokens"].to_pylist()
    assert lengths == engine.score(texts).to_table()["n_tokens"].to_pylist()
    assert (summary.documents, summary.null_documents, summary.tokens) == (240, 30, sum(n or 0 for n in lengths))
    assert summary.truncated == sum(value is True for value in found["truncated"].to_pylist()) >= 60
