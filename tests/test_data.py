from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jql_engine.data import Batch, BatchOutput, Budget, DocumentBatch, ScoreBatch, Scores, TokenBatch, score_schema
from jql_engine.files.chunks import Chunk, Segment, StageSeconds

PAD = -1


def batch_of(lengths: list[int], row_length: int | None) -> Batch:
    """Ids count from 0 through all documents."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return Batch(np.arange(len(lengths)), np.arange(offsets[-1], dtype=np.int32), offsets, row_length)


def output(scores: object, width: int = 4) -> BatchOutput:
    """Embeddings are the first score and its multiples."""
    values = np.array(scores, np.float32)
    return BatchOutput(values, values[:, :1] * np.arange(1, width + 1, dtype=np.float32))


def token_batch(rows: list[int], lengths: list[int]) -> TokenBatch:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    truncated = np.arange(len(rows)) % 2 == 1
    return TokenBatch(np.array(rows, np.int64), np.arange(offsets[-1], dtype=np.int32), offsets, truncated)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_a_rectangle_holds_each_document_from_the_left_and_is_masked_after_it(lengths, spare):
    batch = batch_of(lengths, max(lengths) + spare)
    ids, mask = batch.rectangle(PAD)
    assert ids.dtype == mask.dtype == np.int64
    assert ids.shape == mask.shape == (len(lengths), batch.row_length)
    for i, length in enumerate(lengths):
        start = batch.offsets[i]
        assert ids[i].tolist() == [*range(start, start + length), *[PAD] * (batch.row_length - length)]
        assert mask[i].tolist() == [1] * length + [0] * (batch.row_length - length)
    assert batch.n_tokens == mask.sum() and batch.n_padding == (mask == 0).sum()


def test_a_packed_batch_has_no_padding():
    assert batch_of([3, 1, 2], None).n_padding == 0


def test_a_chunk_counts_the_documents_of_all_its_segments():
    assert Chunk((Segment(0, 5, 9), Segment(1, 0, 0), Segment(2, 0, 3))).n_docs == 7


def test_documents_are_numbered_from_zero():
    assert DocumentBatch.of(pa.array(["a", None], pa.large_string())).rows.tolist() == [0, 1]


@given(st.permutations(range(6)), st.integers(1, 6))
@settings(deadline=None, max_examples=50)
def test_scores_put_in_any_order_come_out_by_row(order, size):
    rows = np.array([1, 2, 5, 6, 7, 11])  # rows without a text are missing
    batch = ScoreBatch.empty(token_batch(rows.tolist(), [4, 2, 9, 1, 1, 3]), 2)
    for start in range(0, len(order), size):
        picked = rows[list(order[start : start + size])]
        batch.put(picked, output(np.stack([picked, -picked], axis=1)))
    scores = Scores.spread(batch, ["a", "b"], 13)
    assert len(scores) == 13
    assert np.flatnonzero(scores.valid).tolist() == rows.tolist()
    assert scores.values[rows].tolist() == [[row, -row] for row in rows]
    assert scores.n_tokens[rows].tolist() == [4, 2, 9, 1, 1, 3]
    assert scores.truncated[rows].tolist() == [False, True] * 3
    assert np.isnan(scores.values[~scores.valid]).all()
    assert not scores.n_tokens[~scores.valid].any() and not scores.truncated[~scores.valid].any()


def test_scores_that_were_never_put_are_nan():
    batch = ScoreBatch.empty(token_batch([0, 1], [2, 2]), 3)
    batch.put(np.array([1]), output(np.ones((1, 3))))
    assert np.isnan(batch.values[0]).all() and (batch.values[1] == 1).all()


def test_a_table_of_scores_is_null_where_there_is_no_text():
    batch = ScoreBatch.empty(token_batch([0, 2], [5, 7]), 1)
    batch.put(np.array([2, 0]), output([[2.5], [0.5]]))
    table = Scores.spread(batch, ["edu"], 3).to_table()
    assert table.to_pydict() == {
        "score_edu": [0.5, None, 2.5],
        "n_tokens": [5, None, 7],
        "truncated": [False, None, True],
    }
    assert table.schema.types == [pa.float32(), pa.int32(), pa.bool_()]


@pytest.mark.parametrize(("dtype", "kind"), [(np.float16, pa.float16()), (np.float32, pa.float32())])
def test_kept_embeddings_are_a_column_that_is_null_where_there_is_no_text(dtype, kind):
    batch = ScoreBatch.empty(token_batch([0, 2], [5, 7]), 1, (4, np.dtype(dtype)))
    batch.put(np.array([2, 0]), output([[2.5], [0.1]]))
    scores = Scores.spread(batch, ["edu"], 3)
    assert scores.embeddings.dtype == dtype
    table = scores.to_table()
    assert table.schema.equals(score_schema(["edu"], pa.list_(kind, 4)))
    assert table.column_names == ["score_edu", "n_tokens", "truncated", "embedding"]
    found = table["embedding"].to_pylist()
    assert found[1] is None and found[2] == [2.5, 5, 7.5, 10]
    assert found[0] == (np.float32(0.1) * np.arange(1, 5, dtype=np.float32)).astype(dtype).tolist()


def test_embeddings_are_not_kept_unless_asked_for():
    batch = ScoreBatch.empty(token_batch([0], [5]), 1)
    batch.put(np.array([0]), output([[1.0]]))
    scores = Scores.spread(batch, ["edu"], 1)
    assert batch.embeddings is None and scores.embeddings is None
    assert "embedding" not in scores.to_table().column_names


def test_documents_without_a_row_are_empty_in_a_table_of_none():
    batch = ScoreBatch.empty(TokenBatch.concat([]), 2, (4, np.dtype(np.float16)))
    table = Scores.spread(batch, ["a", "b"], 2).to_table()
    assert table.to_pylist() == [dict.fromkeys(table.column_names)] * 2


@given(st.lists(st.lists(st.integers(0, 5), max_size=4), max_size=5))
@settings(deadline=None, max_examples=60)
def test_joined_token_batches_hold_all_documents_and_each_can_be_taken_out(layouts):
    parts, first = [], 0
    for lengths in layouts:
        parts.append(token_batch(list(range(first, first + len(lengths))), lengths))
        first += len(lengths)
    joined = TokenBatch.concat(parts)
    assert joined.rows.tolist() == list(range(first))
    assert joined.lengths.tolist() == [length for lengths in layouts for length in lengths]
    documents = [part.slice(i) for part in parts for i in range(len(part.rows))]
    for i, document in enumerate(documents):
        taken = joined.slice(i)
        for name in ("rows", "ids", "offsets", "truncated"):
            assert getattr(taken, name).tolist() == getattr(document, name).tolist()
        assert taken.lengths.tolist() == [len(taken.ids)]
    again = TokenBatch.concat([joined.slice(i) for i in range(first)])
    assert all(
        getattr(again, n).tolist() == getattr(joined, n).tolist() for n in ("rows", "ids", "offsets", "truncated")
    )


def test_stage_times_are_added_and_taken_apart():
    first, second = StageSeconds(1, 2, 3), StageSeconds(0.5, 0.25, 0)
    assert first + second == StageSeconds(1.5, 2.25, 3)
    assert first + second - second == first


@pytest.mark.parametrize(
    "build",
    [
        lambda: Segment(0, 3, 2),
        lambda: Budget(0, "exact"),
        lambda: DocumentBatch.of(pa.array(["a"])),
        lambda: TokenBatch(np.arange(1), np.zeros(3, np.int32), np.array([0, 2]), np.zeros(1, np.bool_)),
        lambda: batch_of([4, 2], 3),
        lambda: ScoreBatch.empty(token_batch([1, 0], [2, 2]), 1),
        lambda: Scores(("a",), np.zeros((2, 2), np.float32), np.zeros(2), np.zeros(2), np.zeros(2)),
    ],
    ids=["segment", "budget", "documents", "tokens", "batch", "scores", "spread"],
)
def test_a_noun_refuses_what_contradicts_it(build):
    with pytest.raises(AssertionError):
        build()
