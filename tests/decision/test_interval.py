from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from jql_engine.decision.interval import effective_size, rank_interval, weight_interval


@given(st.integers(1, 200_000), st.floats(0.001, 0.999))
def test_ranks_are_those_of_the_binomial_distribution(n, quantile):
    lower, upper = rank_interval(n, quantile)
    ends = stats.binom.ppf([0.025, 0.975], n, quantile)
    # One rank off, where the two sum up tails of just 2.5 % with other roundings.
    assert abs((lower or 0) - ends[0]) <= 1
    assert abs((n + 1 if upper is None else upper) - (ends[1] + 1)) <= 1


@pytest.mark.parametrize("n", [10**6, 10**9, 10**11])
def test_large_samples_have_the_ranks_of_the_normal_distribution(n):
    lower, upper = rank_interval(n, 0.6)
    deviation = 1.959964 * np.sqrt(n * 0.6 * 0.4)
    assert lower == pytest.approx(0.6 * n - deviation, abs=2)
    assert upper == pytest.approx(0.6 * n + deviation, abs=2)


def test_a_sample_that_is_too_small_bounds_nothing():
    assert rank_interval(10, 0.9) == (7, None)
    assert rank_interval(10, 0.1) == (None, 4)
    assert rank_interval(1000, 0.0) == rank_interval(1000, 1.0) == (None, None)


@pytest.mark.parametrize("by_tokens", [False, True])
def test_the_interval_holds_the_true_threshold_of_nineteen_samples_in_twenty(by_tokens):
    rng = np.random.default_rng(0)
    held, n = 0, 400
    for _ in range(2000):
        scores = rng.random(n)  # whose quantile 0.7 is 0.7
        weights = rng.lognormal(6, 1, n).astype(np.int64) if by_tokens else np.ones(n, np.int64)
        upto = np.cumsum(weights[np.argsort(scores)])
        size = effective_size(upto[-1:], np.array([np.square(weights, dtype=np.float64).sum()]))
        ends = np.searchsorted(upto, weight_interval(int(upto[-1]), int(size[0]), 0.7))
        lower, upper = np.sort(scores)[ends]
        held += lower <= 0.7 <= upper
    assert 0.93 < held / 2000 < 0.97
