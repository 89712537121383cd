from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jql_engine.batching import plan_batches
from jql_engine.data import BatchOutput, Budget, TokenBatch
from jql_engine.sessions.base import MAX_STREAMS, execute, streams_of
from jql_engine.sessions.openvino import OpenVinoSession
from tests.conftest import export


def documents(lengths):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TokenBatch(
        np.arange(len(lengths)), np.arange(offsets[-1], dtype=np.int32), offsets, np.zeros(len(lengths), bool)
    )


class FirstToken:
    """Gives each document's first id, slowest for the first batch."""

    variant, n_overflowed = "first", 0

    def __init__(self, n_parallel, broken=None):
        self.n_parallel, self.budget, self.broken = n_parallel, Budget(20, "packed"), broken
        self.at_once, self.most, self.begun, self.lock = 0, 0, 0, threading.Lock()

    def run(self, batch):
        with self.lock:
            self.at_once += 1
            self.begun += 1
            self.most = max(self.most, self.at_once)
        time.sleep(0.01 if self.n_parallel > 1 else 0)
        with self.lock:
            self.at_once -= 1
        if self.broken in batch.rows:
            raise ValueError("broken")
        first = batch.ids[batch.offsets[:-1]].astype(np.float32)[:, None]
        return BatchOutput(first, first)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=30), st.integers(1, 4))
def test_every_batch_comes_with_its_own_output_in_the_order_of_the_plan(lengths, n_parallel):
    session, tokens = FirstToken(n_parallel), documents(lengths)
    found = list(execute(session, tokens))
    assert [b.rows.tolist() for b, _ in found] == [b.rows.tolist() for b in plan_batches(tokens, session.budget)]
    for batch, output in found:
        np.testing.assert_array_equal(output.scores[:, 0], tokens.offsets[batch.rows])


def test_as_many_batches_are_under_way_as_the_session_asks_for():
    session = FirstToken(3)
    list(execute(session, documents([20] * 40)))
    assert session.most == 3


@pytest.mark.parametrize("n_parallel", [1, 3])
def test_an_error_of_one_batch_is_the_error_of_all(n_parallel):
    with pytest.raises(ValueError, match="broken"):
        list(execute(FirstToken(n_parallel, broken=4), documents([20] * 10)))


def test_what_has_not_begun_never_begins_after_an_error_or_when_nobody_wants_it():
    for n_wanted, broken in ((100, 95), (3, None)):
        session = FirstToken(2, broken)
        batches = execute(session, documents([20] * 100))
        try:
            for _ in range(n_wanted):
                next(batches)
        except ValueError:
            assert broken is not None
        batches.close()
        begun = session.begun
        time.sleep(0.05)
        assert session.begun == begun < 20


def test_another_budget_than_the_sessions():
    assert len(list(execute(FirstToken(2), documents([1] * 10), Budget(1, "packed")))) == 10


@pytest.mark.parametrize("threads", range(1, MAX_STREAMS + 3))
def test_few_cores_compute_a_batch_each_and_many_share_one(threads):
    n_parallel, n_threads = streams_of(threads)
    assert n_threads == threads and n_parallel == (threads if threads <= MAX_STREAMS else 1)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_scores_do_not_depend_on_the_number_of_threads(encoders, head_files, tmp_path, threads):
    from jql_engine import Engine

    bundle = export(encoders["gte"], head_files, tmp_path / "out", ["cpu-fp32", "openvino-fp32"])
    texts = [f"{'word ' * n}end" for n in range(40)]
    expected = Engine(bundle.path, variant="cpu-fp32", threads=1).score(texts).values
    for variant in ("cpu-fp32", "openvino-fp32"):
        engine = Engine(bundle.path, variant=variant, threads=threads)
        np.testing.assert_allclose(engine.score(texts).values, expected, atol=1e-4)
    assert isinstance(engine.session, OpenVinoSession)
