from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file
from upath import UPath

from jql_engine import Engine, probe_texts, readouts
from jql_engine.bundle import READOUTS, Bundle
from jql_engine.cli.rescore import main
from jql_engine.errors import InputError, OutputError
from jql_engine.files.settings import METADATA_KEY
from jql_engine.job import rescore
from jql_engine.job.launch import Machine, score
from jql_engine.job.launch import rescore as apply_heads
from jql_engine.job.plan import Job
from jql_engine.job.progress import RunLog
from jql_engine.job.ranks import Rank
from jql_engine.readouts import Readouts
from tests.conftest import export, write_head
from tests.files.test_inputs import write
from tests.servers import Server, s3

TEXTS = [*probe_texts.SENTENCES[:8], None, "", *probe_texts.ODDITIES[:12], None, " ".join(probe_texts.SENTENCES)]


@pytest.fixture(scope="module")
def other(encoders, tmp_path_factory) -> Bundle:
    """Three other heads on the same encoder."""
    folder = tmp_path_factory.mktemp("other")
    heads = {
        name: write_head(folder / f"{name}.ckpt", hidden_size=8 + 3 * seed, seed=seed)
        for seed, name in enumerate(("news", "edu", "toxic"), start=11)
    }
    return export(encoders["gte"], heads, folder / "bundle")


def stored(bundle: Bundle, out: Path, *inputs: Path, embeddings: str | None = "fp32", **options: object) -> Path:
    """The output of jql-run --embeddings."""
    job = Job(tuple(map(str, inputs)), out, embeddings=embeddings, **options)
    score(job, bundle, Machine("cpu"), RunLog(None), threading.Event())
    return out


def rescored(bundle: Bundle, out: Path | UPath, *inputs: Path | UPath, **options: object) -> dict[str, Any]:
    log = RunLog(options.pop("metrics", None))
    return apply_heads(Job(tuple(map(str, inputs)), out, **options), bundle, 1, log, threading.Event())


def visible(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*"))


def assert_scores(engine: Engine, texts: list[str | None], found: pa.Table, tolerance: float) -> None:
    """The scores are those of `engine`, null where the text is."""
    expected = engine.score(texts)
    for i, head in enumerate(engine.heads):
        column = found[f"score_{head}"]
        assert column.type == pa.float32()
        assert column.is_null().to_pylist() == [text is None for text in texts]
        difference = column.drop_null().to_numpy() - expected.values[expected.valid, i]
        assert np.abs(difference).max(initial=0) <= tolerance
    expected_table = expected.to_table()
    for name in ("n_tokens", "truncated"):
        assert found[name].to_pylist() == expected_table[name].to_pylist()


@pytest.mark.parametrize(("embeddings", "tolerance"), [("fp32", 1e-5), ("fp16", 1e-2)])
def test_the_same_heads_give_the_same_scores(engine, tmp_path, embeddings, tolerance):
    path = write(tmp_path / "a.parquet", TEXTS, 7, id=range(len(TEXTS)))
    vectors = stored(engine.bundle, tmp_path / "vectors", path, embeddings=embeddings)
    summary = rescored(engine.bundle, tmp_path / "out", vectors)
    found = pq.read_table(tmp_path / "out/a.parquet")
    assert found.column_names == ["id", "score_edu", "score_prose", "n_tokens", "truncated"]
    assert found["id"].to_pylist() == list(range(len(TEXTS)))
    assert_scores(engine, TEXTS, found, tolerance)
    before = pq.read_table(vectors / "a.parquet", columns=["score_edu"])["score_edu"].drop_null().to_numpy()
    assert np.abs(found["score_edu"].drop_null().to_numpy() - before).max() <= tolerance
    assert (summary["documents"], summary["files"], summary["skipped_files"]) == (len(TEXTS), 1, 0)
    assert summary["bundle"] == engine.bundle.hash and summary["documents_per_second"] > 0
    assert visible(tmp_path / "out") == ["a.parquet"]


def test_other_heads_take_the_place_of_the_old_ones(engine, other, tmp_path):
    path = write(tmp_path / "in/de/a.parquet", TEXTS, id=[str(i) for i in range(len(TEXTS))])
    vectors = stored(engine.bundle, tmp_path / "vectors", path.parent.parent)
    rescored(other, tmp_path / "out", vectors)
    found = pq.read_table(tmp_path / "out/de/a.parquet")
    assert found.column_names == ["id", "score_news", "score_edu", "score_toxic", "n_tokens", "truncated"]
    assert_scores(Engine(other.path, device="cpu"), TEXTS, found, 1e-5)
    settings = json.loads(found.schema.metadata[METADATA_KEY])
    before = json.loads(pq.read_schema(vectors / "de/a.parquet").metadata[METADATA_KEY])
    assert (settings["bundle"], settings["heads"]) == (other.hash, ["news", "edu", "toxic"])
    assert {key for key in {**settings, **before} if settings.get(key) != before.get(key)} == {
        "bundle",
        "heads",
        "rescored_from",
    }


def test_a_file_of_many_chunks_comes_out_whole_and_in_order(engine, other, tmp_path, monkeypatch):
    monkeypatch.setattr(rescore, "WHOLE_ROWS", 15)
    texts = [None if i % 7 in (3, 4) else f"text number {i}" for i in range(83)]
    path = write(tmp_path / "a.parquet", pa.array(texts), 11, id=range(83))
    rescored(other, tmp_path / "out", stored(engine.bundle, tmp_path / "vectors", path, chunk_rows=20))
    found = pq.read_table(tmp_path / "out/a.parquet")
    assert found["id"].to_pylist() == list(range(83))
    assert_scores(Engine(other.path, device="cpu"), texts, found, 1e-5)


@pytest.mark.parametrize("texts", [[], [None] * 3], ids=["no rows", "no text"])
def test_a_file_without_scores_comes_out_without(engine, other, tmp_path, texts):
    path = write(tmp_path / "a.parquet", pa.array(texts, pa.string()))
    rescored(other, tmp_path / "out", stored(engine.bundle, tmp_path / "vectors", path))
    found = pq.read_table(tmp_path / "out/a.parquet")
    assert found.column_names == ["score_news", "score_edu", "score_toxic", "n_tokens", "truncated"]
    assert found["score_edu"].to_pylist() == [None] * len(texts)


@pytest.mark.parametrize("embeddings", ["fp32", "fp16"])
def test_a_vector_that_is_not_a_number_has_no_score_that_looks_like_one(engine, other, tmp_path, embeddings):
    path = write(tmp_path / "a.parquet", ["zero", None, "two", "three"], id=range(4))
    vectors = stored(engine.bundle, tmp_path / "vectors", path, embeddings=embeddings) / "a.parquet"
    table = pq.read_table(vectors)
    values = table["embedding"].to_pylist()
    values[0] = [*values[0][:5], np.nan, *values[0][6:]]
    i = table.schema.get_field_index("embedding")
    pq.write_table(table.set_column(i, table.schema.field(i), pa.array(values, table.schema.field(i).type)), vectors)
    rescored(other, tmp_path / "out", vectors.parent)
    found = pq.read_table(tmp_path / "out/a.parquet")
    for head in other.heads:
        column = found[f"score_{head}"]
        assert column.is_null().to_pylist() == [False, True, False, False]
        scores = column.to_pylist()
        assert np.isnan(scores[0]) and np.isfinite(scores[2:]).all()


@pytest.mark.parametrize("n_docs", [0, 1, 3, 7, 9])
def test_products_of_a_few_rows_give_all_scores(other, monkeypatch, n_docs):
    monkeypatch.setattr(readouts, "BLOCK_ROWS", 3)
    embeddings = np.random.default_rng(0).standard_normal((n_docs, 32)).astype(np.float32)
    found = Readouts.of(other).score(embeddings)
    assert found.shape == (n_docs, 3) and found.dtype == np.float32
    weights = load_file(other.path / READOUTS)
    for i, name in enumerate(other.heads):
        w1, b1, w2, b2 = (weights[f"{name}.{layer}"] for layer in ("0.weight", "0.bias", "1.weight", "1.bias"))
        hidden = np.maximum(embeddings.astype(np.float64) @ w1.T + b1, 0)
        np.testing.assert_allclose(found[:, [i]], hidden @ w2.T + b2, rtol=1e-5, atol=1e-4)


def test_appended_columns_stay_as_they_are(engine, other, tmp_path):
    columns = {
        "meta": [{"tags": ["a", str(i)], "n": i} for i in range(len(TEXTS))],
        "lang": pa.array(["de", "fr"] * (len(TEXTS) // 2)).dictionary_encode(),
    }
    path = write(tmp_path / "a.parquet", TEXTS, 9, id=range(len(TEXTS)), **columns)
    vectors = stored(engine.bundle, tmp_path / "vectors", path, output="append")
    rescored(other, tmp_path / "out", vectors)
    source, found = pq.read_table(path), pq.read_table(tmp_path / "out/a.parquet")
    scores = ["score_news", "score_edu", "score_toxic", "n_tokens", "truncated"]
    assert found.column_names == [*source.column_names, *scores]
    assert found.select(source.column_names).cast(source.schema).equals(source)
    assert found.select(source.column_names).schema.equals(source.schema)
    assert_scores(Engine(other.path, device="cpu"), TEXTS, found, 1e-5)


def test_a_new_head_that_is_called_like_a_column_is_an_error_before_anything_is_written(engine, other, tmp_path):
    a, _ = (write(tmp_path / "in" / f"{name}.parquet", TEXTS[:3], **columns) for name, columns in (
        ("a", {}), ("b", {"score_toxic": [1, 2, 3]})
    ))  # fmt: skip
    vectors = stored(engine.bundle, tmp_path / "vectors", a.parent, output="append")
    with pytest.raises(InputError, match=r"b\.parquet: a column 'score_toxic' has the name of a score column"):
        rescored(other, tmp_path / "out", vectors)
    assert not (tmp_path / "out").exists()


def test_the_vectors_of_another_encoder_are_refused(engine, bundles, tmp_path):
    path = write(tmp_path / "a.parquet", TEXTS)
    vectors = stored(engine.bundle, tmp_path / "vectors", path)
    with pytest.raises(InputError, match=r"vectors/a\.parquet holds vectors of encoder .* use a bundle of the same"):
        rescored(bundles["bert"], tmp_path / "out", vectors)
    assert not (tmp_path / "out").exists()


def test_a_file_without_vectors_is_refused(engine, other, tmp_path):
    path = write(tmp_path / "a.parquet", TEXTS)
    scores = stored(engine.bundle, tmp_path / "scores", path, embeddings=None)
    with pytest.raises(InputError, match=r"a\.parquet has no column 'embedding'; score it again with --embeddings"):
        rescored(other, tmp_path / "out", scores)


@pytest.mark.parametrize("metadata", [None, {b"jql_engine": b"{}"}, {b"jql_engine": b"nonsense"}], ids=str)
def test_what_jql_run_did_not_write_is_refused(other, tmp_path, metadata):
    schema = pa.schema([("embedding", pa.list_(pa.float32(), 32))], metadata=metadata)
    pq.write_table(schema.empty_table(), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet was not written by jql-run"):
        rescored(other, tmp_path / "out", tmp_path / "a.parquet")


@pytest.fixture
def vectors(engine, tmp_path) -> Path:
    """Three files with vectors."""
    for name in "abc":
        write(tmp_path / "in" / f"{name}.parquet", [f"{name} {i}" for i in range(10)])
    return stored(engine.bundle, tmp_path / "vectors", tmp_path / "in")


def test_what_is_finished_is_not_computed_again(other, vectors, tmp_path):
    rescored(other, tmp_path / "out", vectors)
    (tmp_path / "out/b.parquet").unlink()
    before = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in visible(tmp_path / "out")}
    summary = rescored(other, tmp_path / "out", vectors)
    assert (summary["files"], summary["skipped_files"], summary["documents"]) == (1, 2, 10)
    assert visible(tmp_path / "out") == ["a.parquet", "b.parquet", "c.parquet"]
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in before} == before


def test_the_scores_of_other_heads_are_not_taken_for_finished(engine, other, vectors, tmp_path):
    rescored(other, tmp_path / "out", vectors)
    with pytest.raises(OutputError, match="computed with other settings"):
        rescored(engine.bundle, tmp_path / "out", vectors)
    assert rescored(engine.bundle, tmp_path / "out", vectors, overwrite=True)["files"] == 3
    assert "score_prose" in pq.read_schema(tmp_path / "out/a.parquet").names


def test_vectors_that_changed_since_are_not_taken_for_the_same(engine, other, vectors, tmp_path):
    rescored(other, tmp_path / "out", vectors)
    stored(engine.bundle, vectors, tmp_path / "in", overwrite=True)
    with pytest.raises(OutputError, match="before the score file that it is made of changed"):
        rescored(other, tmp_path / "out", vectors)


def test_the_vectors_are_not_overwritten(other, vectors):
    before = (vectors / "a.parquet").read_bytes()
    with pytest.raises(OutputError):
        rescored(other, vectors, vectors)
    assert (vectors / "a.parquet").read_bytes() == before


def test_a_run_that_is_stopped_goes_on(other, vectors, tmp_path, monkeypatch):
    monkeypatch.setattr(rescore, "WHOLE_ROWS", 3)
    stop = threading.Event()
    work = rescore.prepare_rescoring(Job((str(vectors),), tmp_path / "out"), other)
    worker = rescore.Rescoring(other, work.claim).open(dict(enumerate(work.outputs)), stop, lambda *_: None, print)
    for n_done, _ in enumerate(worker(work.tasks), start=1):  # killed after some chunks
        if n_done == 5:
            break
    parts = [name for name in visible(tmp_path / "out") if "-" in name]
    assert len(parts) >= 5
    summary = rescored(other, tmp_path / "out", vectors)
    assert summary["files"] == 3 and summary["documents"] < 30
    assert visible(tmp_path / "out") == ["a.parquet", "b.parquet", "c.parquet"]
    for name in "abc":
        assert pq.read_table(tmp_path / f"out/{name}.parquet").num_rows == 10


def test_damaged_vectors_are_named_and_the_others_are_done(other, vectors, tmp_path, capfd):
    column = pq.read_metadata(vectors / "b.parquet").row_group(0)
    start = min(column.column(i).data_page_offset for i in range(column.num_columns))
    with (vectors / "b.parquet").open("r+b") as stream:
        stream.seek(start)
        stream.write(b"\xff" * (column.column(column.num_columns - 1).data_page_offset + 64 - start))
    (vectors / "d.parquet").write_bytes(b"no parquet")
    write(vectors / "e.parquet", TEXTS)
    summary = rescored(other, tmp_path / "out", vectors)
    assert sorted(Path(file["file"]).name for file in summary["unfinished"]) == ["b.parquet", "d.parquet", "e.parquet"]
    said = capfd.readouterr().err
    for why in ("b.parquet cannot be read to its end", "d.parquet is not a complete", "e.parquet was not written by"):
        assert why in said
    assert [name for name in visible(tmp_path / "out") if name.endswith(".parquet")] == ["a.parquet", "c.parquet"]


def test_vectors_that_are_replaced_while_they_are_read_are_not_scored(engine, other, vectors, tmp_path):
    work = rescore.prepare_rescoring(Job((str(vectors),), tmp_path / "out"), other)
    path = vectors / "b.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 10), path)  # as another encoder's would be
    outputs = dict(enumerate(work.outputs))
    worker = rescore.Rescoring(other, work.claim).open(outputs, threading.Event(), lambda *_: None, print)
    failures = [failure.message for done in worker(work.tasks) for failure in done.failures]
    assert len(failures) == 1 and "b.parquet was changed during the run" in failures[0]
    assert not (tmp_path / "out/b.parquet").exists()


def test_ranks_share_the_files(other, vectors, tmp_path):
    summaries = [rescored(other, tmp_path / "out", vectors, rank=Rank(rank, 2)) for rank in range(2)]
    assert sorted(summary["files"] for summary in summaries) == [1, 2]
    assert visible(tmp_path / "out") == ["a.parquet", "b.parquet", "c.parquet"]


@pytest.fixture
def place(monkeypatch) -> Iterator[tuple[UPath, Server]]:
    """A bucket on S3."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    with s3() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        fsspec.filesystem("s3").clear_instance_cache()
        bucket = UPath("s3://vectors")
        bucket.fs.mkdir("vectors")
        yield bucket, server


def test_remote_vectors_give_remote_scores_also_where_requests_fail(other, vectors, tmp_path, place):
    bucket, server = place
    for file in sorted(vectors.glob("*.parquet")):
        (bucket / "in" / file.name).write_bytes(file.read_bytes())
    rescored(other, tmp_path / "out", vectors)
    asked = count()
    server.fault = lambda request: "busy" if request.method == "GET" and next(asked) % 7 == 3 else None
    assert rescored(other, bucket / "out", bucket / "in")["files"] == 3
    assert server.faults
    server.fault = lambda _: None
    assert rescored(other, bucket / "out", bucket / "in")["skipped_files"] == 3
    for name in "abc":
        with (bucket / f"out/{name}.parquet").open("rb") as stream:
            assert pq.read_table(stream).equals(pq.read_table(tmp_path / f"out/{name}.parquet"))


def test_files_that_were_altered_since_are_named_and_the_others_are_done(other, vectors, tmp_path):
    table = pq.read_table(vectors / "b.parquet")
    pq.write_table(table.drop_columns(["n_tokens"]), vectors / "b.parquet")
    loose = pa.list_(pa.float32())
    i = table.schema.get_field_index("embedding")
    altered = table.set_column(i, pa.field("embedding", loose), table["embedding"].cast(loose))
    pq.write_table(altered, vectors / "d.parquet")
    summary = rescored(other, tmp_path / "out", vectors)
    assert sorted(Path(file["file"]).name for file in summary["unfinished"]) == ["b.parquet", "d.parquet"]
    assert summary["files"] == 2


@pytest.mark.parametrize("kind", [pa.list_(pa.float32(), 31), pa.list_(pa.float64(), 32), pa.list_(pa.float32())])
def test_vectors_of_another_width_or_type_are_refused(other, vectors, tmp_path, kind):
    table = pq.read_table(next(vectors.glob("*.parquet")))
    width = kind.list_size if pa.types.is_fixed_size_list(kind) else 32
    column = pa.array([[0.0] * width] * table.num_rows, kind)
    at = table.column_names.index("embedding")
    (tmp_path / "other").mkdir()
    pq.write_table(table.set_column(at, pa.field("embedding", kind), column), tmp_path / "other/a.parquet")
    with pytest.raises(InputError, match=r"column 'embedding' is .*, expected vectors of 32 float16 or float32"):
        rescored(other, tmp_path / "out", tmp_path / "other")


def test_the_command_line_applies_heads(other, vectors, tmp_path, monkeypatch, capfd):
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["jql-rescore", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        return (exit_.value.code or 0, *capfd.readouterr())

    code, out, err = call(vectors, "--bundle", other.path, "--out", tmp_path / "out")
    assert code == 0, err
    assert json.loads(out)["files"] == 3 and json.loads(out)["bundle"] == other.hash
    assert call(vectors, "--bundle", other.path)[0] == 2
    code, out, err = call(tmp_path / "absent", "--bundle", other.path, "--out", tmp_path / "out")
    assert (code, out) == (1, "") and err.startswith("jql-rescore: ") and "does not exist" in err
