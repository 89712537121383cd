from __future__ import annotations

import numpy as np

from jql_engine.decision.order import ZERO, keys_of, scores_of


def every_kind() -> np.ndarray:
    """Finite float32 of any bits: both signs, denormals, the largest, both zeros."""
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, np.uint64).astype(np.uint32)
    edges = np.array([0, 0x80000000, 1, 0x80000001, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0xFF7FFFFF], np.uint32)
    scores = np.concatenate([bits, edges]).view(np.float32)
    return scores[np.isfinite(scores)]


def test_keys_order_as_scores_do():
    scores = np.sort(every_kind())
    steps = np.diff(keys_of(scores))
    assert (steps >= 0).all()
    assert ((steps == 0) == (np.diff(scores.astype(np.float64)) == 0)).all()


def test_keys_lead_back_to_the_same_bits_but_for_the_sign_of_zero():
    scores = every_kind()
    back = scores_of(keys_of(scores))
    assert back.dtype == np.float32
    assert (back.view(np.int32)[scores != 0] == scores.view(np.int32)[scores != 0]).all()
    assert (back.view(np.int32)[scores == 0] == 0).all()


def test_both_zeros_have_one_key_between_the_smallest_numbers():
    keys = keys_of(np.array([-1e-45, -0.0, 0.0, 1e-45], np.float32))
    assert keys.tolist() == [ZERO - 1, ZERO, ZERO, ZERO + 1]


def test_keys_fit_the_bits_that_are_cut_into_bins():
    keys = keys_of(every_kind())
    assert keys.min() >= 0
    assert keys.max() < 1 << 32
