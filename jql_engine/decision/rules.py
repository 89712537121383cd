"""Rules that join several heads' scores into one decision about a document."""

from __future__ import annotations

from typing import Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

# all: every head's score reaches its threshold, as in the JQL paper; any: one does; mean: the mean of the scores does.
Rule: TypeAlias = Literal["all", "any", "mean"]
RULES: tuple[Rule, ...] = ("all", "any", "mean")
T = TypeVar("T", bound=np.generic)


def judged_heads(rule: Rule, heads: tuple[str, ...]) -> tuple[str, ...]:
    """What has thresholds: the J heads, or their mean."""
    return ("mean",) if rule == "mean" else heads


def judged_scores(rule: Rule, scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """What is compared with the thresholds, float32 [J, n], of finite `scores` [H, n].

    The mean is summed in float64, head by head, and rounded to float32.
    """
    if rule != "mean":
        return scores
    total = np.zeros(scores.shape[1])
    for one in scores:
        total += one
    return (total / len(scores)).astype(np.float32)[None]


def join(rule: Rule, values: NDArray[T]) -> NDArray[T]:
    """One value a document, [n], of one for each head, [J, n]: whether it is reached, or up to which quantile it is."""
    joined: NDArray[T] = values.max(axis=0) if rule == "any" else values.min(axis=0)
    return joined
