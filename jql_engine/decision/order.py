"""Float32 scores as integers in the same order, so that they can be counted in bins without loss."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

KEY_BITS = 32
MAGNITUDE = np.int32(0x7FFFFFFF)  # all bits but the sign
ZERO = 1 << 31  # the key of 0.0


def keys_of(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """Keys in [0, 2^32) that compare as the finite `scores` do; -0.0 and 0.0 have one key, int64 of the same shape.

    A float32 is a sign and a magnitude whose bits order as the numbers do.
    """
    bits = np.ascontiguousarray(scores).view(np.int32)
    magnitudes = bits & MAGNITUDE
    return np.where(bits < 0, -magnitudes, magnitudes).astype(np.int64) + ZERO


def scores_of(keys: NDArray[np.int64]) -> NDArray[np.float32]:
    """The scores that have these keys, float32 of the same shape."""
    signed = np.asarray(keys) - ZERO
    bits = np.where(signed < 0, ZERO - signed, signed)
    return bits.astype(np.uint32).view(np.float32)
