from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jql_engine.decision import partition
from jql_engine.decision.kept import Cut
from jql_engine.decision.opening import open_scores
from jql_engine.decision.result import Counts, Decision, Request
from jql_engine.decision.scores import ScoreFiles
from jql_engine.decision.threshold import decide
from jql_engine.errors import InputError
from tests.decision.score_files import columns_of, write_many

HEADS = ["score_a", "score_b", "score_c"]


def corpus(n: int, kind: str = "normal", seed: int = 0) -> pd.DataFrame:
    """Correlated heads in groups of very different sizes; some scores null, NaN or infinite."""
    rng = np.random.default_rng(seed)
    quality = rng.standard_normal(n)
    scores = 0.7 * quality + 0.7 * rng.standard_normal((3, n))
    if kind == "tied":
        scores = np.round(2.5 + scores)
    elif kind == "signed":
        scores = np.where(np.abs(scores) < 0.3, rng.choice([0.0, -0.0], (3, n)), scores)
    elif kind == "constant":
        scores = np.full((3, n), 1.25)
    frame = pd.DataFrame(scores.astype(np.float32).T, columns=HEADS)
    frame["n_tokens"] = np.minimum(8192, rng.lognormal(6, 1, n)).astype(np.int32)
    names = np.array(["de", "en", "fr", "zu", None], object)
    frame["lang"] = names[rng.choice(5, n, p=[0.3, 0.5, 0.19, 0.0002, 0.0098])]
    for bad, share in ((np.nan, 0.003), (np.inf, 0.002), (-np.inf, 0.002)):
        frame.loc[rng.random(n) < share, HEADS[rng.integers(3)]] = bad
    frame["null"] = rng.random(n) < 0.01
    return frame


def written(folder: Path, frame: pd.DataFrame, group: str | None = "lang") -> ScoreFiles:
    mask = frame["null"].to_numpy()
    scores = [np.ma.masked_array(frame[head].to_numpy(), mask) for head in HEADS]
    tokens = np.ma.masked_array(frame["n_tokens"].to_numpy(), mask)
    return open_scores(
        [str(write_many(folder, columns_of(scores, tokens, frame["lang"].tolist())))], group_column=group
    )


class Oracle:
    """The same by pandas and NumPy, on whole columns."""

    def __init__(self, frame: pd.DataFrame, request: Request, grouped: bool = True) -> None:
        self.is_scored = ~frame["null"] & np.isfinite(frame[HEADS]).all(axis=1)
        self.frame, self.request = frame[self.is_scored].copy(), request
        if request.rule == "mean":
            self.frame["mean"] = self.frame[HEADS].astype("float64").mean(axis=1).astype("float32")
        self.judged = ["mean"] if request.rule == "mean" else HEADS
        self.frame["group"] = self.frame["lang"].fillna("(null)") if grouped else "all"
        sizes = self.frame.groupby("group").size()
        self.pooled = sorted(sizes.index[sizes < request.min_group]) if grouped else []

    def thresholds(self, quantile: float) -> dict[str, list[np.float32]]:
        return {
            name: [self._quantile(self.frame if name in self.pooled else rows, head, quantile) for head in self.judged]
            for name, rows in self.frame.groupby("group")
        }

    def _quantile(self, rows: pd.DataFrame, head: str, quantile: float) -> np.float32:
        weights = {"weights": rows["n_tokens"].to_numpy()} if self.request.weight == "tokens" else {}
        return np.quantile(rows[head].to_numpy(), np.array(quantile), method="inverted_cdf", **weights) + np.float32(0)

    def shares(self, thresholds: dict[str, list[np.float32]]) -> dict[str, list[float]]:
        """Of the weight of each group, or of all for those that are pooled, what reaches each threshold."""
        unit = "n_tokens" if self.request.weight == "tokens" else "documents"
        frame = self.frame.assign(documents=1)
        groups = {name: frame if name in self.pooled else rows for name, rows in frame.groupby("group")}
        return {
            name: [
                rows[unit][rows[head] >= threshold].sum() / rows[unit].sum()
                for head, threshold in zip(self.judged, thresholds[name], strict=True)
            ]
            for name, rows in groups.items()
        }

    def kept(self, quantile: float) -> pd.Series:
        """Of the scored documents."""
        thresholds = pd.DataFrame.from_dict(self.thresholds(quantile), orient="index", columns=self.judged)
        is_over = self.frame[self.judged].ge(thresholds.loc[self.frame["group"]].set_axis(self.frame.index))
        return is_over.any(axis=1) if self.request.rule == "any" else is_over.all(axis=1)

    def weight(self, quantile: float) -> int:
        """Of what is kept, in the request's unit."""
        rows = self.frame[self.kept(quantile)]
        return int(rows["n_tokens"].sum()) if self.request.kept_weight == "tokens" else len(rows)


def selection(files: ScoreFiles, decision: Decision) -> np.ndarray:
    cut = Cut.of(decision, files)
    return np.concatenate([cut.kept(rows) for rows in files.read()])


def assert_decided(files: ScoreFiles, decision: Decision, oracle: Oracle) -> None:
    """Thresholds to the last bit, the very same documents, and counts that add up."""
    right = oracle.thresholds(decision.quantile)
    shares = oracle.shares(right)
    for group in decision.groups:
        name = "all" if files.group_column is None else group.group or "(null)"
        if name in right:
            found = np.array([one.threshold for one in group.thresholds], np.float32)
            assert found.view(np.int32).tolist() == np.array(right[name], np.float32).view(np.int32).tolist()
            assert [one.share for one in group.thresholds] == pytest.approx(shares[name], abs=1e-12)
            assert group.is_pooled == (name in oracle.pooled)
    kept = np.zeros(len(oracle.is_scored), np.bool_)
    kept[oracle.is_scored] = oracle.kept(decision.quantile)
    assert (selection(files, decision) == kept).all()
    counts = decision.counts
    assert counts.documents == files.n_rows == counts.scored + counts.null + counts.nan + counts.infinite
    assert counts.kept_documents == kept.sum() == sum(one.counts.kept_documents for one in decision.groups)
    assert counts.kept_tokens == oracle.frame["n_tokens"][oracle.kept(decision.quantile)].sum()
    assert counts.tokens == oracle.frame["n_tokens"].sum()


def assert_solved(decision: Decision, oracle: Oracle, target: int) -> None:
    """The target is kept, and no larger quantile keeps it."""
    found = decision.target
    assert found is not None
    assert (found.asked, found.excess) == (target, found.kept - target)
    assert found.kept == oracle.weight(decision.quantile) >= target
    above = float(np.nextafter(decision.quantile, 2))
    assert above > 1 or oracle.weight(above) < target


@pytest.mark.parametrize("weight", ["documents", "tokens"])
@pytest.mark.parametrize("rule", ["all", "any", "mean"])
def test_a_quantile_selects_of_a_million_rows_what_pandas_does(rule, weight, tmp_path):
    frame, request = corpus(1_000_000), Request(rule, weight, quantile=0.6)
    files = written(tmp_path, frame)
    assert_decided(files, decide(files, request), Oracle(frame, request))


@pytest.mark.parametrize("rule", ["all", "any", "mean"])
def test_a_share_of_a_million_rows_is_kept_exactly(rule, tmp_path):
    frame, request = corpus(1_000_000), Request(rule, keep=0.4)
    files, oracle = written(tmp_path, frame), Oracle(frame, request)
    decision = decide(files, request)
    assert_solved(decision, oracle, int(np.ceil(0.4 * len(oracle.frame))))
    assert_decided(files, decision, oracle)
    again = decide(files, Request(rule, quantile=decision.quantile))
    assert again.groups == decision.groups


@pytest.mark.parametrize(
    ("kind", "grouped"),
    [("normal", True), ("normal", False), ("tied", True), ("signed", True), ("constant", False)],
)
@pytest.mark.parametrize("rule", ["all", "any", "mean"])
@pytest.mark.parametrize(
    "asked",
    [
        {"keep": 0.001}, {"keep": 0.4, "weight": "tokens"}, {"keep": 1.0}, {"keep_tokens": 200_000},
        {"keep_tokens": 1_000_000, "weight": "tokens"}, {"quantile": 0.0}, {"quantile": 1.0},
    ],
)  # fmt: skip
def test_whatever_is_asked_of_whatever_scores(asked, rule, kind, grouped, tmp_path, monkeypatch):
    monkeypatch.setattr(partition, "ROOT_BINS", 1 << 14)
    frame, request = corpus(4_000, kind), Request(rule, min_group=100, **asked)
    files, oracle = written(tmp_path, frame, "lang" if grouped else None), Oracle(frame, request, grouped)
    decision = decide(files, request)
    assert_decided(files, decision, oracle)
    if request.quantile is None:
        tokens = request.kept_weight == "tokens"
        total = int(oracle.frame["n_tokens"].sum()) if tokens else len(oracle.frame)
        assert_solved(decision, oracle, request.keep_tokens or int(np.ceil(request.keep * total)))


DOCUMENTS = st.lists(
    st.tuples(
        st.sampled_from([-1.0, 0.0, 0.5, 2.0]), st.floats(-9, 9, width=32), st.integers(1, 40), st.integers(0, 2)
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(DOCUMENTS, st.sampled_from(["all", "any", "mean"]), st.sampled_from(["documents", "tokens"]), st.floats(0.01, 1))
def test_any_few_documents_are_solved(tmp_path_factory, monkeypatch, documents, rule, weight, keep):
    first, second, tokens, groups = zip(*documents, strict=True)
    frame = pd.DataFrame({"score_a": first, "score_b": second, "score_c": second[::-1]}, dtype="float32")
    frame["n_tokens"], frame["lang"], frame["null"] = tokens, [f"g{one}" for one in groups], False
    monkeypatch.setattr(partition, "ROOT_BINS", 1 << 14)
    request = Request(rule, weight, keep=keep, min_group=5)
    files, oracle = written(tmp_path_factory.mktemp("some"), frame), Oracle(frame, request)
    decision = decide(files, request)
    total = int(frame["n_tokens"].sum()) if weight == "tokens" else len(frame)
    target = next(n for n in range(1, total + 1) if n / total >= keep)
    assert_solved(decision, oracle, target)
    assert_decided(files, decision, oracle)


def test_a_share_is_kept_exactly_where_there_is_little_room_for_bins(tmp_path, monkeypatch):
    """Bins are cut in many rounds; the answer is that of two."""
    frame, request = corpus(20_000), Request("all", "tokens", keep=0.3)
    files = written(tmp_path, frame)
    right = decide(files, request)
    monkeypatch.setattr(partition, "ROOT_BINS", 1 << 8)
    monkeypatch.setattr(partition, "MOST_BINS", 1 << 13)
    assert decide(files, request) == right
    monkeypatch.setattr(partition, "MOST_BINS", 1 << 9)
    with pytest.raises(InputError, match="raise --min-group"):
        decide(files, request)


def test_equal_scores_are_kept_together_and_the_excess_is_told(tmp_path):
    frame = corpus(10_000, "constant")
    files = written(tmp_path, frame)
    decision = decide(files, Request("all", keep=0.25))
    assert decision.target is not None
    assert decision.target.kept == decision.counts.scored
    assert decision.target.excess == decision.counts.scored - decision.target.asked > 0


def test_small_groups_take_the_threshold_of_all(tmp_path):
    frame = corpus(50_000)
    files = written(tmp_path, frame)
    decision = decide(files, Request("all", quantile=0.6))
    assert [(one.group, one.is_pooled) for one in decision.groups] == [
        ("de", False), ("en", False), ("fr", False), ("zu", True), (None, True),
    ]  # fmt: skip
    everything = decide(written(tmp_path, frame, None), Request("all", quantile=0.6))
    zu, null = decision.groups[3:]
    assert zu.thresholds == null.thresholds == everything.groups[0].thresholds


def test_the_interval_of_a_threshold_is_of_order_statistics(tmp_path):
    frame = corpus(4_000).assign(lang="en")
    files = written(tmp_path, frame)
    oracle = Oracle(frame, Request("all", quantile=0.6))
    n = len(oracle.frame)
    for one in decide(files, oracle.request).groups[0].thresholds:
        ordered = np.sort(oracle.frame[f"score_{one.head}"].to_numpy())
        lower, upper = (int(np.searchsorted(ordered, end)) + 1 for end in one.interval)
        assert lower == pytest.approx(0.6 * n - 1.96 * np.sqrt(0.24 * n), abs=1.5)
        assert upper == pytest.approx(0.6 * n + 1.96 * np.sqrt(0.24 * n), abs=1.5)


def test_faulty_documents_are_counted_apart_in_their_groups(tmp_path):
    a = np.ma.masked_array([1, np.nan, np.inf, 2, 3, np.nan], [False] * 3 + [True, False, False], np.float32)
    b = np.array([1, 2, 3, 4, np.inf, np.inf], np.float32)
    files = open_scores(
        [str(write_many(tmp_path, columns_of([a, b], lang=["x"] * 3 + ["y"] * 3)))], group_column="lang"
    )
    decision = decide(files, Request("any", quantile=0.5))
    assert decision.counts == Counts(6, 1, null=1, nan=2, infinite=2, tokens=None, kept_documents=1, kept_tokens=None)
    x, y = (one.counts for one in decision.groups)
    assert (x.null, x.nan, x.infinite, x.kept_documents) == (0, 1, 1, 1)
    assert (y.null, y.nan, y.infinite, y.kept_documents) == (1, 1, 1, 0)


def test_what_cannot_be_asked_is_an_error(tmp_path):
    frame = corpus(1_000)
    files = written(tmp_path / "a", frame)
    with pytest.raises(InputError, match=r"1,000,000,000 tokens are to be kept, and the scored documents have \d+,\d+"):
        decide(files, Request("all", keep_tokens=10**9))
    files = written(tmp_path / "b", frame.assign(null=True))
    with pytest.raises(InputError, match=r"none of the 1,000 documents has a score of every head"):
        decide(files, Request("all", quantile=0.6))
    files = open_scores([str(write_many(tmp_path / "c", columns_of([np.zeros(9, np.float32)])))])
    with pytest.raises(InputError, match=r"has no column 'n_tokens'; count in documents"):
        decide(files, Request("all", "tokens", quantile=0.6))
    tokens = columns_of([np.zeros(9, np.float32)], np.zeros(9, np.int64), ["x"] * 9)
    files = open_scores([str(write_many(tmp_path / "d", tokens))], group_column="lang")
    with pytest.raises(InputError, match=r"no document of the group 'x' has any tokens"):
        decide(files, Request("all", "tokens", quantile=0.6, min_group=1))


def test_thresholds_of_other_scores_are_refused(tmp_path):
    frame = corpus(5_000)
    decision = decide(written(tmp_path / "a", frame), Request("all", quantile=0.6))
    others = written(tmp_path / "b", frame.assign(lang="ja"))
    list(others.read())
    with pytest.raises(InputError, match="know no group 'ja'"):
        Cut.of(decision, others)


def test_json_holds_every_threshold_to_the_last_bit(tmp_path):
    decision = decide(written(tmp_path, corpus(5_000)), Request("mean", "tokens", keep=0.3))
    found: dict[str, Any] = json.loads(json.dumps(decision.to_json(), allow_nan=False))
    assert found["request"] == {
        "rule": "mean", "weight": "tokens", "quantile": None, "keep": 0.3, "keep_tokens": None, "min_group": 1000,
    }  # fmt: skip
    assert found["settings"]["variant"] == "cpu-fp32"
    assert found["quantile"] == decision.quantile
    for one, group in zip(found["groups"], decision.groups, strict=True):
        assert np.float32(one["thresholds"][0]["threshold"]) == np.float32(group.thresholds[0].threshold)
    assert list(found) == [
        "format", "request", "quantile", "target", "group_column", "score_columns", "settings", "without_scores",
        "counts", "groups",
    ]  # fmt: skip
