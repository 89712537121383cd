from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import onnxruntime
import pyarrow.parquet as pq
import pytest

from jql_engine import cli
from jql_engine.dataset import CHUNK_ROWS
from tests.test_dataset import damage
from tests.test_run import TEXTS, assert_scored, sparse, state, visible, write

SCRIPT = str(Path(sys.executable).with_name("jql-run"))
FIGURES = {"documents", "tokens", "seconds", "tokens_per_second", "padding_share", "files"}
LONG = "Water boils at a lower temperature on a mountain. " * 10


class Result(NamedTuple):
    code: int
    stdout: str
    stderr: str

    @property
    def summary(self) -> dict[str, object]:
        return json.loads(self.stdout.splitlines()[-1])


@pytest.fixture
def jql_run(bundle, monkeypatch, capfd):
    """The command line in this process, on the tiny bundle unless another is given."""

    def call(*arguments: object) -> Result:
        given = [str(argument) for argument in arguments]
        given += [] if "--bundle" in given else ["--bundle", str(bundle.path)]
        monkeypatch.setattr(sys, "argv", ["jql-run", *given])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return Result(exit_.value.code or 0, *capfd.readouterr())

    return call


def start(bundle, out: Path, *arguments: object) -> subprocess.Popen[str]:
    """The installed script."""
    command = [SCRIPT, *map(str, arguments), "--bundle", str(bundle.path), "--out", str(out), "--device", "cpu"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> Result:
    stdout, stderr = process.communicate(timeout=60)
    return Result(process.returncode, stdout, stderr)


def interrupt(process: subprocess.Popen[str], begun: Path, signal_: signal.Signals) -> Result:
    """Send `signal_` once the file `begun` is there."""
    while not begun.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    time.sleep(0.5)  # it is being written, well past the moment in which it is opened
    process.send_signal(signal_)
    return finish(process)


def slow(path: Path) -> Path:
    """Three chunks, of which the last two take some seconds."""
    texts = [LONG if i > CHUNK_ROWS and i % 10 == 0 else None for i in range(3 * CHUNK_ROWS)]
    return write(path, texts, row_group_size=5_000)


def test_the_script_scores_a_folder_and_ends_with_one_line_of_json(bundle, engine, tmp_path):
    write(tmp_path / "in/a.parquet", TEXTS, id=range(len(TEXTS)))
    write(tmp_path / "in/b/c.parquet", [])
    result = finish(start(bundle, tmp_path / "out", tmp_path / "in"))
    assert result.code == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1 and result.summary.keys() >= FIGURES
    assert (result.summary["documents"], result.summary["files"]) == (len(TEXTS), 2)
    assert f"{len(TEXTS)} documents in 2 files; variant cpu-fp32, heads edu, prose" in result.stderr
    assert visible(tmp_path / "out") == ["a.parquet", "b/c.parquet"]
    assert_scored(engine, tmp_path / "in/a.parquet", tmp_path / "out/a.parquet")


def test_a_failure_in_mid_run_exits_1_and_names_the_file(bundle, tmp_path):
    bad = sparse(tmp_path / "in/b.parquet", 3 * CHUNK_ROWS)
    write(tmp_path / "in/a.parquet", TEXTS)
    damage(bad, row_group=9)
    result = finish(start(bundle, tmp_path / "out", tmp_path / "in"))
    assert result.code == 1 and result.stdout == ""
    assert f"jql-run: {bad} cannot be read to its end" in result.stderr
    assert visible(tmp_path / "out") == ["a.parquet"]
    assert "Traceback" not in result.stderr


def test_a_killed_run_leaves_whole_files_only_and_can_be_started_again(bundle, engine, tmp_path):
    small, large = write(tmp_path / "in/a.parquet", TEXTS), slow(tmp_path / "in/b.parquet")
    out = tmp_path / "out"
    killed = interrupt(start(bundle, out, tmp_path / "in"), out / ".b.parquet.writing", signal.SIGKILL)
    assert killed.code == -signal.SIGKILL and killed.stdout == ""
    assert visible(out) == [".b.parquet.writing", "a.parquet"]
    assert_scored(engine, small, out / "a.parquet")
    again = finish(start(bundle, out, tmp_path / "in"))
    assert again.code == 0, again.stderr
    assert (again.summary["files"], again.summary["skipped_files"]) == (1, 1)
    assert visible(out) == ["a.parquet", "b.parquet"]
    found = pq.read_table(out / "b.parquet")
    assert found["score_edu"].is_null().equals(pq.read_table(large)["text"].is_null())


def test_an_interrupted_run_exits_1_says_how_to_continue_and_leaves_nothing_unfinished(bundle, tmp_path):
    source, out = slow(tmp_path / "a.parquet"), tmp_path / "out"
    result = interrupt(start(bundle, out, source), out / ".a.parquet.writing", signal.SIGINT)
    assert visible(out) == []
    assert "start the same command again" in result.stderr and "Traceback" not in result.stderr
    assert result.code == 1 and result.stdout == ""


def test_a_second_run_skips_what_is_finished_and_overwrite_does_not(jql_run, tmp_path):
    source, out = write(tmp_path / "a.parquet", TEXTS), tmp_path / "out"
    assert jql_run(source, "--out", out).code == 0
    before = state(out)
    second = jql_run(source, "--out", out)
    assert second.code == 0 and "1 files are finished already" in second.stderr
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
        (["a.parquet", "--out", "out", "--colour", "red"], "--colour"),
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
        (["in", "--variant", "cpu-int8"], "has no variant cpu-int8"),
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


@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_a_gpu_that_is_not_there_exits_1_and_writes_nothing(jql_run, tmp_path, device):
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the CUDA provider")
    result = jql_run(write(tmp_path / "a.parquet", ["x"]), "--out", tmp_path / "out", "--device", device)
    assert result.code == 1 and result.stdout == ""
    assert f"device {device} was requested" in result.stderr and "CPUExecutionProvider" in result.stderr
    assert visible(tmp_path) == ["a.parquet"]
