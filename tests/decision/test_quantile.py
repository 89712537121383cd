from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jql_engine.decision import partition
from jql_engine.decision.order import keys_of
from jql_engine.decision.partition import MOST_BINS, MOST_SERIES, Partition, Sample
from jql_engine.decision.quantile import exact_scores, quantiles
from jql_engine.errors import InputError

N = 1_000_000
AT = [0.0, 0.001, 0.07, 0.29, 0.5, 0.6, 0.7, 0.8, 0.9, 0.999999, 1.0]
SCORES = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "heavy-tied": lambda rng, n: np.round(2.5 + rng.standard_normal(n), 1),
    "constant": lambda _, n: np.full(n, 2.5),
    "signed": lambda rng, n: rng.choice([-1.5, -0.0, 0.0, 1.5], n, p=[0.2, 0.3, 0.3, 0.2]),
    "denormal": lambda rng, n: rng.standard_normal(n) * 1e-41,
    "of any size": lambda rng, n: rng.standard_normal(n) * 10.0 ** rng.integers(-40, 37, n),
}


def passes(scores: np.ndarray, slots: np.ndarray, weights: np.ndarray, size: int = 65_536):
    """Documents `size` at a time."""

    def samples() -> Iterator[Sample]:
        for start in range(0, len(slots), size):
            here = slice(start, start + size)
            yield Sample(slots[here], keys_of(scores[:, here]), weights[here], weights[here])

    return samples


def totals_of(slots: np.ndarray, weights: np.ndarray) -> np.ndarray:
    totals = np.zeros(slots.max() + 1, np.int64)
    np.add.at(totals, slots, weights)
    return totals


def expected(scores: np.ndarray, n_tokens: np.ndarray | None, at: list[float] = AT) -> np.ndarray:
    """NumPy's; of equal zeros it returns any, ours is positive."""
    weights = {} if n_tokens is None else {"weights": n_tokens}
    return np.quantile(scores, np.array(at), method="inverted_cdf", **weights) + np.float32(0)


def assert_same_bits(found: np.ndarray, right: np.ndarray) -> None:
    assert found.dtype == right.dtype == np.float32
    assert found.view(np.int32).tolist() == right.view(np.int32).tolist()


@pytest.mark.parametrize("weight", ["documents", "tokens"])
@pytest.mark.parametrize("kind", SCORES)
def test_quantiles_of_a_million_scores_are_numpys_to_the_last_bit(kind, weight):
    rng = np.random.default_rng(1)
    scores = SCORES[kind](rng, N).astype(np.float32)
    n_tokens = np.minimum(8192, rng.lognormal(6, 1, N)).astype(np.int64)
    slots, weights = np.zeros(N, np.int64), n_tokens if weight == "tokens" else np.ones(N, np.int64)
    found = quantiles(passes(scores[None], slots, weights), totals_of(slots, weights), 1, AT, weight)
    assert_same_bits(found[0, 0], expected(scores, n_tokens if weight == "tokens" else None))


@pytest.mark.parametrize("root_bins", [1 << 23, 64])
@pytest.mark.parametrize("weight", ["documents", "tokens"])
def test_every_head_and_group_has_its_own_however_often_bins_are_cut(weight, root_bins, monkeypatch):
    monkeypatch.setattr(partition, "ROOT_BINS", root_bins)
    rng = np.random.default_rng(2)
    n, n_slots = 60_000, 7
    scores = np.stack([make(rng, n) for make in SCORES.values()]).astype(np.float32)
    slots = rng.choice(n_slots, n, p=[0.5, 0.3, 0.1, 0.05, 0.04, 0.0099, 0.0001])
    n_tokens = rng.integers(0, 8192, n)
    weights = n_tokens if weight == "tokens" else np.ones(n, np.int64)
    found = quantiles(passes(scores, slots, weights, 999), totals_of(slots, weights), len(scores), AT, weight)
    for slot in range(n_slots):
        for head in range(len(scores)):
            here = slots == slot
            right = expected(scores[head, here], n_tokens[here] if weight == "tokens" else None)
            assert_same_bits(found[slot, head], right)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(0, 3), st.integers(1, 99)),
        min_size=1,
        max_size=50,
    ),
    st.floats(0, 1),
)
def test_any_scores_have_numpys_quantiles(documents, quantile):
    scores = np.array([[score for score, _, _ in documents]], np.float32)
    slots = np.unique([slot for _, slot, _ in documents], return_inverse=True)[1]
    n_tokens = np.array([tokens for _, _, tokens in documents])
    ones = np.ones_like(n_tokens)
    by_documents = quantiles(passes(scores, slots, ones), totals_of(slots, ones), 1, [quantile], "documents")
    by_tokens = quantiles(passes(scores, slots, n_tokens), totals_of(slots, n_tokens), 1, [quantile], "tokens")
    for slot in range(slots.max() + 1):
        here = slots == slot
        assert_same_bits(by_documents[slot, 0], expected(scores[0, here], None, [quantile]))
        assert_same_bits(by_tokens[slot, 0], expected(scores[0, here], n_tokens[here], [quantile]))


def test_two_passes_are_enough_for_three_heads_in_fifteen_languages():
    rng = np.random.default_rng(3)
    scores, slots = rng.standard_normal((3, 50_000)).astype(np.float32), rng.integers(0, 15, 50_000)
    ones, n_passes = np.ones(50_000, np.int64), []
    samples = passes(scores, slots, ones)
    quantiles(lambda: n_passes.append(1) or samples(), totals_of(slots, ones), 3, [0.6, 0.7], "documents")
    assert len(n_passes) == 2


def test_thousands_of_groups_take_no_gigabytes():
    rng = np.random.default_rng(4)
    n, n_slots = 200_000, 5_000
    scores, slots = rng.standard_normal((3, n)).astype(np.float32), np.arange(n) % n_slots
    ones = np.ones(n, np.int64)
    at = [0.6]
    tracemalloc.start()
    try:
        found = quantiles(passes(scores, slots, ones), totals_of(slots, ones), 3, at, "documents")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 * MOST_BINS, f"{peak >> 20} MiB"
    for slot in range(0, n_slots, 500):
        for head in range(3):
            assert_same_bits(found[slot, head], expected(scores[head, slots == slot], None, at))


def test_bins_stay_within_their_bound_where_many_are_cut(monkeypatch):
    """All bins of 100 series are asked for: no room for all of them at once, and the scores are exact all the same."""
    monkeypatch.setattr(partition, "ROOT_BINS", 1 << 10)
    monkeypatch.setattr(partition, "MOST_BINS", 1 << 14)
    rng = np.random.default_rng(5)
    scores, slots = rng.standard_normal((1, 5_000)).astype(np.float32), np.arange(5_000) % 100
    ones = np.ones(5_000, np.int64)
    samples = passes(scores, slots, ones)
    cut = Partition(100, 1)
    cut.count(samples())
    found = exact_scores(cut, samples, np.arange(100), np.full(100, 25))
    assert cut.n_bins <= 1 << 14
    for slot in range(100):
        assert found[slot] == np.sort(scores[0, slots == slot])[24]


def test_too_many_groups_are_an_error_that_says_what_to_do():
    with pytest.raises(InputError, match=r"20,001 groups .* 20,000 .* --min-group"):
        Partition(MOST_SERIES + 1, 1)
