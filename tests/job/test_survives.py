"""A job outlives the files that pyarrow itself dies of, also with one worker."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jql_engine.errors import InputError
from jql_engine.job import apart
from jql_engine.job.apart import Child, CrashError, in_threads
from tests.job.test_run import TEXTS, assert_scored, visible, write

DATA = Path(__file__).parents[1] / "data"
ABORTING = sorted(DATA.glob("pyarrow-aborts-*.parquet"))
SCRIPT = str(Path(sys.executable).with_name("jql-run"))


def abort(_: object) -> None:
    signal.raise_signal(signal.SIGABRT)


def odd_aborts(number: int) -> int:
    if number % 2:
        signal.raise_signal(signal.SIGSEGV)
    return -number


def refuse(number: int) -> int:
    raise InputError(f"{number} is refused")


def test_a_call_that_its_process_dies_of_is_an_error_and_the_next_is_made():
    with Child() as child:
        with pytest.raises(CrashError, match="SIGABRT"):
            child.call(abort, 1)
        assert child.call(abs, -3) == 3
        with pytest.raises(InputError, match="7 is refused"):
            child.call(refuse, 7)
        assert list(child.each(odd_aborts, range(5), lambda number, _: number)) == [0, 1, -2, 3, -4]


def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def test_a_child_that_is_closed_in_mid_call_ends_the_call_and_makes_no_other():
    for pause in (0, 0.3, 1.5):  # before its process has begun, and while it is at work
        child = Child()
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(child.call, sleep, 60)
            time.sleep(pause)
            child.close()
            with pytest.raises(CrashError):
                call.result(timeout=30)
        with pytest.raises(CrashError, match="was ended"):
            child.call(abs, 1)
        child.close()


def test_what_waits_for_long_is_named(monkeypatch, capsys):
    monkeypatch.setattr(apart, "PATIENCE_SECONDS", 0.05)
    assert in_threads(sleep, [0.0, 0.3]) == [0.0, 0.3]
    err = capsys.readouterr().err
    assert "still 1 to go; waiting for 0.3" in err and len(err.splitlines()) > 2


def test_what_one_of_several_raises_comes_out_at_once():
    began = time.monotonic()
    with pytest.raises(InputError, match="7 is refused"):
        in_threads(lambda number: refuse(7) if number == 7 else time.sleep(3), [1, 7, 2])
    assert time.monotonic() - began < 2


ORPHAN = """
import multiprocessing, os, signal, sys, time
from jql_engine.job.apart import die_with_parent

def work(place):
    time.sleep(1)  # as an import does
    die_with_parent()
    open(place, "w").close()

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=work, args=(sys.argv[1],)).start()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_whose_parent_is_gone_before_it_begins_does_nothing(tmp_path):
    script, place = tmp_path / "orphan.py", tmp_path / "place"
    script.write_text(ORPHAN)
    process = subprocess.Popen([sys.executable, script, place], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.communicate(timeout=30)  # until the last that has its stdout is gone
    assert not place.exists()


def test_there_are_files_that_pyarrow_dies_of():
    """Else the test below shows nothing: pyarrow was mended, and other files are to be found by tests.fuzz."""
    assert ABORTING
    read = (
        "import sys, pyarrow.parquet as pq; group = pq.ParquetFile(sys.argv[1]).metadata.row_group(0); "
        "print([group.column(i) for i in range(group.num_columns)])"
    )
    for file in ABORTING:
        assert subprocess.run([sys.executable, "-c", read, file], check=False, capture_output=True).returncode < 0


@pytest.mark.parametrize("workers", [1, 2])
def test_files_that_pyarrow_dies_of_are_named_and_the_others_done(bundle, engine, tmp_path, workers):
    source, out = tmp_path / "in", tmp_path / "out"
    for name in "ac":
        write(source / f"{name}.parquet", TEXTS)
    for file in ABORTING:
        shutil.copy(file, source / f"b-{file.name}")
    (source / "latin1.parquet").write_bytes((source / "a.parquet").read_bytes().replace(b"text", b"t\xe9xt"))
    (source / "cut.parquet").write_bytes((source / "a.parquet").read_bytes()[:-20])
    command = [SCRIPT, source, "--bundle", bundle.path, "--out", out, "--device", "cpu", "--workers", workers]
    for _ in range(2):  # again, as who does not understand starts it again
        ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        bad = sorted([*(f"b-{file.name}" for file in ABORTING), "latin1.parquet", "cut.parquet"])
        assert ended.returncode == 1 and "Traceback" not in ended.stderr, ended.stderr
        summary = json.loads(ended.stdout.splitlines()[-1])
        assert sorted(Path(file["file"]).name for file in summary["unfinished"]) == bad
        assert all(name in ended.stderr for name in bad)
        assert [name for name in visible(out) if not name.endswith(".run")] == ["a.parquet", "c.parquet"]
    for name in "ac":
        assert_scored(engine, source / f"{name}.parquet", out / f"{name}.parquet")
