"""A run that goes on where another ended, or was killed: what is done is kept, what belongs to no job is removed."""

from __future__ import annotations

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from jql_engine import Engine
from jql_engine.errors import OutputError
from jql_engine.files.parts import Part, key_of
from jql_engine.files.settings import METADATA_KEY
from jql_engine.job.finish import run
from jql_engine.job.plan import CHUNK_ROWS, Job
from jql_engine.job.progress import Meter, RunLog
from jql_engine.job.scoring import prepare
from jql_engine.job.worker import Worker
from jql_engine.sessions.base import CHUNK_BYTES
from jql_engine.tokenizer import Tokenizer
from tests.job.test_run import TEXTS, assert_scored, score, sparse, state, visible, write


def test_a_second_run_computes_nothing_and_touches_nothing(engine, tmp_path):
    for name in ("a", "b"):
        write(tmp_path / "in" / f"{name}.parquet", TEXTS)
    score(engine, tmp_path / "out", tmp_path / "in")
    before = state(tmp_path / "out")
    summary = score(engine, tmp_path / "out", tmp_path / "in")
    assert (summary.files, summary.skipped_files, summary.documents, summary.tokens) == (0, 2, 0, 0)
    assert state(tmp_path / "out") == before


def test_a_run_computes_only_the_files_that_are_missing(engine, tmp_path):
    for name in "abc":
        write(tmp_path / "in" / f"{name}.parquet", TEXTS)
    score(engine, tmp_path / "out", tmp_path / "in")
    (tmp_path / "out/b.parquet").unlink()
    before = state(tmp_path / "out")
    summary = score(engine, tmp_path / "out", tmp_path / "in")
    assert (summary.files, summary.skipped_files) == (1, 2)
    assert_scored(engine, tmp_path / "in/b.parquet", tmp_path / "out/b.parquet")
    assert before.items() < state(tmp_path / "out").items()


def test_overwrite_computes_again(engine, tmp_path):
    path = write(tmp_path / "a.parquet", TEXTS)
    score(engine, tmp_path / "out", path)
    before = state(tmp_path / "out")
    write(path, TEXTS[::-1])
    summary = score(engine, tmp_path / "out", path, overwrite=True)
    assert (summary.files, summary.skipped_files) == (1, 0)
    assert state(tmp_path / "out").keys() == before.keys() and state(tmp_path / "out") != before
    assert_scored(engine, path, tmp_path / "out/a.parquet")


@pytest.mark.parametrize(
    ("texts", "later", "difference"),
    [(["x", "longer than it was"], 0, r"\d+ bytes then, \d+ now"), (["x", "y"], 1, "the same size, but written anew")],
)
def test_a_source_that_changed_is_an_error_on_resume(engine, tmp_path, texts, later, difference):
    path = write(tmp_path / "a.parquet", ["x", "z"])
    score(engine, tmp_path / "out", path)
    before, modified = state(tmp_path / "out"), path.stat().st_mtime_ns + later
    write(path, texts)
    os.utime(path, ns=(modified, modified))
    with pytest.raises(OutputError, match=rf"out/a\.parquet exists .* before its source .*{difference}\) changed"):
        score(engine, tmp_path / "out", path)
    assert state(tmp_path / "out") == before


def test_other_settings_are_an_error_on_resume(engine, padded, tmp_path):
    path = write(tmp_path / "a.parquet", ["x"], id=[1], content=["y"])
    score(engine, tmp_path / "out", path)
    before = state(tmp_path / "out")
    with pytest.raises(OutputError, match="--variant cpu-fp32 then, --variant standard-fp32 now"):
        score(padded, tmp_path / "out", path)
    with pytest.raises(OutputError, match="--text-column text then, --text-column content now"):
        score(engine, tmp_path / "out", path, text_column="content")
    with pytest.raises(OutputError, match="no --id-column then, --id-column content now"):
        score(engine, tmp_path / "out", path, id_column="content")
    assert state(tmp_path / "out") == before


def test_another_bundle_is_an_error_on_resume(engine, bundles, tmp_path):
    path = write(tmp_path / "a.parquet", ["x"])
    score(engine, tmp_path / "out", path)
    other = bundles["bert"]
    with pytest.raises(OutputError, match=f"bundle {engine.bundle.hash[:12]} then, bundle {other.hash[:12]} now"):
        prepare(Job((str(path),), tmp_path / "out"), other, "cpu-fp32", CHUNK_BYTES["cpu"])


def parts_of(out: Path) -> list[str]:
    return [name for name in visible(out) if name.startswith(".parts/")]


def interrupted(engine: Engine, out: Path, source: Path, n_parts: int, **options: object) -> None:
    """The state after a kill: `n_parts` parts of a file are there."""
    score(engine, out, source, **options)
    output = out / source.name
    table = pq.read_table(output)
    rows = options.get("chunk_rows", CHUNK_ROWS)
    output.unlink()
    for i in range(n_parts):
        key = key_of(json.loads(table.schema.metadata[METADATA_KEY]))
        part = out / ".parts" / source.name / Part(key, i * rows, (i + 1) * rows).name
        part.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.slice(i * rows, rows), part)


def test_parts_that_are_there_are_not_computed_again(engine, tmp_path):
    path = sparse(tmp_path / "a.parquet", 1000)
    interrupted(engine, tmp_path / "out", path, 7, chunk_rows=100)
    before = state(tmp_path / "out")
    log = tmp_path / "log.jsonl"
    summary = score(engine, tmp_path / "out", path, chunk_rows=100, metrics=log)
    assert summary.documents == 300 and len(before) == 7
    done = [segment["start"] for line in log.read_text().splitlines() for segment in json.loads(line)["segments"]]
    assert done == [700, 800, 900]
    assert visible(tmp_path / "out") == ["a.parquet"] and not (tmp_path / "out/.parts").exists()
    assert_scored(engine, path, tmp_path / "out/a.parquet")


def test_a_run_that_died_between_its_last_part_and_its_end_is_finished(engine, tmp_path):
    path = sparse(tmp_path / "a.parquet", 1000)
    interrupted(engine, tmp_path / "out", path, 10, chunk_rows=100)
    summary = score(engine, tmp_path / "out", path, chunk_rows=100)
    assert (summary.documents, summary.files, summary.unfinished) == (0, 1, [])
    assert visible(tmp_path / "out") == ["a.parquet"]
    assert_scored(engine, path, tmp_path / "out/a.parquet")


def test_a_run_that_died_before_tidying_up_leaves_nothing_behind(engine, tmp_path):
    path = sparse(tmp_path / "a.parquet", 1000)
    interrupted(engine, tmp_path / "out", path, 10, chunk_rows=100)
    shutil.copytree(tmp_path / "out/.parts", tmp_path / "parts")
    score(engine, tmp_path / "out", path, chunk_rows=100)
    shutil.copytree(tmp_path / "parts", tmp_path / "out/.parts")
    assert score(engine, tmp_path / "out", path, chunk_rows=100).skipped_files == 1
    assert visible(tmp_path / "out") == ["a.parquet"] and not (tmp_path / "out/.parts").exists()


def test_a_part_that_comes_after_its_file_was_finished_goes(engine, tmp_path):
    path, out = sparse(tmp_path / "a.parquet", 1000), tmp_path / "out"
    work = prepare(Job((str(path),), out, chunk_rows=100), engine.bundle, "cpu-fp32", CHUNK_BYTES["cpu"])
    [output] = work.outputs

    def chunks():
        worker = Worker(engine.bundle, engine.session, Tokenizer.of(engine.bundle), {0: output}, work.claim)
        yield from worker.run(work.tasks)
        ends = time.monotonic() + 30
        while output.parts.exists() and time.monotonic() < ends:
            time.sleep(0.001)
        shutil.copytree(tmp_path / "parts", output.parts)  # a worker that outlives the run that was killed

    interrupted(engine, tmp_path / "other", path, 2, chunk_rows=100)
    shutil.copytree(tmp_path / "other/.parts/a.parquet", tmp_path / "parts")
    run(work, chunks(), Meter(0), RunLog(None))
    work.release()
    assert visible(out) == ["a.parquet"] and not (out / ".parts").exists()


def test_parts_of_other_settings_are_an_error_that_names_the_difference(engine, tmp_path):
    path = sparse(tmp_path / "a.parquet", 1000)
    interrupted(engine, tmp_path / "out", path, 3, chunk_rows=100)
    with pytest.raises(OutputError, match="--chunk-rows 100 then, --chunk-rows 200 now"):
        score(engine, tmp_path / "out", path, chunk_rows=200)
    summary = score(engine, tmp_path / "out", path, chunk_rows=200, overwrite=True)
    assert summary.documents == 1000 and visible(tmp_path / "out") == ["a.parquet"]
    assert_scored(engine, path, tmp_path / "out/a.parquet")


def test_a_damaged_part_is_computed_again(engine, tmp_path):
    path = sparse(tmp_path / "a.parquet", 1000)
    interrupted(engine, tmp_path / "out", path, 7, chunk_rows=100)
    part = tmp_path / "out" / parts_of(tmp_path / "out")[3]
    part.write_bytes(part.read_bytes()[:100])
    assert score(engine, tmp_path / "out", path, chunk_rows=100).documents == 400
    assert_scored(engine, path, tmp_path / "out/a.parquet")


def test_empty_folders_of_a_killed_run_go(engine, tmp_path):
    path = write(tmp_path / "a.parquet", TEXTS)
    for n_finished in range(2):  # the second run has nothing else to do
        (tmp_path / "out/.parts/sub/0.parquet").mkdir(parents=True)
        assert score(engine, tmp_path / "out", path).skipped_files == n_finished
        assert not (tmp_path / "out/.parts").exists()


def test_two_runs_on_one_output_do_no_harm(engine, tmp_path):
    for i in range(6):
        sparse(tmp_path / f"in/{i}.parquet", 600)

    def one(_: int) -> SimpleNamespace:
        return score(engine, tmp_path / "out", tmp_path / "in", chunk_rows=50, output="append")

    with ThreadPoolExecutor(2) as pool:
        summaries = list(pool.map(one, range(2)))
    assert all(not s.unfinished for s in summaries)
    assert visible(tmp_path / "out") == [f"{i}.parquet" for i in range(6)]
    for i in range(6):
        found = pq.read_table(tmp_path / f"out/{i}.parquet")
        assert found["id"].to_pylist() == list(range(600)) and found["score_edu"].null_count == 597
