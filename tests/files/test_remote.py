"""Real servers on loopback: S3 (moto), HTTP with ranges, a hub with one dataset; and what a network does to a job."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from s3fs import S3FileSystem
from upath import UPath

from jql_engine import Bundle, EngineError
from jql_engine.errors import InputError, OutputError
from jql_engine.files import retries, storage, writing
from jql_engine.files.inputs import find_files
from jql_engine.files.reading import read
from jql_engine.job.finished import check_finished
from jql_engine.job.launch import Machine, score
from jql_engine.job.plan import Job
from jql_engine.job.progress import RunLog
from jql_engine.job.scoring import prepare
from jql_engine.sessions.base import SessionOptions
from jql_export import probes
from tests import servers
from tests.servers import Fault, Request, Server

TOLERANCE = 1e-5
NAMES = ("a.parquet", "b=1/c d/été #1%20.parquet", "b=1/x.parquet/part-0.parquet", "lines.jsonl.gz")
OWN = ("/.jql-run", "/.parts/job.json", ".run")  # what every run writes
JQL_RUN = Path(sys.executable).with_name("jql-run")


@pytest.fixture(autouse=True)
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody's credentials, one attempt of botocore's where it would make five, no pause of ours, and no old client."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "HF_")) or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1", "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(retries, "_retries", retries.RetryPolicy(minutes=3 / 60, first=0.01))
    monkeypatch.setattr(S3FileSystem, "retries", 1)  # of s3fs itself, which waits up to 2 s
    forget()
    yield
    forget()


def forget() -> None:
    """File systems remember listings and endpoints for as long as a process lives."""
    for name in ("s3", "http", "hf"):
        fsspec.get_filesystem_class(name).clear_instance_cache()


@pytest.fixture(scope="module")
def moto() -> Iterator[Server]:
    with servers.s3() as server:
        yield server


@pytest.fixture
def s3(moto: Server, client: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The server, empty but for the bucket `bucket`."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto.url)
    moto.fault = lambda _: None
    files = S3FileSystem()
    files.mkdir("bucket")
    moto.requests.clear()
    moto.faults.clear()
    yield moto
    moto.fault = lambda _: None
    files.invalidate_cache()
    files.rm("bucket", recursive=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NAMES, of a few hundred rows each."""
    folder = tmp_path_factory.mktemp("corpus")
    for number, name in enumerate(NAMES):
        write(folder / name, n_docs=150 + 50 * number, seed=number)
    return folder


@pytest.fixture(scope="module")
def local(corpus: Path, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an uninterrupted local run over `corpus`, in chunks of 40."""
    out = tmp_path_factory.mktemp("local")
    run(bundle, out, corpus)
    return out


def write(file: Path, n_docs: int, seed: int, n_noise: int = 40) -> Path:
    """With `n_noise` bytes in each row of a column that nobody reads."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    words = " ".join(probes.SENTENCES[:12]).split()
    texts: list[str | None] = [" ".join(draw.choices(words, k=draw.randint(0, 60))) for _ in range(n_docs)]
    texts[3] = None
    ids = [f"{seed}-{i}" for i in range(n_docs)]
    if file.suffix == ".gz":
        rows = [{"id": i, "text": text, "more": [1]} for i, text in zip(ids, texts, strict=True)]
        file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    else:
        noise = [draw.randbytes(n_noise) for _ in range(n_docs)]
        table = pa.table({"id": ids, "noise": noise, "text": pa.array(texts, pa.string())})
        pq.write_table(table, file, row_group_size=70)
    return file


def run(bundle: Bundle, out: object, *inputs: object, log: Path | None = None, **options: Any) -> dict[str, Any]:
    """What jql-run does."""
    job = Job(tuple(map(str, inputs)), str(out), **{"chunk_rows": 40, **options})
    return score(job, bundle, Machine("cpu", options=SessionOptions(threads=1)), RunLog(log), threading.Event())


def command(bundle: Bundle, out: str, *inputs: str, **options: object) -> list[str]:
    given = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    fixed = ["--bundle", str(bundle.path), "--out", out, "--device", "cpu", "--threads", "1"]
    return [str(JQL_RUN), *inputs, *fixed, *given]


def upload(folder: Path, to: str = "bucket/in") -> None:
    files = S3FileSystem()
    for file in folder.rglob("*"):
        if file.is_file():
            files.put_file(str(file), f"{to}/{file.relative_to(folder).as_posix()}")


def objects(prefix: str = "bucket/out") -> list[str]:
    files = S3FileSystem()
    files.invalidate_cache()
    return sorted(name.removeprefix(f"{prefix}/") for name in files.find(prefix))


def output_name(name: str) -> str:
    return name.replace(".jsonl.gz", ".parquet")


def read_s3(name: str) -> pa.Table:
    with S3FileSystem().open(f"bucket/out/{name}") as stream:
        return pq.read_table(stream)


def assert_same(found: pa.Table, expected: pa.Table) -> None:
    """Scores within TOLERANCE, all else identical."""
    assert found.schema.equals(expected.schema)
    assert found.num_rows == expected.num_rows
    for name in expected.column_names:
        if name.startswith("score_"):
            assert found[name].is_null().equals(expected[name].is_null())
            difference = found[name].drop_null().to_numpy() - expected[name].drop_null().to_numpy()
            assert np.abs(difference).max(initial=0) <= TOLERANCE
        else:
            assert found[name].combine_chunks().equals(expected[name].combine_chunks()), name


def assert_bucket_is(local: Path, names: tuple[str, ...] = NAMES) -> None:
    """out/ holds the output of the local run and nothing else, and no upload is pending."""
    assert objects() == sorted(map(output_name, names))
    for name in map(output_name, names):
        assert_same(read_s3(name), pq.read_table(local / name))
    assert "Uploads" not in S3FileSystem().call_s3("list_multipart_uploads", Bucket="bucket")


def every(k: int, *faults: Fault, only: str = "") -> Any:
    """Each k-th request meets one of `faults` in turn; `only` those with this in their path."""
    counts = {"requests": 0, "faults": 0}

    def fault(request: Request) -> Fault | None:
        if only not in request.path:
            return None
        counts["requests"] += 1
        if counts["requests"] % k:
            return None
        counts["faults"] += 1
        return faults[counts["faults"] % len(faults)]

    return fault


def failing(method: str, path: str, fault: Fault, times: int = sys.maxsize) -> Any:
    """The first `times` requests of this kind meet `fault`."""
    left = [times]

    def decide(request: Request) -> Fault | None:
        if request.method != method or not request.path.startswith(path) or not left[0]:
            return None
        left[0] -= 1
        return fault

    return decide


def test_a_bucket_to_a_bucket_gives_the_rows_of_a_local_run(s3, bundle, corpus, local):
    upload(corpus)
    files = S3FileSystem()
    for ignored in ("_tmp/x.parquet", ".hidden.parquet", "notes.txt"):
        files.pipe_file(f"bucket/in/{ignored}", b"no parquet")
    for marker in ("in/b=1/", "in/b=1/x.parquet/"):  # as consoles and Hadoop make folders
        files.call_s3("put_object", Bucket="bucket", Key=marker, Body=b"")
    summary = run(bundle, "s3://bucket/out", "s3://bucket/in")
    assert (summary["files"], summary["unfinished"]) == (len(NAMES), [])
    assert_bucket_is(local)
    before = {name: files.info(f"bucket/out/{name}")["LastModified"] for name in objects()}
    again = run(bundle, "s3://bucket/out", "s3://bucket/in/")
    assert (again["files"], again["skipped_files"], again["documents"]) == (0, len(NAMES), 0)
    files.invalidate_cache()
    assert before == {name: files.info(f"bucket/out/{name}")["LastModified"] for name in objects()}


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("s3://bucket/in/a.parquet", ("a.parquet",)),
        ("s3://bucket/in/lines.jsonl.gz", ("lines.jsonl.gz",)),
        ("s3://bucket/in/**/*.parquet", NAMES[:3]),
        ("s3://bucket/in/b=1", ("c d/été #1%20.parquet", "x.parquet/part-0.parquet")),
    ],
)
def test_object_names_are_those_below_the_fixed_part_of_the_url(s3, bundle, corpus, given, names):
    upload(corpus)
    run(bundle, "s3://bucket/out", given)
    assert objects() == sorted(map(output_name, names))


def test_source_columns_and_scores_together_in_a_bucket(s3, bundle, corpus, local):
    upload(corpus)
    run(bundle, "s3://bucket/out", "s3://bucket/in/**/*.parquet", output="append")
    assert objects() == sorted(NAMES[:3])
    for name in NAMES[:3]:
        found, source = read_s3(name), pq.read_table(corpus / name)
        scores = pq.read_table(local / name)
        assert found.column_names == [*source.column_names, *scores.column_names[1:]]
        assert found.select(source.column_names).equals(source)
        assert_same(found.select(scores.column_names).replace_schema_metadata(scores.schema.metadata), scores)


def put(output: UPath, data: bytes) -> None:
    writing.write(output, pa.py_buffer(data), output.parent / ".writing", replace=False)


def put_stream(output: UPath, data: bytes) -> None:
    with writing.writing(output, output.parent / ".writing", replace=False) as stream:
        stream.write(data)


def put_in_parts(output: UPath, data: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3fs.core, "calculate_chunksize", lambda *_, **__: 5 << 20)
        put_stream(output, data * (1 + (10 << 20) // len(data)))


UPLOADS = pytest.mark.parametrize("upload_new", [put, put_stream, put_in_parts])


@UPLOADS
def test_an_object_that_must_not_be_there_is_created_and_never_replaced(s3, upload_new):
    output = UPath("s3://bucket/out/a.bin")
    upload_new(output, b"first")
    before = output.read_bytes()
    with pytest.raises(FileExistsError, match=r"a\.bin"):
        upload_new(output, b"second")
    assert output.read_bytes() == before and before.startswith(b"first")
    assert not boto3.client("s3").list_multipart_uploads(Bucket="bucket").get("Uploads")


@UPLOADS
@pytest.mark.parametrize("fault", ["lose", "conflict", "busy", "drop"])
def test_an_object_whose_creation_was_not_answered_is_ours(s3, upload_new, fault):
    output, seen = UPath("s3://bucket/out/a.bin"), []

    def once(request: Request) -> Fault | None:
        if request.headers.get("If-None-Match") is None:
            return None
        seen.append(request.method)
        return fault if len(seen) == 1 else None

    s3.fault = once
    upload_new(output, b"first")
    assert output.read_bytes().startswith(b"first") and len(s3.faults) == 1
    with pytest.raises(FileExistsError):
        upload_new(output, b"second")


def test_of_many_that_create_one_object_one_succeeds(s3):
    def create(number: int) -> bool:
        try:
            put(UPath("s3://bucket/out/a.bin"), b"%d" % number)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(create, range(8)))
    assert created.count(True) == 1
    assert UPath("s3://bucket/out/a.bin").read_bytes() == b"%d" % created.index(True)


def test_a_changed_object_is_an_error(s3, bundle, tmp_path):
    file = write(tmp_path / "a.parquet", 100, 0)
    upload(tmp_path)
    run(bundle, "s3://bucket/out", "s3://bucket/in")
    write(file, 100, 1)
    upload(tmp_path)
    with pytest.raises(OutputError, match=r"before its source .* changed; .*--overwrite"):
        run(bundle, "s3://bucket/out", "s3://bucket/in")
    run(bundle, "s3://bucket/out", "s3://bucket/in", overwrite=True)
    assert read_s3("a.parquet")["id"].to_pylist() == pq.read_table(file)["id"].to_pylist()


@pytest.mark.parametrize("listed_here", [True, False])
def test_an_object_exchanged_after_it_was_listed_is_noticed_as_it_is_opened(s3, bundle, tmp_path, listed_here):
    file = write(tmp_path / "a.parquet", 100, 0)
    write(tmp_path / "b.parquet", 100, 1)
    upload(tmp_path)
    work = prepare(Job(("s3://bucket/in",), tmp_path / "out"), bundle, "cpu-fp32", 1 << 20)
    content = write(file, 100, 2).read_bytes()
    boto3.client("s3").put_object(Bucket="bucket", Key="in/a.parquet", Body=content)
    inputs = [output.file for output in work.outputs]
    if not listed_here:  # a worker process knows nothing of the listing
        stored = pickle.dumps(inputs)
        forget()
        inputs = pickle.loads(stored)
    n_before = len(s3.requests)
    found = list(read(inputs.__getitem__, work.tasks))
    [failure] = found[-1].failures
    assert failure.message == "s3://bucket/in/a.parquet was changed during the run; start the same command again"
    asked = [request.method for request in s3.requests[n_before:] if request.path == "/bucket/in/a.parquet"]
    assert asked == (["GET"] if listed_here else ["HEAD"])


def test_parts_of_a_changed_object_are_an_error(s3, bundle, tmp_path):
    file = write(tmp_path / "a.parquet", 100, 0)
    upload(tmp_path)
    s3.fault = failing("PUT", "/bucket/out/a.parquet", "drop")
    with pytest.raises(OutputError, match=r"s3://bucket/out/a.parquet cannot be written: ConnectionClosedError"):
        run(bundle, "s3://bucket/out", "s3://bucket/in")
    s3.fault = lambda _: None
    assert len([name for name in objects() if name.startswith(".parts/a.parquet/")]) == 3
    write(file, 100, 1)
    upload(tmp_path)
    with pytest.raises(OutputError, match=r"before its source .* changed; .*--overwrite"):
        run(bundle, "s3://bucket/out", "s3://bucket/in")
    run(bundle, "s3://bucket/out", "s3://bucket/in", overwrite=True)
    assert objects() == ["a.parquet"]


@pytest.mark.parametrize(
    ("given", "out", "message"),
    [
        ("s3://missing/in", "s3://bucket/out", "s3://missing/in cannot be found"),
        ("s3://bucket/in/b.parquet", "s3://bucket/out", "s3://bucket/in/b.parquet cannot be found"),
        ("s3://bucket/in/b*.parquet", "s3://bucket/out", "matches no file"),
        ("s3://bucket/none", "s3://bucket/out", "s3://bucket/none cannot be found"),
        ("s3://bucket/in", "s3://missing/out", "--out s3://missing/out is not a folder that can be written"),
        ("s3://bucket/in", "s3://bucket/in/out", "lies inside of the input"),
        ("nofs://bucket/in", "s3://bucket/out", "nofs://bucket/in"),
        ("s3://bucket/in", "nofs://bucket/out", "nofs://bucket/out"),
        ("http://127.0.0.1:9/a.parquet", "s3://bucket/out", "http://127.0.0.1:9/a.parquet"),
    ],
)
def test_what_is_not_there_is_named_in_one_line(s3, bundle, tmp_path, given, out, message):
    write(tmp_path / "a.parquet", 10, 0)
    upload(tmp_path)
    with pytest.raises(EngineError) as caught:
        run(bundle, out, given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command_says_so_and_exits_1(s3, bundle):
    done = subprocess.run(
        command(bundle, "s3://bucket/out", "s3://bucket/in/*.parquet"), capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "jql-run: s3://bucket/in/*.parquet cannot be found: bucket/in\n"


def test_a_file_of_this_machine_by_its_url(bundle, corpus, local, tmp_path):
    run(bundle, (tmp_path / "out").as_uri(), (corpus / "a.parquet").as_uri())
    assert_same(pq.read_table(tmp_path / "out" / "a.parquet"), pq.read_table(local / "a.parquet"))


def test_killed_at_random_moments_it_ends_with_the_output_of_an_uninterrupted_run(
    s3, bundle, corpus, local, tmp_path, monkeypatch
):
    temporary, log, draw = tmp_path / "temporary", tmp_path / "metrics.jsonl", random.Random(0)
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    upload(corpus)
    s3.requests.clear()
    start = command(bundle, "s3://bucket/out", "s3://bucket/in", chunk_rows=5, metrics=log)
    killed = [kill(start, log, n_parts, draw.uniform(0, 0.1)) for n_parts in (-1, 0, 0, 5, 20)]
    start += ["--workers", "2"]
    killed.append(kill(start, log, 5, 0))
    assert all(killed)
    done = subprocess.run(start, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_bucket_is(local)
    puts = Counter(request.path for request in s3.requests if request.method == "PUT")
    assert [path for path, count in puts.items() if count > 1 and not path.endswith(OWN)] == []
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    segments = Counter(tuple(segment.values()) for line in lines for segment in line["segments"])
    assert set(segments.values()) == {1}
    assert [file for file in temporary.iterdir() if file.name != ".ses"] == []  # that one is ONNX Runtime's


def kill(start: list[str], log: Path, n_parts: int, seconds: float) -> bool:
    """Kill the job some time after it has logged more than `n_parts`; False if it was done before."""
    begun = logged(log)
    with subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        process.stderr.readline()  # the beginning: all is checked
        for _ in range(3_000):
            if process.poll() is not None or logged(log) > begun + n_parts:
                break
            time.sleep(0.01)
        time.sleep(seconds)
        process.kill()
    return process.returncode < 0


def logged(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


def test_a_network_that_fails_now_and_then_changes_nothing(s3, bundle, corpus, local):
    upload(corpus)
    s3.fault = every(7, "drop", "busy", "cut")
    assert run(bundle, "s3://bucket/out", "s3://bucket/in")["unfinished"] == []
    kinds = {kind for kind, _ in s3.faults}
    s3.fault = lambda _: None
    assert kinds == {"drop", "busy", "cut"}
    assert_bucket_is(local)


def test_a_file_that_stays_out_of_reach_is_named_and_the_rest_is_done(s3, bundle, corpus, local, capfd):
    upload(corpus)
    s3.fault = failing("GET", "/bucket/in/a.parquet", "cut")
    summary = run(bundle, "s3://bucket/out", "s3://bucket/in")
    waits = [line for line in capfd.readouterr().err.splitlines() if "; again in " in line]
    assert len(waits) > 1
    assert all(line.startswith("jql: s3://bucket/in/a.parquet: ") for line in waits)
    assert [file["file"] for file in summary["unfinished"]] == ["s3://bucket/in/a.parquet"]
    assert "s3://bucket/in/a.parquet cannot be read" in summary["unfinished"][0]["reason"]
    s3.fault = lambda _: None
    assert [one.file for one in check_finished("s3://bucket/out")] == ["s3://bucket/in/a.parquet"]
    assert run(bundle, "s3://bucket/out", "s3://bucket/in")["skipped_files"] == len(NAMES) - 1
    assert check_finished("s3://bucket/out") == []
    assert_bucket_is(local)


def test_a_file_that_breaks_off_in_the_middle_keeps_its_parts(s3, bundle, tmp_path):
    # More than is asked for at once, four times.
    a, b = (
        write(tmp_path / "a.parquet", 1_000, 0, 4 * storage.REMOTE_BLOCK // 1_000),
        write(tmp_path / "b.parquet", 100, 1),
    )
    run(bundle, tmp_path / "local", a, b)
    upload(tmp_path)

    def gone(request: Request) -> Fault | None:
        begun = any(other.path.startswith("/bucket/out/.parts/a.parquet/") for other in s3.requests)
        return "drop" if begun and request.path == "/bucket/in/a.parquet" else None

    s3.fault = gone
    broken = run(bundle, "s3://bucket/out", "s3://bucket/in/*.parquet")
    assert [file["file"] for file in broken["unfinished"]] == ["s3://bucket/in/a.parquet"]
    assert "a.parquet cannot be read to its end" in broken["unfinished"][0]["reason"]
    assert "b.parquet" in objects() and "a.parquet" not in objects()
    s3.fault = lambda _: None
    rest = run(bundle, "s3://bucket/out", "s3://bucket/in/*.parquet")
    assert 0 < rest["documents"] == 1_100 - broken["documents"] < 1_000
    assert_bucket_is(tmp_path / "local", ("a.parquet", "b.parquet"))


@pytest.mark.parametrize("given", ["s3://bucket/in", "s3://bucket/in/a.parquet"])
def test_an_object_that_is_replaced_while_it_is_read_is_named(s3, bundle, tmp_path, given):
    write(tmp_path / "a.parquet", 1_000, 0, 4 * storage.REMOTE_BLOCK // 1_000)
    upload(tmp_path)
    other = write(tmp_path / "a.parquet", 1_000, 1, 4 * storage.REMOTE_BLOCK // 1_000).read_bytes()
    behind = boto3.client("s3", endpoint_url=s3.behind)

    def replace(request: Request) -> Fault | None:
        if request.path.startswith("/bucket/out/.parts/a.parquet/") and not replaced:
            replaced.append(request)
            behind.put_object(Bucket="bucket", Key="in/a.parquet", Body=other)
        return None

    replaced: list[Request] = []
    s3.fault = replace
    summary = run(bundle, "s3://bucket/out", given)
    assert "a.parquet was changed during the run" in summary["unfinished"][0]["reason"]


def test_a_run_that_died_between_the_finished_file_and_tidying_up_is_tidied_up_by_the_next(s3, bundle, corpus, local):
    upload(corpus)
    s3.fault = lambda request: "drop" if request.method == "DELETE" and "/.parts/a.parquet/" in request.path else None
    with pytest.raises(OutputError):
        run(bundle, "s3://bucket/out", "s3://bucket/in/a.parquet")
    s3.fault = lambda _: None
    assert "a.parquet" in objects() and len(objects()) > 1
    assert run(bundle, "s3://bucket/out", "s3://bucket/in/a.parquet")["skipped_files"] == 1
    assert_bucket_is(local, ("a.parquet",))


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_an_output_that_cannot_be_looked_at_is_not_called_foreign(s3, bundle, corpus, method):
    upload(corpus)
    run(bundle, "s3://bucket/out", "s3://bucket/in/a.parquet")
    forget()
    s3.fault = failing(method, "/bucket/out/a.parquet", "busy", times=2)
    assert run(bundle, "s3://bucket/out", "s3://bucket/in/a.parquet")["skipped_files"] == 1
    assert len(s3.faults) == 2
    forget()
    s3.fault = failing(method, "/bucket/out/a.parquet", "busy")
    with pytest.raises(OutputError, match=r"s3://bucket/out/a.parquet cannot be (read|looked for)"):
        run(bundle, "s3://bucket/out", "s3://bucket/in/a.parquet")


def test_without_credentials_nothing_is_waited_for(s3, bundle, corpus, tmp_path, monkeypatch):
    upload(corpus)
    forget()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    waits: list[object] = []
    monkeypatch.setattr(retries, "report_wait", lambda *about: waits.append(about))
    with pytest.raises(InputError, match=r"s3://bucket/in/a\.parquet cannot be listed: NoCredentialsError"):
        run(bundle, tmp_path / "out", "s3://bucket/in/a.parquet")
    assert waits == []


def test_no_secret_of_a_url_is_shown(client, bundle, corpus, tmp_path):
    """A pre-signed URL that works, one that is refused, one with a password and one of a server that is away."""
    with servers.files(corpus) as server:
        server.fault = lambda request: "forbidden" if "/x.parquet" in request.path else None
        host, query = server.url.removeprefix("http://"), "?X-Amz-Credential=me%2Fs3&X-Amz-Signature=5ecre7"
        for given, code in (
            ([f"{server.url}/a.parquet{query}"], 0),
            ([f"{server.url}/a.parquet{query}", f"{server.url}/lines.jsonl.gz{query}"], 0),
            ([f"{server.url}/b=1/x.parquet/part-0.parquet{query}"], 1),
            ([f"http://me:5ecre7@{host}/missing.parquet{query}"], 1),
            ([f"http://me:5ecre7@127.0.0.1:9/a.parquet{query}"], 1),
            (["ftp://me:5ecre7@127.0.0.1:9/a.parquet"], 1),
        ):
            out, log = tmp_path / f"out{len(given)}{code}", tmp_path / "log"
            start = [*command(bundle, str(out), *given), "--metrics", str(log), "--retry-minutes", "0.02"]
            done = subprocess.run(start, capture_output=True, text=True, timeout=60)
            assert done.returncode == code, done.stderr
            assert "127.0.0.1" in done.stdout + done.stderr + (log.read_text() if log.exists() else "")
            assert "Traceback" not in done.stderr
            for text in (
                done.stdout,
                done.stderr,
                *(file.read_text("latin-1") for file in tmp_path.rglob("*") if file.is_file()),
            ):
                assert "5ecre7" not in text and "X-Amz" not in text


def test_ranks_keep_no_secret_of_a_url_and_take_one_that_was_signed_anew(bundle, corpus, tmp_path):
    with servers.files(corpus) as server:
        for rank, signature in enumerate(("5ecre7", "5ecre8")):
            given = [f"{server.url}/{name}?sig={signature}" for name in ("a.parquet", "lines.jsonl.gz")]
            start = [*command(bundle, str(tmp_path / "out"), *given), "--rank", str(rank), "--world-size", "2"]
            done = subprocess.run(start, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
            assert not any("5ecre" in file.read_text("latin-1") for file in tmp_path.rglob("*") if file.is_file())


def test_the_keys_of_a_bucket_cannot_lead_out_of_the_output(s3, bundle, local, tmp_path):
    """S3 takes any key; the odd ones are named, the others are scored."""
    odd = ["in//tmp/x.parquet", "in/sub/../../x.parquet", "in/./x.parquet", "in//x.parquet", "in/sub//x.parquet"]
    client = boto3.client("s3")
    body = pq.read_table(write(tmp_path / "a.parquet", 20, 0))
    upload(tmp_path)
    for key in odd:
        client.copy_object(Bucket="bucket", Key=key, CopySource="bucket/in/a.parquet")
    for given in ("s3://bucket/in", "s3://bucket/in/", "s3://bucket/in/**/*.parquet"):
        summary = run(bundle, tmp_path / "out", given, overwrite=True)
        assert {one["file"] for one in summary["unfinished"]} == {f"s3://bucket/{key}" for key in odd}
        assert all("cannot be the name of a file" in one["reason"] for one in summary["unfinished"])
        assert summary["files"] == 1 and summary["documents"] == body.num_rows
        files = [file.name for file in (tmp_path / "out").rglob("*") if file.is_file()]
        assert [name for name in files if not name.endswith(".run")] == ["a.parquet"]
    found = find_files(["s3://bucket/in/*/x.parquet", "s3://bucket/in/*.parquet"])
    assert {one.file for one in found.refused} == {"s3://bucket/in", "s3://bucket/in/./x.parquet"}
    assert [file.relative.text for file in found.files] == ["a.parquet"]
    with pytest.raises(InputError, match="cannot be the name of a file"):
        find_files(["s3://bucket/in/sub"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "out"]


@pytest.mark.parametrize("given", ["in", "in/**/*.parquet", "in/*/*.parquet", "in/*.parquet"])
def test_a_bucket_that_cannot_be_listed_is_an_error(s3, given, tmp_path):
    """The second page of a listing fails, or one folder of a glob's."""
    write(tmp_path / "a.parquet", 10, 0)
    write(tmp_path / "b" / "c.parquet", 10, 0)
    upload(tmp_path)
    lists = []

    def second_listing(request: Request) -> Fault | None:
        if request.method == "GET" and "list-type" in request.query:
            lists.append(request.query)
            return "forbidden" if len(lists) >= (2 if "*/*." in given and "**" not in given else 1) else None
        return None

    s3.fault = second_listing
    with pytest.raises(InputError, match="cannot be listed"):
        find_files([f"s3://bucket/{given}"])


@pytest.mark.parametrize("query", ["", "?download=true"])
def test_files_of_a_web_server(client, bundle, corpus, local, tmp_path, query):
    with servers.files(corpus) as server:
        server.fault = every(3, "drop", "busy", "cut")
        given = [f"{server.url}/a.parquet{query}", f"{server.url}/b=1/x.parquet/part-0.parquet{query}"]
        summary = run(bundle, tmp_path / "out", *given)
        assert summary["unfinished"] == []
        assert len(server.faults) > 2
        assert any("Range" in request.headers for request in server.requests)
        again = run(bundle, tmp_path / "out", *given)
    assert again["skipped_files"] == 2
    assert_same(pq.read_table(tmp_path / "out" / "a.parquet"), pq.read_table(local / "a.parquet"))
    part = pq.read_table(tmp_path / "out" / "part-0.parquet")
    assert_same(part, pq.read_table(local / "b=1/x.parquet/part-0.parquet"))


def test_a_changed_file_of_a_web_server_is_an_error(client, bundle, tmp_path):
    file = write(tmp_path / "in" / "a.parquet", 100, 0)
    with servers.files(file.parent) as server:
        run(bundle, tmp_path / "out", f"{server.url}/a.parquet")
        write(file, 100, 1)
        with pytest.raises(OutputError, match=r"before its source .* changed; .*--overwrite"):
            run(bundle, tmp_path / "out", f"{server.url}/a.parquet")
        with pytest.raises(InputError, match=r"b.parquet cannot be found: 404"):
            run(bundle, tmp_path / "out", f"{server.url}/b.parquet")


def test_a_dataset_of_the_hub(client, bundle, corpus, local, tmp_path, monkeypatch):
    with servers.hub({"datasets/someone/corpus": corpus}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        out = tmp_path / "out"
        for given in ("hf://datasets/someone/corpus", "hf://datasets/someone/corpus@main/**/*.parquet"):
            start = command(bundle, str(out), given, chunk_rows=40)
            done = subprocess.run(start, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
    assert sorted(f.relative_to(out).as_posix() for f in out.rglob("*") if f.is_file()) == sorted(
        map(output_name, NAMES)
    )
    assert json.loads(done.stdout.splitlines()[-1])["skipped_files"] == 3
    for name in map(output_name, NAMES):
        assert_same(pq.read_table(out / name), pq.read_table(local / name))


def test_a_dataset_of_the_hub_that_one_may_not_read_is_named_at_once(client, bundle, corpus, tmp_path, monkeypatch):
    with servers.hub({"datasets/someone/corpus": corpus}) as server:
        server.fault = lambda _: "forbidden"
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        start = command(bundle, str(tmp_path / "out"), "hf://datasets/someone/corpus")
        done = subprocess.run(start, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "403" in done.stderr and "; again in " not in done.stderr
    assert len(server.requests) < 6, [request.path for request in server.requests]


def test_a_source_that_nothing_is_told_of_is_resumed_only_where_it_is_assumed_to_be_unchanged(bundle, tmp_path, capfd):
    body = write(tmp_path / "a.parquet", n_docs=90, seed=1).read_bytes()
    answer = lambda request: servers.file_answer(request, body, {})  # noqa: E731
    with servers.serving(answer) as server:
        url = f"{server.url}/a.parquet"
        assert run(bundle, tmp_path / "out", url)["files"] == 1
        assert "of 1 file the server tells neither an entity tag nor a time" in capfd.readouterr().err
        with pytest.raises(OutputError, match=r"a\.parquet was scored before.*--assume-unchanged"):
            run(bundle, tmp_path / "out", url)
        assert run(bundle, tmp_path / "out", url, assume_unchanged=True)["skipped_files"] == 1
        assert run(bundle, tmp_path / "out", url, overwrite=True)["files"] == 1
        (tmp_path / "out/a.parquet").unlink()
        assert run(bundle, tmp_path / "out", url)["files"] == 1  # nothing of it was there
        ended = subprocess.run(
            [*command(bundle, str(tmp_path / "out"), url, chunk_rows=40), "--assume-unchanged"],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
