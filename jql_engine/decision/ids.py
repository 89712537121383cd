"""Ids of rows that should be the same: where two columns differ."""

from __future__ import annotations

from typing import Any

import pyarrow as pa


def first_difference(one: pa.Array, other: pa.Array) -> tuple[int, Any, Any] | None:
    """The first row at which the ids differ, and both; None where all are equal. Null and NaN equal themselves."""
    if one.equals(other):
        return None
    for row, (a, b) in enumerate(zip(one.to_pylist(), other.to_pylist(), strict=True)):
        if a != b and not (a != a and b != b):
            return row, a, b
    return None
