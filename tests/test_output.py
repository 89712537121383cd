from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jql_engine.data import Chunk, Segment, score_schema
from jql_engine.dataset import InputFile, open_file
from jql_engine.errors import OutputError
from jql_engine.output import METADATA_KEY, ScoreWriter, check_output, is_finished

HEADS = ("edu", "prose")
SETTINGS = {"bundle": "abc", "variant": "cpu-fp32", "id_column": None, "source_bytes": 12}


def source(path: Path, n_rows: int = 4, **columns: object) -> InputFile:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": pa.array(["x"] * n_rows, pa.string()), **columns}), path)
    return open_file(path, Path(path.name), "text", None)


def scores(start: int, stop: int) -> pa.Table:
    """Row i has the scores i and -i."""
    rows = range(start, stop)
    columns = [list(map(float, rows)), [-float(i) for i in rows], list(rows), [i % 2 == 0 for i in rows]]
    return pa.table(columns, schema=score_schema(HEADS))


def visible(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def write_all(out: Path, file: InputFile, ids: pa.ChunkedArray | None = None) -> pa.Table:
    writer = ScoreWriter(out, [file], HEADS, [SETTINGS])
    writer.put(Chunk((Segment(0, 0, file.n_rows),)), scores(0, file.n_rows), [ids])
    writer.close()
    return pq.read_table(out / file.relative)


def test_a_file_appears_when_its_last_row_is_written(tmp_path):
    writer = ScoreWriter(tmp_path / "out", [source(tmp_path / "a.parquet", 30)], HEADS, [SETTINGS])
    for start, stop in pairwise([0, 10, 20, 30]):
        assert visible(tmp_path / "out") == ([".a.parquet.writing"] if start else [])
        writer.put(Chunk((Segment(0, start, stop),)), scores(start, stop), [None])
    writer.close()
    assert visible(tmp_path / "out") == ["a.parquet"]
    assert pq.read_table(tmp_path / "out/a.parquet").equals(scores(0, 30))


def test_a_chunk_of_many_files_is_divided_among_them(tmp_path):
    files = [source(tmp_path / f"{name}.parquet", size) for name, size in {"a": 3, "b": 0, "c": 5, "d": 0}.items()]
    writer = ScoreWriter(tmp_path / "out", files, HEADS, [SETTINGS] * 4)
    writer.put(Chunk((Segment(0, 0, 3), Segment(1, 0, 0), Segment(2, 0, 2))), scores(0, 5), [None] * 3)
    writer.put(Chunk((Segment(2, 2, 5), Segment(3, 0, 0))), scores(5, 8), [None] * 2)
    writer.close()
    assert visible(tmp_path / "out") == [f"{name}.parquet" for name in "abcd"]
    for name, expected in {"a": (0, 3), "b": (0, 0), "c": (3, 8), "d": (0, 0)}.items():
        assert pq.read_table(tmp_path / f"out/{name}.parquet").equals(scores(*expected))


@pytest.mark.parametrize(
    "ids",
    [
        pa.array([3, 1, 2, None]),
        pa.array(["c", "a", None, "a"]),
        pa.array(["c", "a", None, "a"], pa.large_string()),
        pa.array(["c", "a", None, "a"]).dictionary_encode(),
        pa.array(["c", "a", None, "a"]).dictionary_encode().cast(pa.dictionary(pa.int8(), pa.string())),
        pa.array([b"\xff"] * 4, pa.binary(1)),
        pa.array([1, 2, 3, 4], pa.timestamp("us", "UTC")),
        pa.array([{"url": "u", "part": 1}] * 4),
        pa.array([["x"], [], None, ["y", "z"]]),
        pa.nulls(4),
    ],
    ids=lambda ids: str(ids.type),
)
def test_ids_of_any_type_come_first_and_unchanged(tmp_path, ids):
    file = source(tmp_path / "a.parquet", id=ids)
    pieces = pq.read_table(file.path)["id"]
    found = write_all(tmp_path / "out", file, pa.chunked_array([*pieces.slice(0, 1).chunks, *pieces.slice(1).chunks]))
    assert found.column_names == ["id", "score_edu", "score_prose", "n_tokens", "truncated"]
    assert found.schema.field("id").equals(file.schema.field("id"), check_metadata=True)
    assert found["id"].to_pylist() == ids.to_pylist()
    assert found.drop_columns("id").equals(scores(0, 4))


def test_without_ids_there_are_the_score_columns_alone(tmp_path):
    assert write_all(tmp_path / "out", source(tmp_path / "a.parquet")).schema.equals(score_schema(HEADS))


def test_an_id_that_may_not_be_null_stays_so(tmp_path):
    path = tmp_path / "a.parquet"
    schema = pa.schema([pa.field("text", pa.string()), pa.field("id", pa.int64(), nullable=False)])
    pq.write_table(pa.table([["x"], [7]], schema=schema), path)
    file = open_file(path, Path("a.parquet"), "text", None)
    found = write_all(tmp_path / "out", file, pa.chunked_array([[7]]))
    assert found["id"].to_pylist() == [7] and not found.schema.field("id").nullable


def test_the_settings_are_in_the_metadata(tmp_path):
    write_all(tmp_path / "out", source(tmp_path / "a.parquet"))
    assert json.loads(pq.read_schema(tmp_path / "out/a.parquet").metadata[METADATA_KEY]) == SETTINGS


def test_a_file_that_was_begun_is_dropped_and_finished_ones_stay(tmp_path):
    files = [source(tmp_path / "a.parquet"), source(tmp_path / "b.parquet")]
    writer = ScoreWriter(tmp_path / "out", files, HEADS, [SETTINGS] * 2)
    writer.put(Chunk((Segment(0, 0, 4), Segment(1, 0, 3))), scores(0, 7), [None] * 2)
    writer.close()
    assert visible(tmp_path / "out") == ["a.parquet"]


def test_what_a_killed_run_left_is_written_over(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".a.parquet.writing").write_bytes(b"half a file " * 1000)
    assert write_all(tmp_path / "out", source(tmp_path / "a.parquet")).equals(scores(0, 4))
    assert visible(tmp_path / "out") == ["a.parquet"]


def test_a_full_disk_is_an_error_that_says_so_and_leaves_nothing(tmp_path):
    out, file = tmp_path / "out", source(tmp_path / "a.parquet")
    out.mkdir()
    (out / ".a.parquet.writing").symlink_to("/dev/full")  # writing to it fails as on a full disk
    writer = ScoreWriter(out, [file], HEADS, [SETTINGS])
    with pytest.raises(OutputError, match=r"a\.parquet cannot be written: No space left on device; free some space"):
        writer.put(Chunk((Segment(0, 0, 4),)), scores(0, 4), [None])
    writer.close()
    assert list(out.iterdir()) == []


def test_a_file_where_a_folder_should_be_is_an_error(tmp_path):
    path = tmp_path / "in" / "a.parquet"
    file = source(path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sub").touch()
    nested = open_file(path, Path("sub/a.parquet"), "text", None)
    writer = ScoreWriter(tmp_path / "out", [file, nested], HEADS, [SETTINGS] * 2)
    with pytest.raises(OutputError, match=r"sub/a\.parquet cannot be written"):
        writer.put(Chunk((Segment(0, 0, 4), Segment(1, 0, 4))), scores(0, 8), [None] * 2)
    writer.close()
    assert visible(tmp_path / "out") == ["a.parquet", "sub"]


def check(out: Path, given: Path, *files: InputFile) -> None:
    check_output(out, [str(given)], files, HEADS)


def test_the_output_folder_is_made_and_left_empty(tmp_path):
    check(tmp_path / "new" / "out", tmp_path / "a.parquet", source(tmp_path / "a.parquet"))
    assert list((tmp_path / "new" / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("given", "out"),
    [
        ("in", "in"),
        ("in", "in/scores"),
        ("in", "in/../in/scores"),
        ("in/**/*.parquet", "in/scores"),
        ("in/*.parquet", "in"),
    ],
)
def test_an_output_that_the_next_run_would_read_is_an_error(tmp_path, given, out):
    file = source(tmp_path / "in" / "a.parquet")
    with pytest.raises(OutputError, match=f"--out {re.escape(str(tmp_path / out))} lies inside of the input"):
        check(tmp_path / out, tmp_path / given, file)
    assert visible(tmp_path) == ["in/a.parquet"]


@pytest.mark.parametrize(
    ("given", "out"), [("in", "in2"), ("in/*.parquet", "in/scores"), ("in/a.parquet", "in/scores")]
)
def test_an_output_beside_the_input_is_none(tmp_path, given, out):
    check(tmp_path / out, tmp_path / given, source(tmp_path / "in" / "a.parquet"))
    assert (tmp_path / out).is_dir()


def test_scores_that_would_overwrite_their_source_are_an_error(tmp_path):
    file = source(tmp_path / "a.parquet")
    with pytest.raises(OutputError, match=f"the scores of {re.escape(str(file.path))} would overwrite the input"):
        check(tmp_path, file.path, file)


def test_scores_that_would_overwrite_another_source_are_an_error(tmp_path):
    first = source(tmp_path / "in" / "sub" / "a.parquet")
    first = open_file(first.path, Path("sub/a.parquet"), "text", None)
    second = source(tmp_path / "out" / "sub" / "a.parquet")
    with pytest.raises(OutputError, match=re.escape(str(second.path))):
        check_output(tmp_path / "out", [str(tmp_path / "in"), str(second.path.parent)], [first, second], HEADS)


@pytest.mark.parametrize("name", ["score_prose", "n_tokens", "truncated"])
def test_an_id_called_like_a_score_column_is_an_error(tmp_path, name):
    source(tmp_path / "a.parquet", **{name: range(4)})
    file = open_file(tmp_path / "a.parquet", Path("a.parquet"), "text", name)
    with pytest.raises(OutputError, match=rf"a\.parquet: the id column '{name}' has the name of a score column"):
        check(tmp_path / "out", tmp_path / "a.parquet", file)


@pytest.mark.parametrize("out", ["{}/file", "{}/file/out", "/proc/out"])
def test_an_output_that_cannot_be_written_is_named(tmp_path, out):
    (tmp_path / "file").write_text("kept")
    out = Path(out.format(tmp_path))
    with pytest.raises(OutputError, match=f"--out {re.escape(str(out))} is not a folder that can be written"):
        check(out, tmp_path / "a.parquet", source(tmp_path / "a.parquet"))
    assert (tmp_path / "file").read_text() == "kept"


def test_a_file_is_finished_once_it_was_written_with_the_same_settings(tmp_path):
    target = tmp_path / "out" / "a.parquet"
    assert not is_finished(target, SETTINGS)
    write_all(tmp_path / "out", source(tmp_path / "a.parquet"))
    assert is_finished(target, dict(SETTINGS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bundle": "xyz"}, "bundle was 'abc', is now 'xyz'"),
        ({"id_column": "id"}, "id_column was None, is now 'id'"),
        ({"source_bytes": 13}, "source_bytes was 12, is now 13"),
        ({"colour": "red"}, "colour was None, is now 'red'"),
    ],
)
def test_other_settings_are_named(tmp_path, change, message):
    write_all(tmp_path / "out", source(tmp_path / "a.parquet"))
    target = tmp_path / "out" / "a.parquet"
    with pytest.raises(
        OutputError, match=f"{re.escape(str(target))} exists and .* other settings: {message}; .*--overwrite"
    ):
        is_finished(target, {**SETTINGS, **change})


def test_a_setting_that_is_no_longer_made_is_named(tmp_path):
    write_all(tmp_path / "out", source(tmp_path / "a.parquet"))
    fewer = {key: value for key, value in SETTINGS.items() if key != "variant"}
    with pytest.raises(OutputError, match="variant was 'cpu-fp32', is now None"):
        is_finished(tmp_path / "out" / "a.parquet", fewer)


@pytest.mark.parametrize("kind", ["foreign parquet", "text", "folder"])
def test_what_somebody_else_wrote_is_not_taken_for_an_output(tmp_path, kind):
    target = tmp_path / "a.parquet"
    if kind == "foreign parquet":
        source(target)
    elif kind == "text":
        target.write_text("not a table")
    else:
        target.mkdir()
    with pytest.raises(OutputError, match=r"a\.parquet exists and was not written by jql-run"):
        is_finished(target, SETTINGS)
