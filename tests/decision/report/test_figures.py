"""Figures of a report, measured against NumPy and SciPy on whole columns."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from jql_engine.decision.report import agreement, extremes, measure, sampling
from jql_engine.decision.report.figures import QUANTILES, Scope
from jql_engine.decision.report.report import take_figures
from jql_engine.errors import InputError
from tests.decision.report.conftest import MIN_GROUP
from tests.decision.report.made import GROUPS, HEADS, make


def thresholds_of(made, scores: np.ndarray, group: int | None, weight: str) -> np.ndarray:
    """Of the rows of `scores` [J, n], with scores of all heads, [J, Q]; group None is all of them."""
    chosen = made.is_scored if group is None else made.is_scored & (made.groups == group)
    weights = None if weight == "documents" else made.n_tokens[chosen]
    own = [one[chosen] for one in scores]
    return np.array(
        [[np.quantile(one, [q], method="inverted_cdf", weights=weights)[0] for q in QUANTILES] for one in own]
    )


def judged(made) -> np.ndarray:
    """The heads and their mean."""
    mean = (made.values.astype(np.float64).sum(axis=0) / 3).astype(np.float32)
    return np.concatenate([made.values, mean[None]])


@pytest.mark.parametrize("weight", ["documents", "tokens"])
def test_thresholds_and_what_is_kept_by_them_are_numpys(made, sources, weight):
    found = take_figures(sources, weight, MIN_GROUP)
    scores, kept = judged(made), {}
    for group, name in enumerate(GROUPS):
        own = made.is_scored & (made.groups == group)
        is_pooled = own.sum() < MIN_GROUP
        expected = thresholds_of(made, scores, None if is_pooled else group, weight)
        (part,) = [one for one in found.groups if one.scope == Scope("group", name, 1)]
        assert part.is_pooled == is_pooled == (name is None)
        assert np.array_equal(part.thresholds, expected)
        reached = scores[:, None, :] >= expected[..., None]  # [J, Q, n]
        by_rule = {"all": reached[:3].all(0), "any": reached[:3].any(0), "mean": reached[3]}
        assert [(one.rule, one.quantile) for one in part.kept] == [(r, q) for r in by_rule for q in QUANTILES]
        for one in part.kept:
            is_kept = by_rule[one.rule][QUANTILES.index(one.quantile)] & own
            assert (one.documents, one.tokens) == (is_kept.sum(), made.n_tokens[is_kept].sum())
            assert one.document_share == is_kept.sum() / own.sum()
            assert one.token_share == made.n_tokens[is_kept].sum() / made.n_tokens[own].sum()
            kept[one.rule, one.quantile] = kept.get((one.rule, one.quantile), 0) + one.documents
    assert {(one.rule, one.quantile): one.documents for one in found.whole.kept} == kept
    assert np.array_equal(found.whole.thresholds, thresholds_of(made, scores, None, weight))


def test_counts_of_documents_tokens_and_missing_scores(made, figures):
    whole = figures.whole
    assert (whole.documents, whole.scored) == (2_000, 1_993)
    assert (whole.null, whole.nan, whole.infinite) == (4, 1, 2)
    assert whole.tokens == made.n_tokens[made.is_scored].sum()
    assert whole.truncated == (made.truncated & made.is_scored).sum()
    assert [part.documents for part in figures.groups] == sorted(np.bincount(made.groups).tolist(), reverse=True)
    for number, part in enumerate(figures.groups):  # the groups of this seed are in the order of their sizes
        own = made.is_scored & (made.groups == number)
        assert (part.scored, part.truncated) == (own.sum(), (made.truncated & own).sum())
    assert [(one.finite, one.null, one.nan, one.infinite) for one in figures.heads] == [
        (1_995, 4, 1, 0), (1_995, 4, 0, 1), (1_995, 4, 0, 1),
    ]  # fmt: skip


def test_histograms_are_numpys(made, figures):
    for values, head in zip(made.values, figures.heads, strict=True):
        finite = np.isfinite(values)
        assert (head.least, head.greatest) == (values[finite].min(), values[finite].max())
        assert [one.scope.kind for one in head.histograms] == ["all"] + ["group"] * 4
        for one in head.histograms:
            own = finite if one.scope.kind == "all" else finite & (made.groups == GROUPS.index(one.scope.group))
            expected = np.histogram(values[own].astype(np.float64), np.array(head.edges))[0]
            assert list(one.documents) == expected.tolist()


def test_lengths_are_counted_in_bands_that_double(made, figures):
    lengths = made.n_tokens[made.is_scored]
    assert [(band.least, band.most) for band in figures.lengths][:2] == [(2, 3), (4, 7)]
    for band in figures.lengths:
        own = made.is_scored & (made.n_tokens >= band.least) & (made.n_tokens <= band.most)
        assert (band.documents, band.tokens) == (own.sum(), made.n_tokens[own].sum())
        assert band.truncated == (own & made.truncated).sum()
    assert sum(band.documents for band in figures.lengths) == len(lengths)


def test_examples_are_the_best_the_worst_and_those_nearest_to_the_median(made, figures):
    rows = np.flatnonzero(made.is_scored)
    for number, head in enumerate(figures.heads):
        own = made.values[number][rows].astype(np.float64)
        median = np.quantile(own, [0.5], method="inverted_cdf")[0]
        assert head.median == median
        for shown, order in ((head.best, -own), (head.worst, own), (head.middle, np.abs(own - median))):
            expected = rows[np.argsort(order, kind="stable")[:10]].tolist()
            assert [(one.file, one.row) for one in shown] == [made.place(row) for row in expected]
            assert [one.id for one in shown] == [f"id-{row}" for row in expected]
            assert [one.scores for one in shown] == [tuple(made.values[:, row].tolist()) for row in expected]
            assert [one.group for one in shown] == [GROUPS[made.groups[row]] for row in expected]
            assert [one.n_tokens for one in shown] == made.n_tokens[expected].tolist()


def test_heads_agree_as_scipy_says(made, figures):
    found, scores = figures.agreement, made.values[:, made.is_scored]
    assert (found.drawn, found.compared) == (2_000, 1_993)
    assert [(one.first, one.second) for one in found.pairs] == [HEADS[:2], HEADS[::2], HEADS[1:]]
    for one in found.pairs:
        a, b = (scores[HEADS.index(name)] for name in (one.first, one.second))
        assert one.spearman == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)
        assert sum(one.hexagons.documents) == 1_993


def test_each_document_is_counted_in_the_hexagon_with_the_nearest_centre(made):
    x, y = made.values[:2, made.is_scored]
    found = agreement.count_in_hexagons(x, y)
    scale = np.array([found.width, found.height / np.sqrt(3)])
    centres, points = np.array(found.centres) / scale, np.stack([x, y], axis=1) / scale
    nearest = np.linalg.norm(points[:, None] - centres, axis=2).argmin(axis=1)
    counts = np.bincount(nearest, minlength=len(centres))
    assert np.abs(counts - found.documents).sum() <= 4  # on an edge two are equally near
    assert agreement.count_in_hexagons(x, np.ones_like(y)).height == 1.0  # of equal scores


def test_a_sample_is_uniform_and_the_same_each_time(made, sources, figures, monkeypatch):
    monkeypatch.setattr(sampling, "SAMPLED", 500)
    first, second = (take_figures(replace(sources, corpus=())).agreement for _ in range(2))
    assert first == second and first.drawn == 500 and 490 < first.compared <= 500
    drawn = np.random.default_rng(sampling.SEED).choice(2_000, 500, replace=False, shuffle=False)
    own = made.values[:, np.sort(drawn)][:, made.is_scored[np.sort(drawn)]]
    assert first.pairs[0].hexagons == agreement.count_in_hexagons(own[0], own[1])
    assert abs(first.pairs[0].spearman - figures.agreement.pairs[0].spearman) < 0.1


def test_small_groups_are_summed_beyond_those_that_are_shown(sources, figures, monkeypatch):
    monkeypatch.setattr(measure, "MOST_LISTED", 2)
    monkeypatch.setattr(measure, "MOST_PLOTTED", 1)
    found = take_figures(replace(sources, corpus=()), min_group=MIN_GROUP)
    *large, others = found.groups
    assert large == list(figures.groups[:2]) and others.scope == Scope("others", None, 2)
    assert others.documents == sum(one.documents for one in figures.groups[2:]) and others.thresholds == ()
    for one, *parts in zip(others.kept, *(one.kept for one in figures.groups[2:]), strict=True):
        assert one.documents == sum(part.documents for part in parts)
    histograms = found.heads[0].histograms
    assert [one.scope.n_groups for one in histograms] == [4, 1, 3]
    assert np.array_equal(np.sum([one.documents for one in histograms[1:]], axis=0), histograms[0].documents)


def test_without_groups_or_lengths_the_figures_say_so(made, sources, tmp_path):
    import pyarrow.parquet as pq

    table = pq.read_table(made.scores / "a/1.parquet", columns=["score_education"]).replace_schema_metadata()
    pq.write_table(table, tmp_path / "foreign.parquet")
    found = take_figures(
        replace(sources, inputs=(str(tmp_path / "foreign.parquet"),), columns=("score_education",), group_column=None,
                corpus=(), metrics=None)
    )  # fmt: skip
    assert (found.groups, found.lengths, found.speed, found.whole.tokens, found.whole.truncated) == (
        (), (), None, None, None,
    )  # fmt: skip
    assert found.rules == ("all",) and found.judged == ("education",) and not found.agreement.pairs
    with pytest.raises(InputError, match="count in documents"):
        take_figures(
            replace(sources, inputs=(str(tmp_path / "foreign.parquet"),), columns=("score_education",),
                    group_column=None, corpus=()), "tokens"
        )  # fmt: skip


def test_figures_are_the_same_each_time_and_fit_for_json(sources, figures):
    again = take_figures(sources, min_group=MIN_GROUP)
    assert again == figures
    content = json.dumps(figures.to_json(), allow_nan=False)
    assert json.loads(content)["whole"]["documents"] == 2_000


def test_ten_rows_are_held_whatever_comes(tmp_path):
    from jql_engine.decision.opening import open_scores

    made = make(tmp_path, seed=3)
    found = extremes.Ends.empty(3)
    for rows in open_scores([str(made.scores)]).read():
        for start in range(0, len(rows), 7):
            found.add(rows.slice(start, min(start + 7, len(rows))))
    assert all(len(one.values) == 10 for one in (*found.best, *found.worst))
    own = np.sort(made.values[0][made.is_scored])
    assert np.array_equal(found.worst[0].values, own[:10]) and np.array_equal(-found.best[0].values, own[::-1][:10])
