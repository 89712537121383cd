from __future__ import annotations

import json
import os
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jql_engine import Engine, EngineError
from jql_engine.dataset import CHUNK_ROWS
from jql_engine.errors import InputError, OutputError
from jql_engine.progress import Summary
from jql_engine.run import Job, prepare, run
from jql_export import probes
from jql_export.tolerances import TOLERANCES
from tests.test_dataset import damage, not_utf8

TEXTS = [*probes.SENTENCES[:8], None, "", *probes.ODDITIES[:12], " ".join(probes.SENTENCES)]
SCORE_COLUMNS = {
    "score_edu": pa.float32(),
    "score_prose": pa.float32(),
    "n_tokens": pa.int32(),
    "truncated": pa.bool_(),
}


def score(engine: Engine, out: Path, *inputs: Path, **options: object) -> Summary:
    """What jql-run does."""
    job = Job(tuple(map(str, inputs)), out, **options)
    work = prepare(job, engine.bundle, engine.session.variant)
    return run(job, engine.bundle, engine.session, engine.tokenizer, work)


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
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir())


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {name: ((folder / name).stat().st_ino, (folder / name).stat().st_mtime_ns) for name in visible(folder)}


def assert_scored(engine: Engine, source: Path, target: Path, id_column: str | None = "id") -> None:
    """`target` holds the scores of `source` row by row, and nothing else."""
    given, found = pq.read_table(source), pq.read_table(target)
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


@pytest.fixture(scope="module")
def padded(bundle) -> Engine:
    return Engine(bundle.path, device="cpu", variant="standard-fp32")


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
    assert settings["source_modified_ns"] == path.stat().st_mtime_ns


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
    [(["x", "longer than it was"], 0, "source_bytes was"), (["x", "y"], 1, "source_modified_ns was")],
)
def test_a_source_that_changed_is_an_error_on_resume(engine, tmp_path, texts, later, difference):
    path = write(tmp_path / "a.parquet", ["x", "z"])
    score(engine, tmp_path / "out", path)
    before, modified = state(tmp_path / "out"), path.stat().st_mtime_ns + later
    write(path, texts)
    os.utime(path, ns=(modified, modified))
    with pytest.raises(OutputError, match=rf"out/a\.parquet exists .* other settings: {difference} \d+, is now \d+"):
        score(engine, tmp_path / "out", path)
    assert state(tmp_path / "out") == before


def test_other_settings_are_an_error_on_resume(engine, padded, tmp_path):
    path = write(tmp_path / "a.parquet", ["x"], id=[1], content=["y"])
    score(engine, tmp_path / "out", path)
    before = state(tmp_path / "out")
    with pytest.raises(OutputError, match="variant was 'cpu-fp32', is now 'standard-fp32'"):
        score(padded, tmp_path / "out", path)
    with pytest.raises(OutputError, match="text_column was 'text', is now 'content'"):
        score(engine, tmp_path / "out", path, text_column="content")
    with pytest.raises(OutputError, match="id_column was 'id', is now 'content'"):
        score(engine, tmp_path / "out", path, id_column="content")
    assert state(tmp_path / "out") == before


def test_another_bundle_is_an_error_on_resume(engine, bundles, tmp_path):
    path = write(tmp_path / "a.parquet", ["x"])
    score(engine, tmp_path / "out", path)
    other = bundles["bert"]
    with pytest.raises(OutputError, match=f"bundle was '{engine.bundle.hash}', is now '{other.hash}'"):
        prepare(Job((str(path),), tmp_path / "out"), other, "cpu-fp32")


def test_damage_in_the_middle_stops_the_run_and_leaves_whole_files_only(engine, tmp_path):
    write(tmp_path / "in/a.parquet", TEXTS)
    good = sparse(tmp_path / "good.parquet", 3 * CHUNK_ROWS)
    bad = Path(shutil.copy(good, tmp_path / "in/b.parquet"))
    write(tmp_path / "in/c.parquet", TEXTS)
    damage(bad, row_group=9)
    n_threads = threading.active_count()
    with pytest.raises(InputError, match=re.escape(str(bad))):
        score(engine, tmp_path / "out", tmp_path / "in")
    assert threading.active_count() == n_threads
    assert visible(tmp_path / "out") == ["a.parquet"]
    shutil.copy(good, bad)
    summary = score(engine, tmp_path / "out", tmp_path / "in")
    assert (summary.files, summary.skipped_files) == (2, 1)
    assert visible(tmp_path / "out") == ["a.parquet", "b.parquet", "c.parquet"]
    assert_scored(engine, bad, tmp_path / "out/b.parquet")


def test_nothing_is_written_unless_every_input_can_be_used(engine, tmp_path):
    write(tmp_path / "in/a.parquet", TEXTS)
    pq.write_table(pa.table({"content": ["x"]}), tmp_path / "in/b.parquet")
    with pytest.raises(EngineError, match=r"b\.parquet has no column 'text'"):
        score(engine, tmp_path / "out", tmp_path / "in")
    assert not (tmp_path / "out").exists()


def test_work_is_planned_without_computing(engine, tmp_path):
    write(tmp_path / "in/a.parquet", TEXTS)
    job = Job((str(tmp_path / "in"),), tmp_path / "out")
    work = prepare(job, engine.bundle, "cpu-fp32")
    assert ([file.relative for file in work.files], work.n_finished) == ([Path("a.parquet")], 0)
    score(engine, tmp_path / "out", tmp_path / "in")
    assert prepare(job, engine.bundle, "cpu-fp32").n_finished == 1
    assert prepare(replace(job, overwrite=True), engine.bundle, "cpu-fp32").n_finished == 0
