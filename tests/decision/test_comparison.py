"""Comparison of two sets of scores, measured against NumPy and SciPy-free recomputation on whole columns."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jql_engine.decision.comparison import BANDS, CUTS, Paired, compare, flips_at, spearman
from jql_engine.errors import InputError


def paired(n: int = 6_000, noise: float = 0.05, seed: int = 0, heads: int = 3) -> Paired:
    rng = np.random.default_rng(seed)
    first = rng.normal(size=(heads, n)).astype(np.float32)
    second = (first + rng.normal(scale=noise, size=first.shape)).astype(np.float32)
    groups = rng.integers(0, 3, n)
    groups[:40] = 3  # a group too small for thresholds of its own
    names = ("de", "en", None, "sw")
    return Paired(("a", "b", "c")[:heads], first, second, rng.integers(2, 5_000, n), groups, names)


def kept(scores: np.ndarray, groups: np.ndarray, cut: float) -> np.ndarray:
    """The rule of the paper, group by group; group 3 by the thresholds of all."""
    found = np.zeros(scores.shape, bool)
    for group in range(4):
        own = scores if group == 3 else scores[:, groups == group]
        limit = np.quantile(own, cut, axis=1, method="inverted_cdf")
        found[:, groups == group] = scores[:, groups == group] >= limit[:, None]
    return found


def test_flips_are_documents_that_are_kept_by_one_set_alone():
    pair = paired()
    found = compare(pair)
    for cut in CUTS:
        one, other = (kept(scores, pair.groups, cut) for scores in (pair.first, pair.second))
        by_name = {flip.what: flip for flip in found.whole.flips if flip.cut == cut}
        for head, a, b in zip(pair.heads, one, other, strict=True):
            assert by_name[head].documents == (a != b).sum() > 0
        assert by_name["all"].documents == (one.all(0) != other.all(0)).sum()
        assert by_name["any"].documents == (one.any(0) != other.any(0)).sum()
        mean = [scores.astype(float).mean(0).astype(np.float32)[None] for scores in (pair.first, pair.second)]
        sides = [kept(scores, pair.groups, cut)[0] for scores in mean]
        assert by_name["mean"].documents == (sides[0] != sides[1]).sum()
    assert [one.what for one in flips_at(found.whole, 0.6)] == ["a", "b", "c", "all"]


def test_slices_are_groups_and_bands_of_lengths_and_add_up():
    pair = paired()
    found = compare(pair)
    groups = {one.group: one for one in found.slices if one.has_group and one.tokens is None}
    assert list(groups) == ["de", "en", "sw", None]
    assert sum(one.documents for one in groups.values()) == found.compared == 6_000
    bands = [one for one in found.slices if not one.has_group and one.tokens is not None]
    assert [one.tokens for one in bands] == [(1, 128), (129, 512), (513, 2_048), (2_049, None)] and BANDS[-1] == 2_048
    for flip, *parts in zip(found.whole.flips, *(one.flips for one in bands), strict=True):
        assert flip.documents == sum(part.documents for part in parts)
    for flip, *parts in zip(found.whole.flips, *(one.flips for one in groups.values()), strict=True):
        assert flip.documents == sum(part.documents for part in parts)


def test_differences_are_of_absolute_values():
    pair = paired(heads=1)
    [difference] = compare(pair).whole.differences
    apart = np.abs(pair.first.astype(float) - pair.second)[0]
    assert difference.greatest == apart.max()
    assert difference.quantiles == tuple(np.quantile(apart, [0.5, 0.9, 0.99, 0.999], method="inverted_cdf"))
    assert not [flip for flip in compare(pair).whole.flips if flip.is_rule], "one head decides alone"


def test_equal_and_shifted_scores_change_nothing():
    pair = paired(noise=0)
    for second in (pair.second, pair.second * 2):
        found = compare(Paired(pair.heads, pair.first, second, pair.n_tokens, pair.groups, pair.names))
        assert all(flip.documents == 0 and flip.interval[0] == 0 for flip in found.whole.flips)
        assert all(0 < flip.interval[1] < 0.001 for flip in found.whole.flips)
        assert all(difference.spearman == pytest.approx(1) for difference in found.whole.differences)


def test_ranks_of_equal_scores_are_shared():
    a, b = np.array([1, 1, 2, 3], np.float32), np.array([1, 2, 2, 4], np.float32)
    ranks = np.corrcoef([1.5, 1.5, 3, 4], [1, 2.5, 2.5, 4])[0, 1]
    assert spearman(a, b) == pytest.approx(ranks)
    assert spearman(a, np.ones(4, np.float32)) is None


def test_documents_without_a_score_in_one_set_are_counted_and_left_out():
    pair = paired(n=100)
    pair.first[0, :3], pair.second[1, 2:7] = np.nan, np.inf
    found = compare(pair)
    assert (found.documents, found.compared, found.only_first, found.only_second) == (100, 93, 4, 2)


def test_a_group_without_a_document_in_both_sets_has_no_slice():
    pair = paired(n=100)
    pair.first[0, pair.groups == 1] = np.nan
    found = compare(pair)
    assert [one.group for one in found.slices if one.has_group and one.tokens is None] == ["de", "sw", None]


def test_what_is_written_is_json_with_every_figure():
    found = compare(paired(n=50))
    fields = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert fields["cuts"] == list(CUTS) and len(fields["slices"]) == len(found.slices)
    assert fields["slices"][0]["flips"][0]["documents"] == found.whole.flips[0].documents


@pytest.mark.parametrize("n", [0, 5])
def test_nothing_to_compare_is_an_error(n):
    scores, zeros = np.full((1, n), np.nan, np.float32), np.zeros(n, int)
    with pytest.raises(InputError, match=f"none of the {n} documents has finite scores in both sets"):
        compare(Paired(("a",), scores, scores, zeros, zeros, (None,)))
