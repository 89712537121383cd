from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jql_engine import Engine, probe_texts
from jql_engine.bundle import TokenizerInfo, WindowsInfo
from jql_engine.data import DocumentBatch, TokenBatch
from jql_engine.errors import InputError
from jql_engine.tokenizer import Tokenizer, enclosed
from jql_engine.windows import Windows
from jql_export.tolerances import TOLERANCES

TAKES = ("first", "first+last", "all")
LONG = [" ".join(probe_texts.SENTENCES), " ".join(probe_texts.SENTENCES * 5)]
TEXTS = ["short", None, *LONG, "", LONG[0][: len(LONG[0]) // 3]]


def starts(n: int, room: int, take: str) -> list[int]:
    """Where the windows of a document of `n` ids begin."""
    if take == "first" or n <= room:
        return [0]
    return [0, n - room] if take == "first+last" else [*range(0, n - room, room), n - room]


def ids_of(tokens: TokenBatch) -> list[list[int]]:
    return [tokens.slice(i).ids.tolist() for i in range(len(tokens.rows))]


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), max_size=8), st.integers(1, 12), st.sampled_from(TAKES), st.booleans())
def test_windows_are_cut_from_the_ids_and_closed_with_the_special_tokens(lengths, room, take, has_prefix):
    special = TokenizerInfo([1000] if has_prefix else [], [2000, 2001], 0, None, None, [])
    documents = [list(range(100 * i, 100 * i + n)) for i, n in enumerate(lengths)]
    content = np.array([token for document in documents for token in document], np.int32)
    tokens = enclosed(np.arange(len(lengths)), content, np.array(lengths, int), np.zeros(len(lengths), bool), special)
    found = Windows(WindowsInfo(take), special, room).cut(tokens)
    expected = [
        (number, place == 0, special.prefix + document[start : start + room] + special.suffix)
        for number, document in enumerate(documents)
        for place, start in enumerate(starts(len(document), room, take))
    ]
    assert list(zip(found.document, found.is_first, ids_of(found.tokens), strict=True)) == expected
    assert found.tokens.rows.tolist() == list(range(len(expected)))


@pytest.mark.parametrize("take", TAKES)
def test_the_tokenizer_keeps_what_windows_are_cut_from(bundle, take):
    documents = DocumentBatch.of(pa.array(TEXTS, pa.large_string()))
    whole = Tokenizer.of(bundle.with_windows("all", None)).encode(documents)
    kept = Tokenizer.of(bundle.with_windows(take, None)).encode(documents)
    windows = Windows.of(bundle.with_windows(take, None))
    assert ids_of(windows.cut(kept).tokens) == ids_of(windows.cut(whole).tokens)
    content = whole.lengths - len(windows.special.prefix) - len(windows.special.suffix)
    covered = {"first": windows.room, "first+last": 2 * windows.room, "all": np.inf}[take]
    assert kept.truncated.tolist() == (content > covered).tolist()
    assert (kept.lengths - whole.lengths + content).tolist() == np.minimum(content, covered).tolist()


@pytest.mark.parametrize("aggregate", ["max", "mean"])
@pytest.mark.parametrize("take", ["first+last", "all"])
def test_the_score_of_a_document_is_the_aggregate_of_its_windows(bundle, engine, take, aggregate):
    windowed = Engine(bundle, device="cpu", windows=take, aggregate=aggregate)
    found = windowed.score(TEXTS)
    tokens = windowed.tokenizer.encode(DocumentBatch.of(pa.array(TEXTS, pa.large_string())))
    windows = windowed.windows.cut(tokens)
    alone = engine.score_tokens(windows.tokens).values
    documents = np.array(found.valid).nonzero()[0][windows.document]
    for i in np.flatnonzero(found.valid):
        own = alone[documents == i].astype(np.float64)
        expected = own.max(axis=0) if aggregate == "max" else own.mean(axis=0)
        np.testing.assert_allclose(found.values[i], expected, rtol=0, atol=TOLERANCES["fp32"].batch)
        assert found.n_windows[i] == len(own)
    assert found.n_windows.max() > 2 or take == "first+last"
    assert np.isnan(found.values[1]).all() and found.n_windows[1] == 0
    assert found.to_table().schema.names[-1] == "n_windows" and found.to_table()["n_windows"].null_count == 1


def test_the_first_window_alone_is_what_was_always_scored(bundle, engine):
    found = Engine(bundle, device="cpu", windows="first").score(TEXTS)
    np.testing.assert_array_equal(found.values, engine.score(TEXTS).values)
    assert found.n_windows is None and "n_windows" not in found.to_table().column_names


def test_an_aggregate_of_one_window_and_an_embedding_of_several_are_errors(bundle):
    with pytest.raises(InputError, match=r"mean of one window is its score: give windows first\+last or all"):
        Engine(bundle, device="cpu", aggregate="mean")
    with pytest.raises(InputError, match=r"'last' is no rule for windows; known are first, first\+last, all"):
        Engine(bundle, device="cpu", windows="last")
    with pytest.raises(InputError, match="'median' is no rule for windows; known are max, mean"):
        Engine(bundle, device="cpu", windows="all", aggregate="median")
    with pytest.raises(InputError, match="an embedding is of one window, and windows are all"):
        Engine(bundle, device="cpu", windows="all").embed(["text"])
