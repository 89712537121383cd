"""What a report is made of: the census, histograms, the table of quantiles."""

from __future__ import annotations

import numpy as np
import pytest

from jql_engine.decision.census import FAULTS, take_census
from jql_engine.decision.histogram import count_in_bins
from jql_engine.decision.opening import open_scores
from tests.decision.score_files import columns_of, write_many
from tests.decision.test_threshold import HEADS, corpus, written


@pytest.fixture(scope="module")
def frame():
    return corpus(20_000)


@pytest.fixture(scope="module")
def files(frame, tmp_path_factory):
    return written(tmp_path_factory.mktemp("scores"), frame)


def test_the_census_counts_what_pandas_counts(files, frame):
    census = take_census(files)
    scores = frame[HEADS].where(~frame["null"])
    assert census.n_groups == len(files.groups) == 5
    for number, name in enumerate(files.groups.names):
        here = frame["lang"].isna() if name is None else frame["lang"] == name
        is_scored = here & np.isfinite(scores).all(axis=1)
        tokens = frame["n_tokens"][is_scored].astype(np.int64)
        assert (census.documents[number], census.scored[number]) == (here.sum(), is_scored.sum())
        assert census.tokens[number] == tokens.sum()
        assert census.tokens_squared[number] == pytest.approx((tokens.astype(float) ** 2).sum())
        assert census.faulty[:, number].sum() == here.sum() - is_scored.sum()
        for head, column in enumerate(HEADS):
            mine = frame[column][here & ~frame["null"]]
            faults = [(here & frame["null"]).sum(), mine.isna().sum(), np.isinf(mine).sum()]
            assert census.faulty_scores[:, head, number].tolist() == faults
            finite = mine[np.isfinite(mine)]
            assert (census.least[head, number], census.greatest[head, number]) == (finite.min(), finite.max())


def test_a_census_grows_with_the_groups_that_appear(tmp_path):
    names = [f"g{i // 2}" for i in range(3000)]
    columns = columns_of([np.arange(3000, dtype=np.float32)], np.arange(3000), names)
    files = open_scores([str(write_many(tmp_path, columns, n_files=40))], group_column="lang")
    census = take_census(files)
    assert census.documents.tolist() == [2] * 1500
    assert census.tokens.tolist() == [4 * i + 1 for i in range(1500)]
    assert census.least[0].tolist() == [2 * i for i in range(1500)]
    assert census.faulty.shape == (len(FAULTS), 1500)


def test_histograms_are_numpys(files, frame):
    found = count_in_bins(files, take_census(files), 30)
    for head, column in enumerate(HEADS):
        for number, name in enumerate(files.groups.names):
            here = (frame["lang"].isna() if name is None else frame["lang"] == name) & ~frame["null"]
            here &= np.isfinite(frame[column])
            scores, tokens = frame[column][here], frame["n_tokens"][here].astype(np.int64)
            right, _ = np.histogram(scores, found.edges[head])
            assert found.documents[number, head].tolist() == right.tolist()
            right, _ = np.histogram(scores, found.edges[head], weights=tokens)
            assert found.tokens[number, head].tolist() == right.tolist()
    assert found.documents.sum() == sum(np.isfinite(frame[column][~frame["null"]]).sum() for column in HEADS)


@pytest.mark.parametrize("score", [2.5, np.nan])
def test_a_histogram_of_one_score_or_none_has_room_around_it(score, tmp_path):
    files = open_scores([str(write_many(tmp_path, columns_of([np.full(50, score, np.float32)])))])
    found = count_in_bins(files, take_census(files), 4)
    assert (np.diff(found.edges) > 0).all()
    assert found.documents.sum() == (50 if np.isfinite(score) else 0)
