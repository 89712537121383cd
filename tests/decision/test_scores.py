from __future__ import annotations

import datetime
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3fs import S3FileSystem
from upath import UPath

from jql_engine.data import Scores
from jql_engine.decision import scores as module
from jql_engine.decision.opening import open_scores
from jql_engine.errors import InputError
from jql_engine.files.chunks import Segment
from jql_engine.job.plan import Job
from jql_engine.job.ranks import Rank
from jql_engine.job.scoring import prepare
from jql_engine.job.unfinished import RunFile
from jql_engine.sessions.base import CHUNK_BYTES
from tests import servers
from tests.decision.score_files import SETTINGS, columns_of, write, write_many
from tests.files.test_remote import client, every, moto, s3  # noqa: F401


def some(n: int = 1000, seed: int = 0) -> dict[str, object]:
    rng = np.random.default_rng(seed)
    lang = rng.choice(["de", "en", None], n).tolist()
    return columns_of(rng.standard_normal((2, n)).astype(np.float32), rng.integers(1, 99, n), lang)


def read(files: module.ScoreFiles) -> tuple[np.ndarray, np.ndarray, list[str | None]]:
    """All scores, lengths and groups."""
    rows = list(files.read())
    names = [files.groups.names[number] for one in rows for number in one.groups]
    return np.concatenate([one.scores for one in rows], axis=1), np.concatenate([one.n_tokens for one in rows]), names


def test_rows_come_in_the_order_of_the_files_and_as_often_as_asked(tmp_path):
    columns = some()
    files = open_scores([str(write_many(tmp_path, columns, row_group_size=70))], group_column="lang")
    assert (files.heads, files.n_rows) == (("a", "b"), 1000)
    for _ in range(2):
        scores, n_tokens, names = read(files)
        assert scores.tolist() == [columns["score_a"].to_pylist(), columns["score_b"].to_pylist()]
        assert n_tokens.tolist() == columns["n_tokens"].to_pylist()
        assert names == columns["lang"].to_pylist()


def test_rows_know_their_file_and_their_place_in_it(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 64)
    files = open_scores([str(write_many(tmp_path, some()))], extra_columns=["lang"])
    found = [(one.file, one.start, len(one)) for one in files.read()]
    for number, file in enumerate(files.files):
        mine = [(start, n) for of, start, n in found if of == number]
        assert [start for start, _ in mine] == np.cumsum([0, *(n for _, n in mine)]).tolist()[:-1]
        assert sum(n for _, n in mine) == file.n_rows
        assert len(mine) > 1
    assert found == sorted(found)
    assert [name for one in files.read() for name in one.columns["lang"].to_pylist()] == some()["lang"].to_pylist()


def test_only_what_is_needed_is_read(tmp_path):
    columns = {"id": list(range(1000)), **some(), "text": ["text" * 100] * 1000}
    files = open_scores([str(write_many(tmp_path, columns))], ["score_b"], "lang")
    assert files.heads == ("b",)
    assert {tuple(one.columns.schema.names) for one in files.read()} == {("score_b", "n_tokens", "lang")}


def test_null_nan_and_infinite_scores_are_told_apart(tmp_path):
    one = np.ma.masked_array([1, np.nan, np.inf, -np.inf, 0, 7], [False] * 4 + [True, False], np.float32)
    other = np.ma.masked_array([1, 2, 3, 4, 5, 6], [False] * 5 + [True], np.float32)
    file = write(tmp_path / "a.parquet", columns_of([one, other]))
    (rows,) = open_scores([str(file)]).read()
    assert rows.null.tolist() == [[False] * 4 + [True, False], [False] * 5 + [True]]
    assert np.isnan(rows.scores[0]).tolist() == [False, True, False, False, True, False]
    assert rows.is_scored.tolist() == [True] + [False] * 5


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (pa.array(["x", None, "x", "y"]).dictionary_encode(), ["x", None, "x", "y"]),
        (pa.array(["x", None, "", "y"], pa.large_string()), ["x", None, "", "y"]),
        (pa.array([3, 3, None, -1]), ["3", "3", None, "-1"]),
        (pa.array([True, False, None, True]), ["true", "false", None, "true"]),
        (pa.array([datetime.date(2024, 5, 1)] * 4), ["2024-05-01"] * 4),
        (pa.nulls(4), [None] * 4),
    ],
)
def test_groups_may_be_of_many_types(values, names, tmp_path):
    columns = columns_of([np.arange(4, dtype=np.float32)])
    file = write(tmp_path / "a.parquet", {**columns, "group": values})
    assert read(open_scores([str(file)], group_column="group"))[2] == names


@pytest.mark.parametrize("kind", [pa.float16(), pa.float64(), pa.int8(), pa.uint64()])
def test_scores_from_elsewhere_may_be_any_numbers(kind, tmp_path):
    file = write(tmp_path / "a.parquet", {"edu": pa.array([1, None, 3]).cast(kind)}, settings=None)
    files = open_scores([str(file)], ["edu"])
    scores, n_tokens, _ = read(files)
    assert files.heads == ("edu",)
    assert not files.has_tokens
    assert np.nan_to_num(scores, nan=-1).tolist() == [[1, -1, 3]]
    assert n_tokens.tolist() == [0, 0, 0]


def test_what_a_real_job_appended_is_read_with_a_column_of_the_source(bundle, tmp_path):
    lang = ["de", "en", "de"]
    pq.write_table(pa.table({"text": ["one", None, "three"], "lang": lang}), tmp_path / "in.parquet")
    work = prepare(Job((str(tmp_path / "in.parquet"),), tmp_path / "out", output="append"), bundle, "cpu-fp32", 1 << 20)
    commit_all(work, bundle.heads)
    files = open_scores([str(tmp_path / "out")], group_column="lang")
    assert files.heads == bundle.heads
    assert read(files)[2] == lang
    assert files.settings["bundle"] == bundle.hash


def commit_all(work, heads, most: int = 99) -> None:
    """Write scores of zero for the first chunks, and the files that are whole then."""
    for task in work.tasks[:most]:
        for segment in task.chunk.segments:
            commit(work, segment, heads)
    if most >= len(work.tasks):
        for output in work.outputs:
            if output.parts.exists():
                output.assemble()
        work.release()


def commit(work, segment: Segment, heads) -> None:
    n = segment.stop - segment.start
    zeros, yes = np.zeros((n, len(heads)), np.float32), np.ones(n, np.bool_)
    work.outputs[segment.file].commit(segment, Scores(heads, zeros, np.ones(n, np.int32), ~yes, yes).to_table())


@pytest.mark.parametrize("given", ["{}", "{}/*.parquet", "{}/sub"])
def test_an_unfinished_job_is_refused(given, bundle, tmp_path):
    for name in ("a.parquet", "sub/b.parquet"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": ["x"] * 100}), tmp_path / "in" / name)
    work = prepare(
        Job((str(tmp_path / "in"),), tmp_path / "out", chunk_rows=60), bundle, "cpu-fp32", CHUNK_BYTES["cpu"]
    )
    commit_all(work, bundle.heads, most=len(work.tasks) - 1)
    (tmp_path / "out/sub").mkdir(exist_ok=True)
    with pytest.raises(InputError, match=r"not finished: .*\.run says that .* to be written"):
        open_scores([given.format(tmp_path / "out")])
    commit_all(work, bundle.heads)
    assert open_scores([given.format(tmp_path / "out")]).n_rows


def test_a_finished_file_of_an_unfinished_job_may_be_named(tmp_path):
    file = write(tmp_path / "a.parquet", some())
    RunFile.of(tmp_path, {}, ["in"], Rank()).begin(["a.parquet", "b.parquet"], [])
    assert open_scores([str(file)]).n_rows == 1000
    with pytest.raises(InputError, match="that job, which is under way"):
        open_scores([str(tmp_path)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**SETTINGS, "variant": "openvino-bf16"}, r"different jobs: --variant cpu-fp32 in .* --variant openvino-bf16"),
        ({**SETTINGS, "bundle": "c" * 64}, r"different jobs: bundle b{12} in the first, bundle c{12} in the second"),
        (None, r"one was written by jql-run and one was not"),
    ],
)
def test_files_of_different_jobs_are_refused(settings, message, tmp_path):
    write(tmp_path / "a.parquet", some())
    write(tmp_path / "b.parquet", some(), settings)
    with pytest.raises(InputError, match=message) as error:
        open_scores([str(tmp_path)])
    assert "a.parquet and " in str(error.value)
    assert "b.parquet" in str(error.value)


def test_a_null_is_as_good_as_a_setting_that_is_not_there(tmp_path):
    write(tmp_path / "a.parquet", some())
    write(tmp_path / "b.parquet", some(), {**SETTINGS, "id_column": None})
    assert open_scores([str(tmp_path)]).n_rows == 2000


def test_scores_of_the_first_documents_alone_are_said_to_be_that(tmp_path, capfd):
    write(tmp_path / "a.parquet", some(), {**SETTINGS, "limit": 1000})
    open_scores([str(tmp_path)])
    assert "the first documents alone were scored (jql-run --limit)" in capfd.readouterr().err


def test_lengths_that_no_document_has_are_refused(tmp_path):
    columns = {"score_a": np.arange(3, dtype=np.float32), "n_tokens": np.array([1, 1 << 60, 1 << 62])}
    write(tmp_path / "a.parquet", columns)
    with pytest.raises(InputError, match=r"a\.parquet: n_tokens is 4611686018427387904 in a row, expected 0 to 2,147"):
        list(open_scores([str(tmp_path)]).read())


def test_that_doubles_are_rounded_is_said(tmp_path, capfd):
    """0.3 is below the float32 next to it: who compares it with that as a double drops what jql-cut keeps."""
    file = write(tmp_path / "a.parquet", {"quality": np.array([0.1, 0.2, 0.3, 0.4])}, None)
    assert open_scores([str(file)], ["quality"]).heads == ("quality",)
    assert "quality is double: its values are taken as float32" in capfd.readouterr().err
    write(file, {"quality": np.array([0.1, 0.2, 0.3, 0.4], np.float32)}, None)
    open_scores([str(file)], ["quality"])
    assert capfd.readouterr().err == ""


def test_files_of_one_job_may_differ_in_their_sources_and_in_where_a_limit_cuts(tmp_path):
    write(tmp_path / "a.parquet", some(), {**SETTINGS, "source_bytes": 1, "limit": None})
    write(tmp_path / "b.parquet", some(), {**SETTINGS, "source_bytes": 2, "limit": 1000})
    assert open_scores([str(tmp_path)]).n_rows == 2000


@pytest.mark.parametrize(
    ("columns", "group", "message"),
    [
        ((), "language", r"no column 'language'; it has score_a, score_b, n_tokens, lang; jql-run --group-column"),
        (("score_c",), None, r"no column 'score_c'; it has score_a, score_b, n_tokens, lang$"),
        (("lang",), None, r"column 'lang' is string, expected numbers"),
        (("score_a", "score_a"), None, r"name a head twice"),
        ((), "score_a", r"column 'score_a' is float, expected text, integers, booleans or dates"),
    ],
)
def test_columns_that_cannot_be_used_are_named(columns, group, message, tmp_path):
    file = write(tmp_path / "a.parquet", some())
    with pytest.raises(InputError, match=message):
        open_scores([str(file)], columns, group)


def test_scores_of_another_program_need_their_columns_named(tmp_path):
    file = write(tmp_path / "a.parquet", some(), settings=None)
    with pytest.raises(
        InputError, match=r"not written by jql-run; name its score columns with --columns .*: it has score_a"
    ):
        open_scores([str(file)])


def test_a_file_that_is_none_is_named(tmp_path):
    write(tmp_path / "a.parquet", some())
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match=r"b\.parquet is not a complete parquet file"):
        open_scores([str(tmp_path)])
    (tmp_path / "b.parquet").unlink()
    (tmp_path / "c.jsonl").write_text("{}")
    with pytest.raises(InputError, match=r"c\.jsonl is no parquet file"):
        open_scores([str(tmp_path)])


def test_scores_without_a_length_are_an_error(tmp_path):
    tokens = np.ma.masked_array(np.arange(3), [False, True, False])
    file = write(tmp_path / "a.parquet", columns_of([np.arange(3, dtype=np.float32)], tokens))
    with pytest.raises(InputError, match="row 1 has scores and no n_tokens"):
        list(open_scores([str(file)]).read())
    file = write(tmp_path / "b.parquet", columns_of([np.arange(3, dtype=np.float32)], np.array([1, -5, 2])))
    with pytest.raises(InputError, match="n_tokens is -5"):
        list(open_scores([str(file)]).read())


def test_a_column_of_all_different_values_is_no_group(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_GROUPS", 100)
    columns = {**columns_of([np.zeros(101, np.float32)]), "url": [f"http://{i}" for i in range(101)]}
    file = write(tmp_path / "a.parquet", columns)
    with pytest.raises(InputError, match="more than 100 values, 'http://100' among them"):
        list(open_scores([str(file)], group_column="url").read())


def test_a_file_that_changes_between_two_passes_is_an_error(tmp_path):
    folder = write_many(tmp_path / "scores", some(), 20)
    files = open_scores([str(folder)])
    assert sum(len(rows) for rows in files.read()) == 1000
    changed = write(tmp_path / "new.parquet", some(50, seed=1))
    os.utime(changed, ns=(1, 1))
    shutil.copy2(changed, folder / "015.parquet")
    with pytest.raises(InputError, match=r"015\.parquet was changed during the run"):
        list(files.read())


@pytest.mark.usefixtures("s3")
def test_scores_on_s3_are_read_again_where_requests_fail(tmp_path, request):
    folder = write_many(tmp_path, some(), 12)
    S3FileSystem().put(str(folder), "bucket/scores", recursive=True)
    local = read(open_scores([str(folder)], group_column="lang"))
    request.getfixturevalue("moto").fault = every(7, "drop", "cut", "busy")
    remote = read(open_scores(["s3://bucket/scores"], group_column="lang"))
    assert remote[0].tolist() == local[0].tolist()
    assert remote[2] == local[2]
    assert request.getfixturevalue("moto").faults


@pytest.mark.usefixtures("s3")
def test_an_unfinished_job_on_s3_is_refused(tmp_path):
    S3FileSystem().put(str(write(tmp_path / "a.parquet", some())), "bucket/scores/a.parquet")
    RunFile.of(UPath("s3://bucket/scores"), {}, ["in"], Rank()).begin(["a.parquet", "b.parquet"], [])
    for given in ("s3://bucket/scores", "s3://bucket/scores/", "s3://bucket/scores/*.parquet"):
        with pytest.raises(InputError, match=r"b\.parquet is to be written; let that job, which is under way"):
            open_scores([given])
    assert open_scores(["s3://bucket/scores/a.parquet"]).n_rows == 1000


def test_a_file_is_read_over_http(tmp_path):
    write(tmp_path / "a.parquet", some())
    with servers.files(tmp_path) as server:
        assert open_scores([f"{server.url}/a.parquet"]).n_rows == 1000


def test_memory_does_not_grow_with_the_rows_of_a_file(tmp_path):
    n = 1_000_000
    file: Path = write(tmp_path / "a.parquet", columns_of([np.arange(n, dtype=np.float32)]), row_group_size=n)
    assert max(len(rows) for rows in open_scores([str(file)]).read()) <= module.ROWS
