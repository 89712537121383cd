from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jql_engine.decision.ranks import last_quantile, needed_weight, smallest_with_share

QUANTILES = st.one_of(
    st.floats(0, 1),
    st.sampled_from([0.0, 0.07, 0.1, 0.29, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
    st.tuples(st.integers(0, 1000), st.integers(1, 1000)).map(lambda pair: min(1.0, pair[0] / pair[1])),
)


def neighbours(quantile: float) -> list[float]:
    """With those next to it, where rounding decides."""
    below, above = np.nextafter(quantile, 0), min(1.0, np.nextafter(quantile, 2))
    return [float(below), quantile, float(above)]


@given(st.integers(1, 500), QUANTILES)
def test_the_rank_of_documents_is_numpys(n, quantile):
    ranks = np.arange(1, n + 1, dtype=np.float32)
    for q in neighbours(quantile):
        assert needed_weight(n, q, "documents") == np.quantile(ranks, np.array(q), method="inverted_cdf")


@given(st.lists(st.integers(0, 9000), min_size=1, max_size=60).filter(any), QUANTILES)
def test_the_score_that_tokens_lead_to_is_numpys(n_tokens, quantile):
    upto = np.cumsum(n_tokens)
    places = np.arange(len(n_tokens), dtype=np.float32)
    for q in neighbours(quantile):
        found = np.searchsorted(upto, needed_weight(int(upto[-1]), q, "tokens"))
        assert found == np.quantile(places, np.array(q), method="inverted_cdf", weights=n_tokens)


@pytest.mark.parametrize("weight", ["documents", "tokens"])
@given(total=st.integers(1, 10**12), share=st.floats(0, 1), quantile=QUANTILES)
def test_a_score_is_kept_up_to_its_last_quantile_and_not_beyond(weight, total, share, quantile):
    upto = max(1, round(total * share))
    last = float(last_quantile(np.array([upto]), np.array([total]), weight)[0])
    for q in [*neighbours(quantile), *neighbours(last)]:
        assert (upto >= needed_weight(total, q, weight)) == (q <= last)


@given(st.integers(1, 10**13), st.floats(0, 1))
def test_the_smallest_weight_with_a_share_is_neither_too_small_nor_too_large(total, share):
    found = smallest_with_share(total, share)
    assert found / total >= share
    assert found == 1 or (found - 1) / total < share
