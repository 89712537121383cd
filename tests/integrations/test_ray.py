"""The real Ray, on this machine."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import psutil
import pyarrow as pa
import pytest
import ray

from jql_engine.data import score_column
from jql_engine.integrations.ray import score_dataset
from jql_export import probes
from jql_export.tolerances import TOLERANCES

TEXTS = [f"{sentence} {i}" for i in range(20) for sentence in probes.SENTENCES]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    yield
    ray.shutdown()


def dataset(texts: list[str | None], n_blocks: int = 8) -> ray.data.Dataset:
    table = pa.table({"id": range(len(texts)), "text": pa.array(texts, pa.string())})
    return ray.data.from_arrow(table).repartition(n_blocks)


def rows_of(ds: ray.data.Dataset) -> list[dict]:
    return sorted(ds.take_all(), key=lambda row: row["id"])


def assert_scores(rows: list[dict], engine, texts: list[str]) -> None:
    expected = engine.score(texts)
    assert [row["id"] for row in rows] == list(range(len(texts)))
    for i, head in enumerate(engine.heads):
        values = np.array([row[score_column(head)] for row in rows])
        np.testing.assert_allclose(values, expected.values[:, i], rtol=0, atol=TOLERANCES["fp32"].batch)
    assert [row["n_tokens"] for row in rows] == expected.n_tokens.tolist()


def test_two_actors_give_the_scores_of_the_engine(bundle, engine):
    scored = score_dataset(dataset(TEXTS), bundle=bundle.path, num_cpus=1, concurrency=2, batch_size=32)
    assert_scores(rows_of(scored), engine, TEXTS)
    assert scored.schema().names == ["id", "text", "score_edu", "score_prose", "n_tokens", "truncated"]


def test_null_text_has_null_scores(bundle):
    rows = rows_of(score_dataset(dataset(["a", None, ""], 1), bundle=bundle.path))
    assert [row["score_edu"] is None for row in rows] == [False, True, False]


def test_a_missing_column_and_a_clash_are_named(bundle):
    with pytest.raises(Exception, match="no column 'content'; it has id, text"):
        score_dataset(dataset(["a"], 1), bundle=bundle.path, text_column="content").take_all()
    clash = ray.data.from_arrow(pa.table({"text": ["a"], "score_edu": [1.0]}))
    with pytest.raises(Exception, match="has a column 'score_edu' already"):
        score_dataset(clash, bundle=bundle.path).take_all()


def test_a_graph_out_of_tolerance_is_an_error(bundle):
    with pytest.raises(Exception, match="from the fp32 reference, allowed is 0"):
        score_dataset(dataset(["a"], 1), bundle=bundle.path, tolerance=0.0).take_all()


class Slow:
    """Gives time to kill an actor in mid-run."""

    def __call__(self, table: pa.Table) -> pa.Table:
        time.sleep(0.2)
        return table


def scorers() -> list[psutil.Process]:
    """Processes of the actors."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any("_Scorer" in part for part in process.info["cmdline"] or [])
    ]


def test_an_actor_that_is_killed_in_mid_run_loses_nothing(bundle, engine):
    texts = TEXTS * 4
    actors = ray.data.ActorPoolStrategy(size=1)
    slow = dataset(texts, 24).map_batches(Slow, batch_format="pyarrow", batch_size=80, compute=actors, num_cpus=0.1)
    scored = score_dataset(slow, bundle=bundle.path, num_cpus=0.5, concurrency=2, batch_size=80)
    rows, killed = [], None
    for row in scored.iter_rows():
        rows.append(row)
        if len(rows) > 200 and killed is None and (found := scorers()):
            killed = found[0].pid
            os.kill(killed, signal.SIGKILL)
    assert killed is not None
    assert_scores(sorted(rows, key=lambda row: row["id"]), engine, texts)
