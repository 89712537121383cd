from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jql_engine.errors import EngineError, OutputError
from jql_engine.files.chunks import Chunk, ChunkDone, Segment, Task
from jql_engine.files.output import OutputFile
from jql_engine.files.parts import find_leftovers
from jql_engine.job import pool
from jql_engine.job.plan import Job, Work
from jql_engine.job.pool import Executed, Handout, Order, Pool
from jql_engine.job.scoring import prepare
from jql_engine.job.worker import Scoring
from jql_engine.sessions.base import SessionOptions
from jql_engine.sessions.select import Choice

ROWS = 100


def task(number: int, file: int) -> Task:
    return Task(number, Chunk((Segment(file, number * ROWS, (number + 1) * ROWS),)))


def tasks_of(*n_chunks: int) -> list[Task]:
    """Files with these numbers of chunks."""
    files = [file for file, count in enumerate(n_chunks) for _ in range(count)]
    return [task(number, file) for number, file in enumerate(files)]


@given(st.lists(st.integers(1, 5), max_size=6), st.integers(1, 4), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_every_task_is_handed_out_once(n_chunks, n_workers, rng):
    given_, handout, at = tasks_of(*n_chunks), Handout(tasks_of(*n_chunks)), [None] * n_workers
    taken = []
    while len(handout):
        worker = rng.randrange(n_workers)
        found = handout.take(at[worker], {file for i, file in enumerate(at) if i != worker})
        at[worker] = found.chunk.segments[0].file
        taken.append(found)
    assert sorted(t.number for t in taken) == [t.number for t in given_]
    assert handout.take(None, set()) is None


def test_a_worker_keeps_to_its_file_then_takes_a_free_one_then_helps_with_the_largest():
    handout = Handout(tasks_of(2, 1, 4))
    assert [handout.take(0, {2}).chunk.segments[0].file for _ in range(2)] == [0, 0]
    assert handout.take(0, {2}).chunk.segments[0].file == 1
    assert handout.take(1, {2}).chunk.segments[0].file == 2


def test_nothing_more_is_handed_out_of_a_file_that_failed():
    handout = Handout([*tasks_of(3, 1), Task(9, Chunk((Segment(0, 0, 1), Segment(2, 0, 1))))])
    handout.drop(0)
    assert sorted(handout.take(None, set()).number for _ in range(len(handout))) == [3, 9]


@dataclass(frozen=True, slots=True)
class DeadlyOutput(OutputFile):
    """Kills its worker where it commits row 300; as a chunk that runs out of memory does."""

    def commit(self, segment: Segment, scores: pa.Table, copied: Sequence[pa.ChunkedArray] = ()) -> None:
        if segment.start == 3 * ROWS:
            os.kill(os.getpid(), signal.SIGKILL)
        OutputFile.commit(self, segment, scores, copied)


@dataclass(frozen=True, slots=True)
class FullOutput(OutputFile):
    def commit(self, segment: Segment, scores: pa.Table, copied: Sequence[pa.ChunkedArray] = ()) -> None:
        raise OutputError(f"{self.final} cannot be written")


def prepared(bundle, tmp_path: Path, kind: type[OutputFile]) -> Work:
    tmp_path.mkdir(exist_ok=True)
    pq.write_table(pa.table({"text": [f"Water {i}" for i in range(10 * ROWS)]}), tmp_path / "a.parquet")
    job = Job((str(tmp_path / "a.parquet"),), tmp_path / "out", chunk_rows=ROWS)
    work = prepare(job, bundle, "cpu-fp32", 1 << 20)
    outputs = [kind(t.out, t.file, t.scores, t.kind, t.shared) for t in work.outputs]
    return replace(work, outputs=outputs)


def run(bundle, work: Work, said: list[str], n_workers: int = 2) -> Iterator[ChunkDone]:
    return Pool([scoring(bundle, work)] * n_workers, work.outputs, threading.Event(), report=said.append).run(
        work.tasks
    )


def scoring(bundle, work: Work) -> Scoring:
    return Scoring(bundle, "cpu", Choice(("cpu",), "cpu-fp32"), SessionOptions(threads=1), None, work.claim)


def test_a_chunk_on_which_two_workers_died_is_given_up_and_the_others_are_done(bundle, tmp_path):
    work, said = prepared(bundle, tmp_path, DeadlyOutput), []
    done = list(run(bundle, work, said))
    assert Counter(d.task.number for d in done) == Counter(range(10))
    [lost] = [d for d in done if d.failures]
    assert lost.task.chunk.segments[0].start == 3 * ROWS and lost.documents == 0
    assert f"2 workers died on {tmp_path / 'a.parquet'} rows 300 to 400" in lost.failures[0].message
    assert len(said) == 2 and all("died with exit code -9" in line and "a.parquet" in line for line in said)
    assert {part.rows for part in find_leftovers(tmp_path / "out").parts["a.parquet"]} == {
        (i * ROWS, (i + 1) * ROWS) for i in range(10) if i != 3
    }  # fmt: skip


def test_one_worker_too_can_be_replaced(bundle, tmp_path):
    done = list(run(bundle, prepared(bundle, tmp_path, DeadlyOutput), [], n_workers=1))
    assert len(done) == 10 and sum(bool(d.failures) for d in done) == 1


def test_what_no_worker_can_go_on_after_ends_the_job(bundle, tmp_path):
    with pytest.raises(OutputError, match=r"a\.parquet cannot be written"):
        list(run(bundle, prepared(bundle, tmp_path, FullOutput), []))


def test_workers_that_die_before_they_begin_end_the_job(bundle, tmp_path):
    work = prepared(bundle, tmp_path, OutputFile)
    spec = scoring(replace(bundle, path=tmp_path / "no-bundle"), work)
    with pytest.raises(EngineError, match="no-bundle does not exist"):
        list(Pool([spec], work.outputs, threading.Event()).run(work.tasks))


def test_progress_adds_up_to_what_is_done(bundle, tmp_path):
    work, seen = prepared(bundle, tmp_path, OutputFile), []
    done = list(
        Pool([scoring(bundle, work)] * 2, work.outputs, threading.Event(), executed=seen.append).run(work.tasks)
    )
    assert all(isinstance(message, Executed) for message in seen)
    assert sum(m.documents for m in seen) == sum(d.documents for d in done) == 10 * ROWS
    assert sum(m.tokens for m in seen) == sum(d.tokens for d in done)


def test_a_job_without_tasks_starts_no_worker(bundle, tmp_path):
    work = prepared(bundle, tmp_path, OutputFile)
    assert list(run(bundle, replace(work, tasks=[]), [])) == []


@dataclass(frozen=True, slots=True)
class DeadliestOutput(OutputFile):
    """Kills its worker wherever a chunk of it is committed."""

    def commit(self, segment: Segment, scores: pa.Table, copied: Sequence[pa.ChunkedArray] = ()) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_file_that_kills_on_every_chunk_does_not_end_the_job(bundle, tmp_path):
    deadly, sound = (
        prepared(bundle, tmp_path / name, kind) for name, kind in (("a", DeadliestOutput), ("b", OutputFile))
    )
    tasks = [Task(t.number + 10, Chunk(tuple(replace(s, file=1) for s in t.chunk.segments))) for t in sound.tasks]
    work = replace(deadly, outputs=[*deadly.outputs, *sound.outputs], tasks=[*deadly.tasks, *tasks])
    done = list(run(bundle, work, []))
    assert Counter(d.task.number for d in done) == Counter(range(20))
    assert [d.task.number for d in done if not d.failures] == sorted(t.number for t in tasks)


def test_a_worker_that_dies_while_it_starts_is_replaced_however_many_files_there_are(bundle, tmp_path, monkeypatch):
    for i in range(200):
        pq.write_table(pa.table({"text": [f"Water {i}"]}), tmp_path / f"{i}.parquet")
    job = Job((str(tmp_path / "*.parquet"),), tmp_path / "out", chunk_rows=20)
    work, said = prepare(job, bundle, "cpu-fp32", 1 << 20), []
    started = pool._start

    def start_and_kill_the_first(spec: Scoring):
        process = started(spec)
        if not said and not hasattr(start_and_kill_the_first, "done"):
            start_and_kill_the_first.done = True
            process.process.kill()
        return process

    monkeypatch.setattr(pool, "_start", start_and_kill_the_first)
    done = list(run(bundle, work, said))
    assert sum(d.documents for d in done) == 200 and not any(d.failures for d in done)
    assert len(said) == 1 and "died with exit code -9" in said[0]


def test_a_worker_holds_the_outputs_of_what_it_has_in_hand_only(bundle, tmp_path):
    work, held = prepared(bundle, tmp_path, OutputFile), pool._Held()
    first, second = work.tasks[:2]
    for t in (first, second):
        held.hold(Order(t, {0: work.outputs[0]}))
    held.release(first)
    assert held[0] is work.outputs[0]
    held.release(second)
    assert not held
