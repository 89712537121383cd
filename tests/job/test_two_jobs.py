"""Two jobs with different settings meet on one output folder: no file mixes their scores, and one of them fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from jql_engine import Engine
from jql_engine.bundle import Bundle
from jql_engine.files.settings import METADATA_KEY
from jql_export.tolerances import TOLERANCES
from tests.conftest import export
from tests.job.test_run import visible, write

SCRIPT = str(Path(sys.executable).with_name("jql-run"))


@pytest.fixture(scope="module")
def swapped(encoders, head_files, tmp_path_factory) -> Bundle:
    """The same encoder, with each head under the other's name."""
    heads = {"edu": head_files["prose"], "prose": head_files["edu"]}
    return export(encoders["gte"], heads, tmp_path_factory.mktemp("swapped") / "bundle", ("cpu-fp32", "standard-fp32"))


def begin(bundle: Bundle, out: Path | str, source: Path, *options: object) -> subprocess.Popen[str]:
    command = [SCRIPT, source, "--bundle", bundle.path, "--out", out, "--device", "cpu", "--threads", 1, *options]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, stderr = process.communicate(timeout=120)
    assert "Traceback" not in stderr, stderr
    return process.returncode, stderr


def corpus(folder: Path, n_files: int, n_rows: int, n_words: int = 2) -> Path:
    for i in range(n_files):
        texts = [f"{i} {row} " + "water " * n_words if row % 5 else None for row in range(n_rows)]
        write(folder / f"{i}.parquet", texts, content=[f"Snow falls {i} {row}" for row in range(n_rows)])
    return folder


def assert_whole(out: Path, source: Path, engines: dict[str, Engine]) -> None:
    """Every finished file holds the scores of the bundle and column that its metadata names, in every row."""
    for name in visible(out):
        if name.startswith(".parts/"):
            continue
        found = pq.read_table(out / name)
        settings = json.loads(found.schema.metadata[METADATA_KEY])
        texts = pq.read_table(source / name)[settings["text_column"]].to_pylist()
        expected = engines[settings["bundle"]].score(texts).to_table()
        for column in ("score_edu", "score_prose"):
            assert found[column].is_null().equals(expected[column].is_null())
            difference = found[column].drop_null().to_numpy() - expected[column].drop_null().to_numpy()
            assert np.abs(difference).max() <= TOLERANCES["fp32"].batch, (name, settings["bundle"])


PAIRS = {
    "two bundles, many chunks": ((), (), 2, 204, 10),
    "two bundles, one chunk": ((), (), 2, 30, 20_000),
    "two variants": (("--variant", "cpu-fp32"), ("--variant", "standard-fp32"), 2, 204, 10),
    "two columns": (("--text-column", "text"), ("--text-column", "content"), 2, 204, 10),
    "two ways to cut": (("--chunk-rows", 7), ("--chunk-rows", 10), 2, 204, None),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_of_two_jobs_that_begin_together_one_fails(bundle, swapped, tmp_path, pair):
    one, other, n_files, n_rows, chunk_rows = PAIRS[pair]
    source, out = corpus(tmp_path / "in", n_files, n_rows), tmp_path / "out"
    cut = ("--chunk-rows", chunk_rows) if chunk_rows else ()
    second = swapped if "bundles" in pair else bundle
    processes = [begin(bundle, out, source, *cut, *one), begin(second, out, source, *cut, *other)]
    ended = [end(process) for process in processes]
    assert sorted(code for code, _ in ended) == [0, 1], ended
    assert any("with other settings" in stderr for _, stderr in ended), ended
    engines = {b.hash: Engine(b.path, device="cpu") for b in (bundle, swapped)}
    assert_whole(out, source, engines)
    assert visible(out) == [f"{i}.parquet" for i in range(n_files)]


@pytest.mark.parametrize(("n_files", "n_words", "chunk_rows"), [(6, 2, 10), (12, 160, 20_000)])
def test_a_job_that_starts_over_ends_the_one_before_at_its_next_commit(
    bundle, swapped, tmp_path, n_files, n_words, chunk_rows
):
    source, out = corpus(tmp_path / "in", n_files, 500, n_words), tmp_path / "out"  # one file is about one chunk
    old = begin(bundle, out, source, "--chunk-rows", chunk_rows)
    while not list(out.glob(".parts/*/*.parquet")) + list(out.glob("*.parquet")):
        assert old.poll() is None, old.communicate()
        time.sleep(0.01)
    os.killpg(old.pid, signal.SIGSTOP)  # so that neither is done before the other has begun
    new = begin(swapped, out, source, "--chunk-rows", chunk_rows, "--overwrite")
    while json.loads((out / ".parts/job.json").read_bytes())["bundle"] != swapped.hash:
        assert new.poll() is None, new.communicate()
        time.sleep(0.01)
    os.killpg(old.pid, signal.SIGCONT)
    code, stderr = end(old)
    assert code == 1 and "with other settings" in stderr, stderr
    assert new.poll() is None, "the older job did all its work before it noticed"
    assert end(new)[0] == 0
    assert_whole(out, source, {b.hash: Engine(b.path, device="cpu") for b in (bundle, swapped)})
    assert {json.loads(pq.read_schema(out / name).metadata[METADATA_KEY])["bundle"] for name in visible(out)} == {
        swapped.hash
    }


@pytest.mark.parametrize("options", [(), ("--overwrite",)], ids=["created", "overwritten"])
@pytest.mark.parametrize("chunk_rows", [10, 20_000])
@pytest.mark.parametrize("inputs", ["folder", "file"])
def test_a_job_that_runs_wholly_between_two_commits_of_another_stays_whole(
    bundle, swapped, tmp_path, options, chunk_rows, inputs
):
    source, out = corpus(tmp_path / "in", 4, 600), tmp_path / "out"
    old = begin(bundle, out, source, "--chunk-rows", chunk_rows, *options)
    while not list(out.glob(".parts/job.json")):
        assert old.poll() is None, old.communicate()
        time.sleep(0.002)
    os.killpg(old.pid, signal.SIGSTOP)
    given = source if inputs == "folder" else source / "3.parquet"
    code, stderr = end(begin(swapped, out, given, "--chunk-rows", chunk_rows, "--overwrite"))
    assert code == 0, stderr
    os.killpg(old.pid, signal.SIGCONT)
    code, stderr = end(old)
    assert code == 1 and ("with other settings" in stderr or "another job has ended here" in stderr), stderr
    assert_whole(out, source, {b.hash: Engine(b.path, device="cpu") for b in (bundle, swapped)})
    named = {name: json.loads(pq.read_schema(out / name).metadata[METADATA_KEY])["bundle"] for name in scores(out)}
    assert named["3.parquet"] == swapped.hash
    if inputs == "folder":
        assert named == {f"{i}.parquet": swapped.hash for i in range(4)}


def scores(out: Path) -> list[str]:
    return [name for name in visible(out) if not name.startswith(".parts/")]


def test_what_an_older_job_finishes_while_a_new_one_looks_at_its_inputs_is_replaced(bundle, swapped, tmp_path):
    """The older one is not stopped: it goes on finishing files until the new one has taken the folder."""
    source, out = corpus(tmp_path / "in", 300, 3), tmp_path / "out"
    old = begin(bundle, out, source, "--chunk-rows", 1)
    while not scores(out):
        assert old.poll() is None, old.communicate()
        time.sleep(0.01)
    os.killpg(old.pid, signal.SIGSTOP)  # else it may be through before the new one has loaded its bundle
    new = begin(swapped, out, source, "--overwrite")
    while not Path(f"/proc/{new.pid}/task/{new.pid}/children").read_text():  # the first looks at the inputs
        assert new.poll() is None, new.communicate()
        time.sleep(0.01)
    os.killpg(old.pid, signal.SIGCONT)
    code, stderr = end(new)
    assert code == 0, stderr
    code, stderr = end(old)
    assert code == 1 and "with other settings" in stderr, stderr
    named = {json.loads(pq.read_schema(out / name).metadata[METADATA_KEY])["bundle"] for name in scores(out)}
    assert named == {swapped.hash} and len(scores(out)) == 300


def test_parts_whose_source_is_gone_keep_nobody_out(bundle, swapped, tmp_path):
    source, out = corpus(tmp_path / "in", 2, 300), tmp_path / "out"
    killed = begin(bundle, out, source, "--chunk-rows", 10)
    while not list(out.glob(".parts/0.parquet/*.parquet")):
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.005)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    (source / "0.parquet").unlink()
    assert end(begin(bundle, out, source, "--chunk-rows", 10))[0] == 0
    assert not (out / ".parts/job.json").exists()
    assert end(begin(swapped, out, corpus(tmp_path / "more", 3, 3) / "2.parquet"))[0] == 0
