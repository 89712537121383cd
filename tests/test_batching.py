from __future__ import annotations

from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jql_engine.batching import plan_batches
from jql_engine.data import Batch, Budget, Layout, TokenBatch
from jql_engine.errors import InputError

LAYOUTS = get_args(Layout)
LENGTHS = st.lists(st.one_of(st.integers(0, 6), st.integers(1, 200)), max_size=60)
TOKENS = st.one_of(st.integers(1, 30), st.integers(1, 2000))

any_plan = given(lengths=LENGTHS, tokens=TOKENS, layout=st.sampled_from(LAYOUTS))
often = settings(deadline=None, max_examples=80)


def documents(lengths: list[int]) -> TokenBatch:
    """Every id of all documents is another number; rows have gaps, as where texts are null."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    rows = 2 * np.arange(len(lengths), dtype=np.int64) + 1
    return TokenBatch(rows, np.arange(offsets[-1], dtype=np.int32), offsets, np.zeros(len(lengths), np.bool_))


def batches_of(lengths: list[int], tokens: int, layout: Layout) -> list[Batch]:
    return list(plan_batches(documents(lengths), Budget(tokens, layout)))


def cost(batch: Batch, n_more: int = 0, longer: int = 0) -> int:
    """Tokens that count against the budget, with `n_more` documents of `longer` tokens besides."""
    if batch.row_length is None:
        return batch.n_tokens + n_more * longer
    return (len(batch.rows) + n_more) * max(1, batch.row_length)


@often
@any_plan
def test_every_document_is_in_one_batch_with_its_own_ids(lengths, tokens, layout):
    given_documents = documents(lengths)
    found = {}
    for batch in batches_of(lengths, tokens, layout):
        for i, row in enumerate(batch.rows.tolist()):
            assert row not in found
            found[row] = batch.ids[batch.offsets[i] : batch.offsets[i + 1]].tolist()
    ids = np.split(given_documents.ids, given_documents.offsets[1:-1]) if lengths else []
    assert found == {row: ids[i].tolist() for i, row in enumerate(given_documents.rows.tolist())}


@often
@any_plan
def test_the_budget_is_kept_unless_one_document_alone_is_longer(lengths, tokens, layout):
    for batch in batches_of(lengths, tokens, layout):
        assert cost(batch) <= tokens or len(batch.rows) == 1


@often
@any_plan
def test_a_batch_takes_the_next_document_as_long_as_it_fits(lengths, tokens, layout):
    batches = batches_of(lengths, tokens, layout)
    for batch, after in pairwise(batches):
        following = int(np.diff(after.offsets).max())
        fits = cost(batch, 1, following) <= tokens
        assert not fits or (layout == "exact" and following < batch.row_length)


@often
@any_plan
def test_each_layout_has_its_row_length(lengths, tokens, layout):
    for batch in batches_of(lengths, tokens, layout):
        found = np.diff(batch.offsets)
        if layout == "packed":
            assert batch.row_length is None
        else:
            assert batch.row_length == found.max()
        if layout == "exact":
            assert len(set(found.tolist())) == 1 and batch.n_padding == 0


@often
@any_plan
def test_documents_come_from_the_longest_to_the_shortest(lengths, tokens, layout):
    batches = batches_of(lengths, tokens, layout)
    for batch, after in pairwise(batches):
        assert np.diff(batch.offsets).min() >= np.diff(after.offsets).max()
    if lengths:
        assert np.diff(batches[0].offsets).max() == max(lengths)


@often
@any_plan
def test_the_same_documents_give_the_same_batches_again(lengths, tokens, layout):
    first, second = batches_of(lengths, tokens, layout), batches_of(lengths, tokens, layout)
    assert [batch.rows.tolist() for batch in first] == [batch.rows.tolist() for batch in second]


BUCKETS = st.lists(st.integers(1, 120), max_size=6, unique=True).map(lambda some: (*sorted(some), 200))
bucketed_plan = given(lengths=LENGTHS, tokens=TOKENS, buckets=BUCKETS)


@often
@bucketed_plan
def test_a_bucketed_document_is_padded_to_the_smallest_bucket_that_holds_it(lengths, tokens, buckets):
    budget, seen = Budget(tokens, "padded", buckets), []
    for batch in plan_batches(documents(lengths), budget):
        found = np.diff(batch.offsets).tolist()
        assert {min(bucket for bucket in buckets if bucket >= n) for n in found} == {batch.row_length}
        assert len(found) <= budget.max_docs(batch.row_length) and (cost(batch) <= tokens or len(found) == 1)
        seen += batch.rows.tolist()
    assert sorted(seen) == documents(lengths).rows.tolist()


@often
@bucketed_plan
def test_only_the_last_batch_of_a_bucket_has_room(lengths, tokens, buckets):
    budget = Budget(tokens, "padded", buckets)
    for batch, after in pairwise(plan_batches(documents(lengths), budget)):
        full = len(batch.rows) == budget.max_docs(batch.row_length)
        assert full or after.row_length < batch.row_length


@often
@bucketed_plan
def test_the_number_of_shapes_is_that_of_the_buckets(lengths, tokens, buckets):
    shapes = {batch.row_length for batch in plan_batches(documents(lengths), Budget(tokens, "padded", buckets))}
    assert shapes <= set(buckets)


def test_a_document_longer_than_every_bucket_raises():
    with pytest.raises(InputError, match="has 33 tokens, the longest that this session was opened for has 32"):
        next(plan_batches(documents([5, 33, 7]), Budget(64, "padded", (8, 32))))


@pytest.mark.parametrize("buckets", [(8, 8), (8, 4), (0, 4)])
def test_buckets_ascend(buckets):
    with pytest.raises(AssertionError):
        Budget(64, "padded", buckets)


def test_a_part_of_a_batch_is_a_batch():
    whole = next(plan_batches(documents([3, 4, 5]), Budget(100, "padded")))
    part = whole.part(1, 3, 8)
    assert (part.row_length, part.rows.tolist()) == (8, whole.rows[1:].tolist())
    ids, mask = part.rectangle(0)
    assert ids[mask == 1].tolist() == whole.ids[whole.offsets[1] :].tolist() and ids.shape == (2, 8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_document_gives_no_batch(layout):
    assert batches_of([], 100, layout) == []


@pytest.mark.parametrize(
    ("layout", "tokens", "expected"),
    [
        ("exact", 10, [[12], [5, 5], [3, 3, 3]]),
        ("exact", 8, [[12], [5], [5], [3, 3], [3]]),
        ("padded", 16, [[12], [3, 5, 5], [3, 3]]),
        ("packed", 16, [[12], [3, 3, 5, 5], [3]]),
    ],
)
def test_a_plan_is_the_one_written_here(layout, tokens, expected):
    batches = batches_of([3, 5, 3, 12, 5, 3], tokens, layout)
    assert [np.diff(batch.offsets).tolist() for batch in batches] == expected
