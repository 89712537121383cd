from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from jql_engine.cli import run as cli
from jql_engine.job.plan import CHUNK_ROWS
from jql_engine.tokenizer_libraries import fast_name
from tests.cli.command import Result, run_command
from tests.conftest import without_gpu
from tests.inputs import damage, made_with_other_tokie
from tests.job.test_run import TEXTS, assert_scored, sparse, state, visible, write

SCRIPT = str(Path(sys.executable).with_name("jql-run"))
FIGURES = {"documents", "tokens", "seconds", "tokens_per_second", "padding_share", "files"}
LONG = "Water boils at a lower temperature on a mountain. " * 10


@pytest.fixture
def jql_run(bundle, monkeypatch, capfd):
    """The command line in this process, on the tiny bundle unless another is given."""

    def call(*arguments: object) -> Result:
        given = arguments if "--bundle" in arguments else (*arguments, "--bundle", bundle.path)
        return run_command(cli.main, "jql-run", given, monkeypatch, capfd)

    return call


def start(bundle, out: Path, *arguments: object) -> subprocess.Popen[str]:
    """The installed script."""
    command = [SCRIPT, *map(str, arguments), "--bundle", str(bundle.path), "--out", str(out), "--device", "cpu"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(process: subprocess.Popen[str]) -> Result:
    stdout, stderr = process.communicate(timeout=60)
    return Result(process.returncode, stdout, stderr)


def interrupt(process: subprocess.Popen[str], out: Path, signal_: signal.Signals) -> Result:
    """Send `signal_` once the first part is there."""
    while not list(out.glob(".parts/*/*.parquet")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal_)
    return finish(process)


def slow(path: Path) -> Path:
    """A hundred chunks of 100 rows, some tenths of a second each."""
    texts = [f"{LONG} {i}" if i % 3 == 0 else None for i in range(10_000)]
    return write(path, texts, row_group_size=500, id=range(10_000))


SLOW = ("--chunk-rows", 100)


def test_the_script_scores_a_folder_and_ends_with_one_line_of_json(bundle, engine, tmp_path):
    write(tmp_path / "in/a.parquet", TEXTS, id=range(len(TEXTS)))
    write(tmp_path / "in/b/c.parquet", [])
    result = finish(start(bundle, tmp_path / "out", tmp_path / "in"))
    assert result.code == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1 and result.summary.keys() >= FIGURES
    assert (result.summary["documents"], result.summary["files"]) == (len(TEXTS), 2)
    assert f"{len(TEXTS)} documents in 2 files; variant cpu-fp32 on cpu, heads edu, prose" in result.stderr
    assert visible(tmp_path / "out") == ["a.parquet", "b/c.parquet"]
    assert_scored(engine, tmp_path / "in/a.parquet", tmp_path / "out/a.parquet")


def test_a_failure_in_mid_run_exits_1_and_names_the_file(bundle, tmp_path):
    bad = sparse(tmp_path / "in/b.parquet", 3 * CHUNK_ROWS)
    write(tmp_path / "in/a.parquet", TEXTS)
    damage(bad, row_group=9)
    result = finish(start(bundle, tmp_path / "out", tmp_path / "in"))
    assert result.code == 1 and [file["file"] for file in result.summary["unfinished"]] == [str(bad)]
    assert f"jql: {bad} cannot be read to its end" in result.stderr
    assert (tmp_path / "out/a.parquet").exists() and not (tmp_path / "out/b.parquet").exists()
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("same_ids", "library"), [(True, fast_name()), (False, "tokenizers")])
def test_a_job_says_once_which_tokenizer_takes_the_place_of_the_proven_one(bundle, tmp_path, same_ids, library):
    other = made_with_other_tokie(bundle, tmp_path / "other", same_ids=same_ids)
    for name in ("in/a.parquet", "in/b.parquet"):
        write(tmp_path / name, TEXTS)
    result = finish(start(other, tmp_path / "out", tmp_path / "in", "--workers", 2, "--chunk-rows", 4))
    assert result.code == 0, result.stderr
    [line] = [line for line in result.stderr.splitlines() if "tokenizer: " in line]
    assert line.startswith("jql: tokenizer: ") and library in line
    metadata = json.loads(pq.read_schema(tmp_path / "out/a.parquet").metadata[b"jql_engine"])
    assert (metadata["tokenizer"], metadata["bundle"]) == (library, other.hash)


def segments(log: Path) -> list[tuple[str, int]]:
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [(segment["file"], segment["start"]) for line in lines for segment in line["segments"]]


def assert_same(found: Path, expected: Path) -> None:
    """The same rows; scores within the tolerance of a batch."""
    one, other = pq.read_table(found), pq.read_table(expected)
    assert one.column_names == other.column_names
    for name in one.column_names:
        if name.startswith("score_"):
            assert one[name].is_null().equals(other[name].is_null())
            difference = one[name].drop_null().to_numpy() - other[name].drop_null().to_numpy()
            assert abs(difference).max(initial=0) <= 1e-5
        else:
            assert one[name].equals(other[name]), name


def kill_somewhere(process: subprocess.Popen[str], out: Path, n_parts: int, rng: random.Random) -> bool:
    """SIGKILL at a random moment, or right after some part or file came to be; False if the run was quicker."""
    moment = rng.random()
    if moment < 0.4:
        time.sleep(rng.uniform(0, 1.5))
    else:  # the last parts are followed by the assembly
        wanted = n_parts if moment > 0.7 else rng.randrange(n_parts)
        while len(list(out.glob(".parts/*/*.parquet"))) < wanted and process.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("more", "n_kills"),
    [((), 20), (("--workers", 2), 8), (("--output", "append"), 10)],
    ids=["one worker", "two workers", "append"],
)
def test_a_run_killed_at_random_moments_ends_like_one_that_was_not(bundle, tmp_path, more, n_kills):
    rng = random.Random(f"{more}")
    texts = [f"{TEXTS[0]} {i}" if i % 4 else None for i in range(3000)]
    write(tmp_path / "in/large.parquet", texts, 400, id=range(3000))
    for i in range(40):
        write(tmp_path / f"in/small/{i}.parquet", texts[i : i + 10], id=range(10))
    out, log = tmp_path / "out", tmp_path / "log.jsonl"
    options = (tmp_path / "in", "--chunk-rows", 30, "--threads", 1, *more)
    whole = finish(start(bundle, tmp_path / "whole", *options))
    assert whole.code == 0, whole.stderr
    kills = resumed = 0
    for _ in range(5 * n_kills):
        if kills == n_kills:
            break
        resumed += (out / ".parts").exists()
        kills += kill_somewhere(start(bundle, out, *options, "--metrics", log), out, 100, rng)
        if (out / "large.parquet").exists() and not (out / ".parts").exists():
            shutil.rmtree(out)  # begin again, for moments in all of the run
            log.unlink(missing_ok=True)
    assert kills == n_kills and resumed >= n_kills // 3
    last = finish(start(bundle, out, *options, "--metrics", log))
    assert last.code == 0, last.stderr
    assert visible(out) == visible(tmp_path / "whole") and not (out / ".parts").exists()
    for name in visible(out):
        assert_same(out / name, tmp_path / "whole" / name)
    done = segments(log)
    assert len(done) == len(set(done)), "a committed chunk was computed again"


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("more", [(), ("--workers", 2)], ids=["one", "two workers"])
def test_a_signal_finishes_the_chunk_in_hand_and_leaves_a_resumable_state(bundle, tmp_path, signal_, more):
    source, out, log = slow(tmp_path / "a.parquet"), tmp_path / "out", tmp_path / "log.jsonl"
    options = (source, *SLOW, *more, "--metrics", log)
    result = interrupt(start(bundle, out, *options), out, signal_)
    assert result.code == 1 and result.stdout == ""
    assert f"{signal_.name}: finishing what is in hand" in result.stderr
    assert "start the same command again" in result.stderr and "Traceback" not in result.stderr
    done = segments(log)
    assert 0 < len(done) < 50 and not (out / "a.parquet").exists()
    assert not list(out.rglob(".*.writing"))
    again = finish(start(bundle, out, *options))
    assert again.code == 0, again.stderr
    assert again.summary["documents"] == 10_000 - 100 * len(done)
    assert sorted(segments(log)) == [(str(source), start) for start in range(0, 10_000, 100)]
    assert visible(out) == ["a.parquet"] and not (out / ".parts").exists()


def test_a_signal_before_the_run_has_begun_ends_it_too(bundle, tmp_path):
    process = start(bundle, tmp_path / "out", slow(tmp_path / "a.parquet"), *SLOW)
    time.sleep(0.6)
    process.send_signal(signal.SIGTERM)
    result = finish(process)
    assert result.code != 0 and "Traceback" not in result.stderr


def test_a_chunk_that_takes_too_long_is_left_when_the_time_is_up(bundle, tmp_path):
    texts = [f"{LONG} {i}" for i in range(30_000)]
    source, out = write(tmp_path / "a.parquet", texts, row_group_size=500), tmp_path / "out"
    process = start(bundle, out, source, "--chunk-rows", 30_000)  # the byte budget cuts it into chunks of some seconds
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    result = finish(process)
    assert result.code == 1 and time.monotonic() - began < 10 and "Traceback" not in result.stderr


def children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Worker processes, without multiprocessing's resource tracker."""
    return [c for c in psutil.Process(process.pid).children() if "spawn_main" in " ".join(c.cmdline())]


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_ctrl_c_does_not_reach_a_process_that_starts(bundle, tmp_path, nth):
    """A terminal sends it to all processes: the one that looks at inputs, a worker, and the one that finishes files."""
    out = tmp_path / "out"
    process = start(bundle, out, write(tmp_path / "a.parquet", TEXTS), "--chunk-rows", 3)
    seen: set[int] = set()
    while len(seen) < nth and process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            seen |= {child.pid for child in children(process)}
    os.killpg(process.pid, signal.SIGINT)
    result = finish(process)
    assert result.code == 1 and "SIGINT: finishing what is in hand" in result.stderr
    assert not re.search("Traceback|another takes its place|cannot be read", result.stderr), result.stderr
    assert all(json.loads(run.read_text())["unfinished"] == [] for run in out.glob(".parts/*.run"))


@pytest.mark.parametrize("arguments", [("", "--out", "o"), ("in", "--out", ""), ("in", "--out=")])
def test_a_variable_of_the_shell_that_is_not_set_is_misuse(jql_run, arguments):
    result = jql_run(*arguments)
    assert result.code == 2 and "is empty; is a variable of the shell not set?" in result.stderr


def test_a_value_may_end_in_an_equals_sign(jql_run, tmp_path):
    write(tmp_path / "in/a.parquet", TEXTS)
    assert jql_run(tmp_path / "in", f"--out={tmp_path}/lang=").code == 0
    assert visible(tmp_path / "lang=") == ["a.parquet"]


def test_metrics_are_not_taken_for_data(jql_run, tmp_path):
    write(tmp_path / "in/a.parquet", TEXTS)
    for place in ("in", "out"):
        log = tmp_path / place / "metrics.jsonl"
        result = jql_run(tmp_path / "in", "--out", tmp_path / "out", "--metrics", log)
        assert result.code == 1 and "where it would be taken for documents or scores" in result.stderr
        assert not log.exists() and not (tmp_path / "out").exists()
    for given, log in (("in", "in/metrics.log"), ("in/*.parquet", "in/metrics.jsonl"), ("in", "in/.metrics.jsonl")):
        assert jql_run(tmp_path / given, "--out", tmp_path / "out", "--metrics", tmp_path / log).code == 0
        (tmp_path / log).unlink()


@pytest.mark.parametrize("redirected", ["2>/dev/full", "2>&-"])
def test_what_cannot_be_said_stops_nothing(bundle, tmp_path, redirected):
    source = write(tmp_path / "a.parquet", TEXTS)
    command = f"{SCRIPT} {source} --bundle {bundle.path} --out {tmp_path / 'out'} --device cpu {redirected}"
    done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["files"] == 1
    full = subprocess.run(f"{command[: -len(redirected)]} >/dev/full", shell=True, stderr=subprocess.PIPE, text=True)
    assert full.returncode == 1 and "all is done but to print the summary: No space left" in full.stderr
    assert "Traceback" not in full.stderr


def test_a_worker_that_dies_is_reported_and_replaced(bundle, tmp_path):
    source, out = slow(tmp_path / "a.parquet"), tmp_path / "out"
    process = start(bundle, out, source, *SLOW, "--workers", 2)
    while len(list(out.glob(".parts/*/*.parquet"))) < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    children(process)[0].kill()
    result = finish(process)
    assert result.code == 0, result.stderr
    assert "died with exit code -9" in result.stderr and str(source) in result.stderr
    assert result.summary["documents"] == 10_000 and result.summary["unfinished"] == []
    assert visible(out) == ["a.parquet"]
    assert pq.read_table(out / "a.parquet")["id"].to_pylist() == list(range(10_000))


def test_when_the_job_is_killed_its_workers_end(bundle, tmp_path):
    process = start(bundle, tmp_path / "out", slow(tmp_path / "a.parquet"), *SLOW, "--workers", 2)
    while len(list((tmp_path / "out").glob(".parts/*/*.parquet"))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    workers = children(process)
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert len(workers) == 2 and not alive


def test_a_full_disk_is_an_error_that_says_so_and_the_run_goes_on_once_there_is_room(bundle, engine, tmp_path):
    out = tmp_path / "disk"
    out.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(out)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        source = write(
            tmp_path / "a.parquet", [f"{i} Water" for i in range(3000)], id=[f"{i:040}" for i in range(3000)]
        )
        result = finish(start(bundle, out / "scores", source, "--chunk-rows", 100))
        assert result.code == 1 and result.stdout == ""
        assert "No space left on device; free some space and start again" in result.stderr
        assert "Traceback" not in result.stderr and not list(out.rglob(".*.writing"))
        assert all(pq.read_table(file).num_rows == 100 for file in out.rglob("*.parquet") if file.is_file())
        subprocess.run(["mount", "-o", "remount,size=8m", str(out)], check=True)
        again = finish(start(bundle, out / "scores", source, "--chunk-rows", 100))
        assert again.code == 0, again.stderr
        assert 0 < again.summary["documents"] < 3000
        assert visible(out / "scores") == ["a.parquet"]
        assert_scored(engine, source, out / "scores/a.parquet")
    finally:
        subprocess.run(["umount", str(out)], check=True)


def test_a_second_run_skips_what_is_finished_and_overwrite_does_not(jql_run, tmp_path):
    source, out = write(tmp_path / "a.parquet", TEXTS), tmp_path / "out"
    assert jql_run(source, "--out", out).code == 0
    before = state(out)
    second = jql_run(source, "--out", out)
    assert second.code == 0 and "1 file finished already" in second.stderr
    assert (second.summary["files"], second.summary["skipped_files"]) == (0, 1)
    assert state(out) == before
    third = jql_run(source, "--out", out, "--overwrite")
    assert (third.summary["files"], third.summary["skipped_files"]) == (1, 0)
    assert state(out) != before


def test_options_choose_columns_and_graph(jql_run, tmp_path):
    write(tmp_path / "a.parquet", ["x"], content=["Water boils"], key=["k"])
    columns = ("--text-column", "content", "--id-column", "key")
    result = jql_run(
        tmp_path / "*.parquet", "--out", tmp_path / "out", *columns, "--variant", "standard-fp32", "--threads", "1"
    )
    assert result.code == 0 and result.summary["variant"] == "standard-fp32"
    settings = json.loads(pq.read_schema(tmp_path / "out/a.parquet").metadata[b"jql_engine"])
    assert (settings["text_column"], settings["id_column"], settings["variant"]) == ("content", "key", "standard-fp32")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "inputs"),
        (["a.parquet"], "--out"),
        (["a.parquet", "--out", "out", "--threads", "0"], "--threads"),
        (["a.parquet", "--out", "out", "--threads", "many"], "--threads"),
        (["a.parquet", "--out", "out", "--color", "red"], "--color"),
        (["a.parquet", "--out", "out", "--output", "both"], "--output"),
        (["a.parquet", "--out", "out", "--embeddings", "int8"], "--embeddings"),
        (["a.parquet", "--out", "out", "--workers", "0"], "--workers"),
        (["a.parquet", "--price-per-hour", "2", "--out", "out"], "--estimate"),
        (["a.parquet", "--estimate", "--price-per-hour", "-2"], "--price-per-hour"),
        (["a.parquet", "--rank", "1", "--out", "out"], "--world-size"),
    ],
)
def test_misuse_exits_2_and_names_the_argument(jql_run, tmp_path, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.parquet", ["x"])
    result = jql_run(*arguments)
    assert result.code == 2 and result.stdout == ""
    assert named in result.stderr
    assert visible(tmp_path) == ["a.parquet"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["in", "--bundle", "in"], "in is no bundle: bundle.json cannot be read"),
        (["absent"], "absent does not exist"),
        (["in/*.txt"], "in/*.txt matches no file"),
        (["in", "--text-column", "content"], "in/a.parquet has no column 'content'; it has text"),
        (["in", "--variant", "cpu-int8"], "has no variant 'cpu-int8'"),
        (["in", "--device", "tpu"], "device 'tpu' is unknown"),
    ],
)
def test_what_cannot_be_done_exits_1_with_one_line_and_writes_nothing(
    jql_run, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in/a.parquet", ["x"])
    result = jql_run(*arguments, "--out", "out")
    assert result.code == 1 and result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("jql-run: ") and message in line
    assert visible(tmp_path) == ["in/a.parquet"] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["in", "in/out", "in/a.parquet/out", "/proc/out"])
def test_an_output_that_cannot_be_used_exits_1(jql_run, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in/a.parquet", ["x"])
    result = jql_run("in/a.parquet" if out.startswith("/") else "in", "--out", out)
    assert result.code == 1 and result.stdout == "" and out in result.stderr
    assert visible(tmp_path) == ["in/a.parquet"]


@without_gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_a_gpu_that_is_not_there_exits_1_and_writes_nothing(jql_run, tmp_path, device):
    result = jql_run(write(tmp_path / "a.parquet", ["x"]), "--out", tmp_path / "out", "--device", device)
    assert result.code == 1 and result.stdout == ""
    assert f"device {device} was requested" in result.stderr
    assert visible(tmp_path) == ["a.parquet"]


@pytest.mark.parametrize("option", ["--no-build", "--engine-cache=engines", "--library=tensorrt-rtx"])
def test_an_option_of_tensorrt_exits_1_where_the_variant_is_another(jql_run, tmp_path, option):
    result = jql_run(write(tmp_path / "a.parquet", ["x"]), "--out", tmp_path / "out", option)
    assert result.code == 1 and "variant cpu-fp32 does not run with TensorRT; leave out " in result.stderr
    assert visible(tmp_path) == ["a.parquet"]


def test_a_metrics_file_that_cannot_be_written_costs_its_lines_alone(bundle, engine, tmp_path):
    path = sparse(tmp_path / "a.parquet", 1000)
    result = finish(start(bundle, tmp_path / "out", path, "--chunk-rows", 100, "--metrics", "/dev/full"))
    assert "Traceback" not in result.stderr
    assert result.stderr.count("--metrics /dev/full cannot be written: No space left on device") == 1
    assert result.code == 1 and [file["file"] for file in result.summary["unfinished"]] == ["/dev/full"]
    assert result.summary["files"] == 1
    assert_scored(engine, path, tmp_path / "out/a.parquet")


def test_no_worker_begins_where_nothing_is_left_to_do(bundle, tmp_path):
    path = sparse(tmp_path / "a.parquet", 1000)
    assert finish(start(bundle, tmp_path / "out", path)).code == 0
    result = finish(start(bundle, tmp_path / "out", path))
    assert (result.code, result.summary["skipped_files"]) == (0, 1)
    assert result.summary["stages"] == {} and result.summary["bottleneck"] is None
