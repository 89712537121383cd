from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jql_engine import Engine, EngineError, probe_texts
from jql_engine.errors import InputError, OutputError
from jql_engine.files.chunks import Chunk, ChunkDone, Segment, StageSeconds, Task
from jql_engine.files.parts import Part
from jql_engine.job.launch import Machine
from jql_engine.job.launch import score as launch
from jql_engine.job.plan import CHUNK_ROWS, Job
from jql_engine.job.progress import Meter, RunLog
from jql_engine.job.ranks import Rank
from jql_engine.job.scoring import prepare
from jql_engine.names import RelativeName
from jql_engine.sessions.base import CHUNK_BYTES
from jql_export.tolerances import TOLERANCES
from tests.inputs import damage, not_utf8

TEXTS = [*probe_texts.SENTENCES[:8], None, "", *probe_texts.ODDITIES[:12], " ".join(probe_texts.SENTENCES)]
SCORE_COLUMNS = {
    "score_edu": pa.float32(),
    "score_prose": pa.float32(),
    "n_tokens": pa.int32(),
    "truncated": pa.bool_(),
}


def score(engine: Engine, out: Path | str, *inputs: Path | str, **options: object) -> SimpleNamespace:
    """What jql-run does, in one process unless `workers` says more; the summary."""
    log, workers = RunLog(options.pop("metrics", None)), options.pop("workers", None)
    job = Job(tuple(map(str, inputs)), out, **options)
    machine = Machine("cpu", engine.session.variant, workers)
    return SimpleNamespace(**launch(job, engine.bundle, machine, log, threading.Event()))


def write(path: Path, texts: object, row_group_size: int | None = None, **columns: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"text": texts if isinstance(texts, pa.Array) else pa.array(texts, pa.string()), **columns})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def sparse(path: Path, n_docs: int, *, text: str = "Water boils") -> Path:
    """Large enough for several chunks and quick to score: most texts are null."""
    texts = [f"{text} {i}" if i % 250 == 0 else None for i in range(n_docs)]
    return write(path, texts, row_group_size=5_000, id=range(n_docs))


def visible(folder: Path) -> list[str]:
    """Every file, also while a job makes and removes folders, on which rglob fails."""
    return sorted(os.path.relpath(Path(parent, name), folder) for parent, _, names in os.walk(folder) for name in names)


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {name: ((folder / name).stat().st_ino, (folder / name).stat().st_mtime_ns) for name in visible(folder)}


def assert_scored(engine: Engine, source: Path, output: Path, id_column: str | None = "id") -> None:
    """`output` holds the scores of `source` row by row, and nothing else."""
    given, found = pq.read_table(source), pq.read_table(output)
    id_column = id_column if id_column in given.column_names else None
    assert found.column_names == [*([id_column] if id_column else []), *SCORE_COLUMNS]
    assert {name: found.schema.field(name).type for name in SCORE_COLUMNS} == SCORE_COLUMNS
    if id_column:
        assert found.schema.field(id_column).type == given.schema.field(id_column).type
        assert found[id_column].to_pylist() == given[id_column].to_pylist()
    expected = engine.score(given["text"].to_pylist()).to_table()
    for name in SCORE_COLUMNS:
        assert found[name].is_null().equals(given["text"].is_null())
        assert expected[name].is_null().equals(given["text"].is_null())
    for name in ("score_edu", "score_prose"):
        difference = found[name].drop_null().to_numpy() - expected[name].drop_null().to_numpy()
        assert np.abs(difference).max(initial=0) <= TOLERANCES["fp32"].batch
    for name in ("n_tokens", "truncated"):
        assert found[name].to_pylist() == expected[name].to_pylist()


@pytest.mark.parametrize("row_group_size", [None, 1, 7])
def test_every_row_gets_the_score_of_its_text(engine, tmp_path, row_group_size):
    path = write(tmp_path / "a.parquet", TEXTS, row_group_size, id=range(len(TEXTS)), url=["u"] * len(TEXTS))
    score(engine, tmp_path / "out", path)
    assert_scored(engine, path, tmp_path / "out/a.parquet")
    assert visible(tmp_path / "out") == ["a.parquet"]


@pytest.mark.parametrize(
    "ids",
    [pa.array([5, None, 6]), pa.array(["b", "a", None]), pa.array(["b", "a", "b"]).dictionary_encode()],
    ids=lambda ids: str(ids.type),
)
def test_the_id_column_keeps_its_name_and_type(engine, tmp_path, ids):
    path = write(tmp_path / "a.parquet", ["one", None, "three"], 2, key=ids)
    score(engine, tmp_path / "out", path, id_column="key")
    assert_scored(engine, path, tmp_path / "out/a.parquet", "key")


def test_a_file_without_ids_gets_scores_alone(engine, tmp_path):
    path = write(tmp_path / "a.parquet", TEXTS)
    score(engine, tmp_path / "out", path)
    assert pq.read_schema(tmp_path / "out/a.parquet").names == list(SCORE_COLUMNS)


def test_another_text_column_is_scored(engine, tmp_path):
    path = write(tmp_path / "a.parquet", ["not this"] * 2, content=["Water", None])
    score(engine, tmp_path / "out", path, text_column="content")
    found = pq.read_table(tmp_path / "out/a.parquet")
    expected = engine.score(["Water", None]).to_table()
    assert found["n_tokens"].equals(expected["n_tokens"])


def test_nested_folders_keep_their_paths(engine, tmp_path):
    names = ["a.parquet", "de/a.parquet", "de/x/b.parquet"]
    for number, name in enumerate(names):
        write(tmp_path / "in" / name, [f"text {number}", None], id=[number, -number])
    summary = score(engine, tmp_path / "out", tmp_path / "in")
    assert visible(tmp_path / "out") == names
    assert summary.files == 3
    for name in names:
        assert_scored(engine, tmp_path / "in" / name, tmp_path / "out" / name)


def test_many_small_files_and_empty_ones_come_out_one_by_one(engine, tmp_path):
    for i in range(30):
        write(tmp_path / "in" / f"{i:02}.parquet", TEXTS[i % 5 : i % 5 + i % 4], id=range(i % 4))
    summary = score(engine, tmp_path / "out", tmp_path / "in")
    assert (summary.files, summary.documents) == (30, sum(i % 4 for i in range(30)))
    assert len(visible(tmp_path / "out")) == 30
    for name in visible(tmp_path / "in"):
        assert_scored(engine, tmp_path / "in" / name, tmp_path / "out" / name)


def test_a_file_without_rows_gives_one_without_rows(engine, tmp_path):
    path = write(tmp_path / "a.parquet", [], id=pa.array([], pa.large_string()))
    summary = score(engine, tmp_path / "out", path)
    assert (summary.files, summary.documents, summary.tokens, summary.padding_share) == (1, 0, 0, 0)
    assert_scored(engine, path, tmp_path / "out/a.parquet")


def test_a_file_of_many_chunks_comes_out_whole(engine, tmp_path):
    small, large = write(tmp_path / "in/a.parquet", TEXTS), sparse(tmp_path / "in/b.parquet", 2 * CHUNK_ROWS + 5_001)
    summary = score(engine, tmp_path / "out", tmp_path / "in")
    assert summary.documents == len(TEXTS) + 2 * CHUNK_ROWS + 5_001
    assert_scored(engine, small, tmp_path / "out/a.parquet")
    assert_scored(engine, large, tmp_path / "out/b.parquet")


def test_what_is_not_utf8_is_null_and_counted(engine, tmp_path):
    path = write(tmp_path / "a.parquet", not_utf8())
    summary = score(engine, tmp_path / "out", path)
    found = pq.read_table(tmp_path / "out/a.parquet")
    assert found["score_edu"].is_null().to_pylist() == [False, True, True, True, False]
    assert (summary.documents, summary.null_documents, summary.invalid_utf8) == (5, 3, 2)


def test_padding_changes_no_score_and_is_counted(engine, padded, tmp_path):
    path = write(tmp_path / "a.parquet", TEXTS)
    exact, with_padding = score(engine, tmp_path / "exact", path), score(padded, tmp_path / "padded", path)
    assert exact.padding_share == 0 < with_padding.padding_share < 1
    assert exact.tokens == with_padding.tokens
    assert_scored(engine, path, tmp_path / "padded/a.parquet")


def test_the_summary_counts_what_was_written(engine, tmp_path):
    path = write(tmp_path / "a.parquet", TEXTS)
    summary = score(engine, tmp_path / "out", path)
    found = pq.read_table(tmp_path / "out/a.parquet").to_pydict()
    assert summary.documents == len(TEXTS) and summary.null_documents == 1 and summary.invalid_utf8 == 0
    assert summary.tokens == sum(n or 0 for n in found["n_tokens"])
    assert summary.truncated == sum(map(bool, found["truncated"])) == 1
    assert summary.seconds > 0 and summary.tokens_per_second > 0 and summary.documents_per_second > 0
    assert (summary.variant, summary.bundle) == (engine.session.variant, engine.bundle.hash)


def test_the_output_names_bundle_settings_and_source(engine, tmp_path):
    path = write(tmp_path / "a.parquet", ["x"], key=[1])
    score(engine, tmp_path / "out", path, id_column="key")
    settings = json.loads(pq.read_schema(tmp_path / "out/a.parquet").metadata[b"jql_engine"])
    assert settings["bundle"] == engine.bundle.hash
    assert (settings["variant"], settings["precision"]) == ("cpu-fp32", "fp32")
    assert (settings["text_column"], settings["id_column"]) == ("text", "key")
    assert settings["source_bytes"] == path.stat().st_size
    assert settings["source_version"] == str(path.stat().st_mtime_ns)
    assert settings["encoder"] == engine.bundle.encoder_hash and "onnxruntime" in settings


def test_a_damaged_file_is_named_and_the_others_are_finished(engine, tmp_path, capfd):
    write(tmp_path / "in/a.parquet", TEXTS)
    good = sparse(tmp_path / "good.parquet", 3 * CHUNK_ROWS)
    bad = Path(shutil.copy(good, tmp_path / "in/b.parquet"))
    write(tmp_path / "in/c.parquet", TEXTS)
    damage(bad, row_group=9)
    n_threads = threading.active_count()
    summary = score(engine, tmp_path / "out", tmp_path / "in")
    assert threading.active_count() <= n_threads, "one is left"  # those of a test before may end meanwhile
    [unfinished] = summary.unfinished
    assert unfinished["file"] == str(bad) and "cannot be read to its end" in unfinished["reason"]
    assert capfd.readouterr().err.count(f"{bad} cannot be read to its end") == 1
    assert summary.files == 2 and summary.documents == 2 * len(TEXTS) + 2 * CHUNK_ROWS
    *left, a, c = visible(tmp_path / "out")
    assert (a, c) == ("a.parquet", "c.parquet")
    parts = [name for name in left if name.endswith(".parquet")]
    assert [name for name in left if name.endswith(".run")] == [name for name in left if name not in parts]
    assert [Part.parse(Path(part).name).rows for part in parts] == [(n, n + CHUNK_ROWS) for n in (0, CHUNK_ROWS)]
    for name in ("a", "c"):
        assert_scored(engine, tmp_path / f"in/{name}.parquet", tmp_path / f"out/{name}.parquet")


def test_a_file_that_is_no_parquet_is_named_and_the_others_are_finished(engine, tmp_path):
    write(tmp_path / "in/a.parquet", TEXTS)
    (tmp_path / "in/b.parquet").write_bytes((tmp_path / "in/a.parquet").read_bytes()[:-20])
    summary = score(engine, tmp_path / "out", tmp_path / "in")
    [unfinished] = summary.unfinished
    assert unfinished["file"].endswith("b.parquet") and "not a complete parquet file" in unfinished["reason"]
    left, a = visible(tmp_path / "out")
    assert left.endswith(".run") and a == "a.parquet"


def test_nothing_is_written_unless_every_input_can_be_used(engine, tmp_path):
    write(tmp_path / "in/a.parquet", TEXTS)
    pq.write_table(pa.table({"content": ["x"]}), tmp_path / "in/b.parquet")
    with pytest.raises(EngineError, match=r"b\.parquet has no column 'text'"):
        score(engine, tmp_path / "out", tmp_path / "in")
    assert not (tmp_path / "out").exists()


def test_work_is_planned_without_computing(engine, tmp_path):
    write(tmp_path / "in/a.parquet", TEXTS)
    job = Job((str(tmp_path / "in"),), tmp_path / "out")

    def prepared(**changes: object):
        return prepare(replace(job, **changes), engine.bundle, "cpu-fp32", CHUNK_BYTES["cpu"])

    work = prepared()
    assert ([t.file.source.relative for t in work.outputs], work.n_finished) == ([RelativeName("a.parquet")], 0)
    run_file, record = visible(tmp_path / "out")
    assert work.n_docs == len(TEXTS) and run_file.endswith(".0-of-1.run") and record == ".parts/job.json"
    work.release()
    assert visible(tmp_path / "out") == [run_file]  # nothing of it is done
    score(engine, tmp_path / "out", tmp_path / "in")
    assert prepared().n_finished == 1
    assert prepared(overwrite=True).n_finished == 0


def test_a_name_that_no_folder_can_hold_stops_its_file_alone(engine, tmp_path):
    write(tmp_path / "in/a.parquet", TEXTS)
    (tmp_path / f"in/{'n' * 249}.jsonl").write_text('{"text": "x"}\n')
    summary = score(engine, tmp_path / "out", tmp_path / "in")
    assert summary.files == 1 and "a name of over 255 bytes" in summary.unfinished[0]["reason"]
    (tmp_path / "in/a.parquet").unlink()
    with pytest.raises(InputError, match="would be written to a name of over 255 bytes"):
        score(engine, tmp_path / "out", tmp_path / "in")


def test_a_folder_in_the_place_of_scores_stays(engine, tmp_path):
    path = write(tmp_path / "in/a.parquet", TEXTS)
    (tmp_path / "out/a.parquet").mkdir(parents=True)
    (tmp_path / "out/a.parquet/thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="Is a directory"):
        score(engine, tmp_path / "out", path, overwrite=True)
    assert (tmp_path / "out/a.parquet/thesis.txt").read_text() == "mine"


def test_what_a_limit_takes_of_other_inputs_is_said(engine, tmp_path):
    """A damaged file was mended: the first documents are others."""
    path = write(tmp_path / "in/b.parquet", TEXTS)
    score(engine, tmp_path / "out", tmp_path / "in", limit=6)
    write(tmp_path / "in/a.parquet", TEXTS[:4])
    with pytest.raises(OutputError, match=r"b\.parquet exists and holds the first 6 .* --limit takes 2 of them now"):
        score(engine, tmp_path / "out", path.parent, limit=6)


def test_append_adds_the_scores_to_every_column(engine, tmp_path):
    columns = {"id": range(len(TEXTS)), "meta": [{"n": i} for i in range(len(TEXTS))]}
    path = write(tmp_path / "a.parquet", TEXTS, 5, **columns)
    summary = score(engine, tmp_path / "out", path, output="append", chunk_rows=7)
    found = pq.read_table(tmp_path / "out/a.parquet")
    assert found.select(["text", "id", "meta"]).equals(pq.read_table(path))
    assert found.column_names == ["text", "id", "meta", *SCORE_COLUMNS] and summary.files == 1
    score(engine, tmp_path / "sidecar", path, chunk_rows=7)
    assert found.select(list(SCORE_COLUMNS)).equals(
        pq.read_table(tmp_path / "sidecar/a.parquet").select(list(SCORE_COLUMNS))
    )


def test_a_clash_of_names_is_an_error_before_anything_is_computed(engine, tmp_path):
    path = write(tmp_path / "a.parquet", TEXTS, score_edu=range(len(TEXTS)))
    with pytest.raises(OutputError, match="a column 'score_edu' has the name of a score column"):
        score(engine, tmp_path / "out", path, output="append")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "tolerance"), [("fp32", 1e-6), ("fp16", 1e-3)])
def test_embeddings_are_kept_where_asked_for(engine, tmp_path, kind, tolerance):
    path = write(tmp_path / "a.parquet", TEXTS, 5)
    score(engine, tmp_path / "out", path, embeddings=kind, chunk_rows=7)
    found, expected = pq.read_table(tmp_path / "out/a.parquet")["embedding"], engine.embed(TEXTS)
    assert found.type == pa.list_(pa.float32() if kind == "fp32" else pa.float16(), 32)
    for vector, wanted in zip(found.to_pylist(), expected, strict=True):
        if vector is None:
            assert np.isnan(wanted).all()
        else:
            np.testing.assert_allclose(vector, wanted, rtol=0, atol=tolerance)


def test_json_lines_are_scored_like_parquet(engine, tmp_path):
    lines = [json.dumps({"id": i, "text": text, "other": [1, {}]}) for i, text in enumerate(TEXTS)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    source = write(tmp_path / "a.parquet", TEXTS, id=range(len(TEXTS)))
    summary = score(engine, tmp_path / "out", tmp_path / "in", chunk_rows=7)
    assert (summary.documents, summary.files, visible(tmp_path / "out")) == (len(TEXTS), 1, ["a.parquet"])
    assert_scored(engine, source, tmp_path / "out/a.parquet")


def test_a_limit_scores_the_first_documents_only(engine, tmp_path):
    for name in "abc":
        write(tmp_path / f"in/{name}.parquet", TEXTS[:10], 3, id=range(10))
    summary = score(engine, tmp_path / "out", tmp_path / "in", limit=17)
    assert (summary.documents, visible(tmp_path / "out")) == (17, ["a.parquet", "b.parquet"])
    assert pq.read_table(tmp_path / "out/b.parquet")["id"].to_pylist() == list(range(7))
    again = score(engine, tmp_path / "out", tmp_path / "in", limit=17)
    assert (again.documents, again.skipped_files) == (0, 2)
    with pytest.raises(OutputError, match=r"b\.parquet exists .* --limit 7 then, no --limit now"):
        score(engine, tmp_path / "out", tmp_path / "in")


def test_a_limit_counts_the_documents_of_all_ranks(engine, tmp_path):
    for name in "abcd":
        write(tmp_path / f"in/{name}.parquet", TEXTS[:10], 3)
    counts = [score(engine, tmp_path / "out", tmp_path / "in", limit=25, rank=Rank(r, 2)).documents for r in (0, 1)]
    assert sum(counts) == 25 and min(counts) >= 5
    assert visible(tmp_path / "out") == ["a.parquet", "b.parquet", "c.parquet"]


def test_a_limit_opens_no_more_files_than_it_needs(engine, tmp_path):
    for i in range(40):
        write(tmp_path / f"in/{i:02}.parquet", TEXTS[:10])
    (tmp_path / "in/39.parquet").write_bytes(b"no parquet")
    assert score(engine, tmp_path / "out", tmp_path / "in", limit=15).unfinished == []


def test_a_run_log_that_can_not_be_written_is_an_error_before_anything_is_computed(engine, tmp_path):
    path = write(tmp_path / "a.parquet", TEXTS)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"--metrics .*x\.jsonl cannot be written: (Not a directory|File exists)"):
        score(engine, tmp_path / "out", path, metrics=tmp_path / "file/x.jsonl")
    assert not (tmp_path / "out").exists()


def test_the_folders_of_the_run_log_are_made(engine, tmp_path):
    path = write(tmp_path / "a.parquet", TEXTS)
    score(engine, tmp_path / "out", path, metrics=tmp_path / "deep/er/x.jsonl")
    assert (tmp_path / "deep/er/x.jsonl").read_text()


def test_an_output_among_the_inputs_is_named_before_what_is_there(engine, tmp_path):
    path = write(tmp_path / "in/a.parquet", TEXTS)
    with pytest.raises(OutputError, match=r"--out .*in lies inside of the input .*in; choose a folder outside"):
        score(engine, tmp_path / "in", path.parent)


def test_two_columns_of_one_name_can_not_be_kept(engine, tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array([1]), pa.array([2])], names=["text", "x", "x"])
    pq.write_table(table, tmp_path / "a.parquet")
    score(engine, tmp_path / "sidecar", tmp_path / "a.parquet")
    with pytest.raises(OutputError, match="has 2 columns named 'x'"):
        score(engine, tmp_path / "out", tmp_path / "a.parquet", output="append")


def test_two_ranks_share_the_files_and_together_do_all(engine, tmp_path):
    for i in range(9):
        write(tmp_path / f"in/{i}.parquet", TEXTS[: i + 1], id=range(i + 1))
    counts = [score(engine, tmp_path / "out", tmp_path / "in", rank=Rank(r, 2)).documents for r in (0, 1)]
    assert sum(counts) == 45 and min(counts) > 15
    assert visible(tmp_path / "out") == [f"{i}.parquet" for i in range(9)]


def test_the_run_log_has_a_line_for_each_chunk(engine, tmp_path):
    path = write(tmp_path / "a.parquet", TEXTS, id=range(len(TEXTS)))
    log = tmp_path / "log.jsonl"
    summary = score(engine, tmp_path / "out", path, chunk_rows=9, metrics=log)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert sum(line["rows"] for line in lines) == len(TEXTS) and len(lines) > 1
    assert sum(line["tokens"] for line in lines) == summary.tokens
    assert all(line["seconds"].keys() == {"read", "tokenize", "execute", "write"} for line in lines)
    assert all(line["memory_bytes"] > 1 << 20 for line in lines)
    assert summary.bottleneck in lines[0]["seconds"]


def test_the_live_line_names_the_rest_and_the_bottleneck():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    meter = Meter(100, stream=Terminal(), started=0.0)
    meter._shown = 0.0
    seconds = {"read": StageSeconds(1, 0, 5), "execute": StageSeconds(9, 1, 0)}
    meter.record(ChunkDone(Task(0, Chunk((Segment(0, 0, 50),))), (), 50, 10, 0, 0, 4000, 0, 0, seconds))
    meter.executed(40, 4000)
    line = meter.stream.getvalue()
    assert "50 of 100 documents" in line and "ETA" in line and "bottleneck execute" in line
