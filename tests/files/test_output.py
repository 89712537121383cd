from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jql_engine.data import embedding_type, score_schema
from jql_engine.errors import InputError, OutputError, PartsError
from jql_engine.files.chunks import Segment
from jql_engine.files.formats import open_file
from jql_engine.files.inputs import Columns, InputFile, SourceFile
from jql_engine.files.location import locate
from jql_engine.files.output import OutputFile
from jql_engine.files.parts import Part, find_leftovers
from jql_engine.files.settings import METADATA_KEY, check_settings, is_finished
from jql_engine.files.versions import version_of
from jql_engine.files.writing import remove_version
from jql_engine.job.check import check_apart, check_names, check_output
from jql_engine.names import RelativeName
from tests.inputs import damage

HEADS = ("edu", "prose")
SETTINGS = {"bundle": "abc", "variant": "cpu-fp32", "id_column": None}


def described(path: Path, relative: str | None = None, id_column: str | None = None) -> InputFile:
    found = SourceFile(path, RelativeName(relative or path.name), *version_of(path))
    return open_file(found, Columns("text", id_column))


def source(
    path: Path, n_rows: int = 4, relative: str | None = None, id_column: str | None = None, **columns: object
) -> InputFile:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": pa.array(["x"] * n_rows, pa.string()), **columns}), path)
    return described(path, relative, id_column)


def output_of(out: Path, file: InputFile, kind: str = "sidecar") -> OutputFile:
    return OutputFile(out, file, score_schema(HEADS), kind, SETTINGS)


def scores(start: int, stop: int) -> pa.Table:
    """Row i has the scores i and -i."""
    rows = range(start, stop)
    columns = [list(map(float, rows)), [-float(i) for i in rows], list(rows), [i % 2 == 0 for i in rows]]
    return pa.table(columns, schema=score_schema(HEADS))


def visible(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*"))


def write_all(out: Path, file: InputFile, ids: pa.ChunkedArray | None = None) -> pa.Table:
    output_of(out, file).commit(Segment(0, 0, file.n_rows), scores(0, file.n_rows), () if ids is None else [ids])
    return pq.read_table(file.source.relative.below(out))


def rows(out: Path) -> dict[str, set[tuple[int, int]]]:
    return {name: {part.rows for part in parts} for name, parts in find_leftovers(out).parts.items()}


def commit_parts(output: OutputFile, *borders: int) -> None:
    for start, stop in pairwise(borders):
        output.commit(Segment(0, start, stop), scores(start, stop))


def test_a_file_in_one_chunk_is_finished_at_once(tmp_path):
    assert write_all(tmp_path / "out", source(tmp_path / "a.parquet")).equals(scores(0, 4))
    assert visible(tmp_path / "out") == [".parts", "a.parquet"]


def test_parts_lie_apart_until_the_file_is_whole(tmp_path):
    output = output_of(tmp_path / "out", source(tmp_path / "a.parquet", 30, "sub/a.parquet"))
    commit_parts(output, 0, 10, 20)
    assert visible(tmp_path / "out") == [
        ".parts", ".parts/sub", ".parts/sub/a.parquet",
        *(f".parts/sub/a.parquet/{Part(output.key, start, start + 10).name}" for start in (0, 10)),
    ]  # fmt: skip
    assert rows(tmp_path / "out") == {"sub/a.parquet": {(0, 10), (10, 20)}}
    with pytest.raises(OutputError, match="lacks rows 20 to 30"):
        output.assemble()
    commit_parts(output, 20, 30)
    output.assemble()
    assert visible(tmp_path / "out") == ["sub", "sub/a.parquet"]
    assert pq.read_table(tmp_path / "out/sub/a.parquet").equals(scores(0, 30))
    check_settings(tmp_path / "out/sub/a.parquet", output.settings)


def test_a_gap_between_parts_is_an_error_and_nothing_is_lost(tmp_path):
    output = output_of(tmp_path / "out", source(tmp_path / "a.parquet", 30))
    commit_parts(output, 0, 10)
    commit_parts(output, 20, 30)
    with pytest.raises(OutputError, match="lacks rows 10 to 20; start the same command again"):
        output.assemble()
    assert len(rows(tmp_path / "out")["a.parquet"]) == 2 and not (tmp_path / "out/a.parquet").exists()


def test_the_unfinished_files_of_a_killed_run_are_found_by_their_input(tmp_path):
    one, other = (output_of(tmp_path / "out", source(tmp_path / f"{name}.parquet", 30)) for name in "ab")
    commit_parts(one, 0, 15)
    ended = subprocess.Popen(["true"])
    ended.wait()
    mine = f".{os.getpid()}-"
    left = [file.with_name(file.name.replace(mine, f".{ended.pid}-")) for file in (one.aside, other.aside, one.aside)]
    reused = one.aside.with_name(re.sub(r"-\d+\.", "-1.", one.aside.name))  # this number, but begun at another time
    another_host = one.aside.with_name(re.sub(r"\.[0-9a-f]{8}\.", ".01234567.", one.aside.name))
    old = another_host.with_name(another_host.name.replace("writing", "0.writing").replace(".0.", "0."))
    for file in [*left, reused, one.aside, another_host, old]:
        file.write_bytes(b"half a file " * 1000)
    os.utime(old, (0, 0))
    found = find_leftovers(tmp_path / "out")
    assert sorted(found.left_by([one.file.source.relative.text])) == sorted([left[0], left[2], reused, old])
    assert rows(tmp_path / "out") == {"a.parquet": {(0, 15)}}


def test_parts_of_other_files_stay(tmp_path):
    one, other = (output_of(tmp_path / "out", source(tmp_path / f"{name}.parquet", 30)) for name in "ab")
    commit_parts(other, 0, 10)
    commit_parts(one, 0, 10, 30)
    one.assemble()
    assert rows(tmp_path / "out") == {"b.parquet": {(0, 10)}}


NESTED = {
    "url": pa.array(["a", None, "c", "d"], pa.large_string()),
    "meta": pa.array([{"date": 1, "tags": ["x"]}, None, {"date": None, "tags": []}, {"date": 4, "tags": None}]),
    "lang": pa.array(["de", "en", "de", None]).dictionary_encode(),
    "when": pa.array([1, 2, None, 4], pa.timestamp("us", "UTC")),
    "vector": pa.array([[1.0, 2.0]] * 4, pa.list_(pa.float32(), 2)),
    "map": pa.array([[("k", 1)], [], None, [("a", None)]], pa.map_(pa.string(), pa.int32())),
    "price": pa.array([1, 2, 3, None]).cast(pa.decimal128(21, 2)),
    "raw": pa.array([b"\xff", b"", None, b"x"]),
}


@pytest.mark.parametrize("row_group_size", [None, 1, 3])
def test_append_keeps_every_column_and_the_metadata(tmp_path, row_group_size):
    path = tmp_path / "a.parquet"
    given = pa.table({"id": range(4), **NESTED, "text": ["x"] * 4})
    fields = [field.with_metadata({"note": field.name}) for field in given.schema]
    given = given.cast(pa.schema(fields, metadata={"pandas": "{}", "dataset": "of 2024"}))
    pq.write_table(given, path, row_group_size=row_group_size)
    output = output_of(tmp_path / "out", described(path), "append")
    commit_parts(output, 0, 3, 4)
    output.assemble()
    source_table, found = pq.read_table(path), pq.read_table(tmp_path / "out/a.parquet")
    assert found.select(given.column_names).equals(source_table)
    for field in source_table.schema:
        assert found.schema.field(field.name).equals(field, check_metadata=True)
    assert found.select(score_schema(HEADS).names).equals(scores(0, 4))
    assert found.schema.metadata[b"dataset"] == b"of 2024" and found.schema.metadata[b"pandas"] == b"{}"
    assert json.loads(found.schema.metadata[METADATA_KEY]) == output.settings
    assert visible(tmp_path / "out") == ["a.parquet"]


def test_append_holds_a_dictionary_once(tmp_path, monkeypatch):
    """Each small batch is read with all of the dictionary; categories that are ordered keep their order."""
    monkeypatch.setattr("jql_engine.files.output.GROUP_BYTES", 2 << 20)
    n_rows, values = 20_000, [f"{i:060}" for i in range(10_000)]
    places = np.arange(n_rows) // 2
    grades = pa.DictionaryArray.from_arrays(pa.array(places % 2 * 2), ["low", "middle", "high"], ordered=True)
    table = pa.table({
        "text": [f"text {i}" for i in range(n_rows)],
        "domain": pa.DictionaryArray.from_arrays(pa.array(places, pa.int32()), values),
        "grade": grades,
    })  # fmt: skip
    pq.write_table(table, tmp_path / "a.parquet")
    output = output_of(tmp_path / "out", described(tmp_path / "a.parquet"), "append")
    commit_parts(output, 0, n_rows)
    output.assemble()
    found = pq.read_table(tmp_path / "out/a.parquet")
    for name in table.column_names:
        assert found[name].type == table[name].type and found[name].to_pylist() == table[name].to_pylist()
    assert found["grade"].unify_dictionaries().chunk(0).dictionary.to_pylist() == ["low", "middle", "high"]
    assert pq.read_metadata(tmp_path / "out/a.parquet").num_row_groups == 1
    assert (tmp_path / "out/a.parquet").stat().st_size < 3 * (tmp_path / "a.parquet").stat().st_size


def test_append_of_categories_with_narrow_indices_in_each_row_group(tmp_path):
    """Of pandas: each row group has fewer categories than an int8 can number, and all together have more."""
    kind = pa.dictionary(pa.int8(), pa.string())
    values = [f"{number:03}" for number in range(200)]
    with pq.ParquetWriter(tmp_path / "a.parquet", pa.schema([("text", pa.string()), ("domain", kind)])) as out:
        for half in (values[:100], values[100:]):
            out.write_table(pa.table({"text": half, "domain": pa.array(half).dictionary_encode().cast(kind)}))
    output = output_of(tmp_path / "out", described(tmp_path / "a.parquet"), "append")
    commit_parts(output, 0, 200)
    output.assemble()
    found = pq.read_table(tmp_path / "out/a.parquet")
    assert found["domain"].type == kind and found["domain"].to_pylist() == values


def test_append_of_a_file_in_one_chunk_and_of_none(tmp_path):
    for n_rows in (0, 3):
        file = source(tmp_path / f"{n_rows}.parquet", n_rows, id=range(n_rows))
        output = output_of(tmp_path / "out", file, "append")
        commit_parts(output, 0, n_rows)
        output.assemble()
        found = pq.read_table(tmp_path / f"out/{n_rows}.parquet")
        assert found.column_names == ["text", "id", *score_schema(HEADS).names] and found.num_rows == n_rows


def test_a_source_that_can_not_be_read_again_leaves_the_parts(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"text {i}" * 50 for i in range(40)]}), path, row_group_size=20)
    output = output_of(tmp_path / "out", described(path), "append")
    commit_parts(output, 0, 20, 40)
    modified = path.stat().st_mtime_ns
    damage(path, row_group=1)
    os.utime(path, ns=(modified, modified))
    with pytest.raises(InputError, match=r"a\.parquet cannot be read to its end"):
        output.assemble()
    assert rows(tmp_path / "out") == {"a.parquet": {(0, 20), (20, 40)}}
    assert not (tmp_path / "out/a.parquet").exists()


@pytest.mark.parametrize("kind", ["sidecar", "append"])
def test_a_source_that_was_changed_meanwhile_is_an_error_and_nothing_appears(tmp_path, kind):
    path = tmp_path / "a.parquet"
    output = output_of(tmp_path / "out", source(path, 30), kind)
    commit_parts(output, 0, 20, 30)
    os.utime(path, (1, 1))
    with pytest.raises(InputError, match=r"a\.parquet was changed during the run"):
        output.assemble()
    assert not (tmp_path / "out/a.parquet").exists() and not list((tmp_path / "out").rglob("*.writing"))


def test_a_file_that_another_run_has_finished_is_finished(tmp_path):
    output = output_of(tmp_path / "out", source(tmp_path / "a.parquet", 30))
    commit_parts(output, 0, 20, 30)
    output.assemble()
    before = (tmp_path / "out/a.parquet").stat()
    output.assemble()
    assert (tmp_path / "out/a.parquet").stat() == before


def other_job(output: OutputFile) -> OutputFile:
    return replace(output, shared={**SETTINGS, "variant": "openvino-bf16"})


def test_a_finished_file_of_another_job_is_never_replaced(tmp_path):
    output = output_of(tmp_path / "out", source(tmp_path / "a.parquet", 4))
    write_all(tmp_path / "out", output.file)
    before = (tmp_path / "out/a.parquet").read_bytes()
    for start in (0, 2):  # as the whole file, and as a part of it
        with pytest.raises(OutputError, match="was computed with other settings: --variant cpu-fp32 then"):
            other_job(output).commit(Segment(0, start, 4), scores(start, 4))
    assert visible(tmp_path / "out") == [".parts", "a.parquet"]
    assert (tmp_path / "out/a.parquet").read_bytes() == before


def test_assembly_leaves_the_parts_of_another_job(tmp_path):
    output = output_of(tmp_path / "out", source(tmp_path / "a.parquet", 4))
    commit_parts(other_job(output), 0, 2)
    commit_parts(output, 0, 2, 4)
    output.assemble()
    assert rows(tmp_path / "out") == {"a.parquet": {(0, 2)}}
    assert visible(tmp_path / "out")[-1] == "a.parquet"


def test_a_file_in_one_chunk_whose_source_was_changed_does_not_appear(tmp_path):
    output = output_of(tmp_path / "out", source(tmp_path / "a.parquet"))
    source(tmp_path / "a.parquet", 5)
    with pytest.raises(InputError, match=r"a\.parquet was changed during the run"):
        output.commit(Segment(0, 0, 4), scores(0, 4))
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(InputError, match=r"a\.parquet cannot be looked at again"):
        output.commit(Segment(0, 0, 4), scores(0, 4))
    assert not (tmp_path / "out").exists()


def test_row_groups_of_the_finished_file_hold_many_parts(tmp_path):
    output = output_of(tmp_path / "out", source(tmp_path / "a.parquet", 300))
    commit_parts(output, *range(0, 301, 3))
    output.assemble()
    assert pq.read_metadata(tmp_path / "out/a.parquet").num_row_groups == 1


def test_vectors_are_kept_beside_the_scores(tmp_path):
    schema = score_schema(HEADS, embedding_type(3, np.dtype(np.float16)))
    output = OutputFile(tmp_path / "out", source(tmp_path / "a.parquet", 2), schema, "sidecar", SETTINGS)
    vectors = pa.array([[1, 2, 3], None], pa.list_(pa.float16(), 3))
    table = scores(0, 2).append_column("embedding", vectors)
    for segment in (Segment(0, 0, 1), Segment(0, 1, 2)):
        output.commit(segment, table.slice(segment.start, 1))
    output.assemble()
    assert pq.read_table(tmp_path / "out/a.parquet")["embedding"].combine_chunks().equals(vectors)


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
    pieces = pq.read_table(file.source.location)["id"]
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
    output = output_of(tmp_path / "out", described(path))
    output.commit(Segment(0, 0, 1), scores(0, 1), [pa.chunked_array([[7]])])
    found = pq.read_table(tmp_path / "out/a.parquet")
    assert found["id"].to_pylist() == [7] and not found.schema.field("id").nullable


def test_the_settings_are_in_the_metadata(tmp_path):
    file = source(tmp_path / "a.parquet")
    write_all(tmp_path / "out", file)
    found = json.loads(pq.read_schema(tmp_path / "out/a.parquet").metadata[METADATA_KEY])
    size, version = version_of(tmp_path / "a.parquet")
    assert found == {**SETTINGS, "source_bytes": size, "source_version": version, "limit": None}


def test_a_file_where_a_folder_should_be_is_an_error(tmp_path):
    file = source(tmp_path / "in" / "a.parquet", relative="sub/a.parquet")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sub").touch()
    with pytest.raises(OutputError, match=r"sub/a\.parquet cannot be written"):
        write_all(tmp_path / "out", file)
    assert "sub/a.parquet" not in visible(tmp_path / "out") and (tmp_path / "out/sub").is_file()


def check(out: Path, given: Path, *files: InputFile) -> None:
    check_apart(out, str(given))

    check_output(out, [file.source for file in files])


def test_a_wildcard_in_the_name_of_a_bucket_leaves_nothing_to_compare():
    check_apart(locate("memory://scores/new"), "memory://corpus-*/2024/*.parquet")


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
    assert visible(tmp_path) == ["in", "in/a.parquet"]


@pytest.mark.parametrize(
    ("given", "out"), [("in", "in2"), ("in/*.parquet", "in/scores"), ("in/a.parquet", "in/scores")]
)
def test_an_output_beside_the_input_is_none(tmp_path, given, out):
    check(tmp_path / out, tmp_path / given, source(tmp_path / "in" / "a.parquet"))
    assert (tmp_path / out).is_dir()


def test_scores_that_would_overwrite_their_source_are_an_error(tmp_path):
    file = source(tmp_path / "a.parquet")
    with pytest.raises(
        OutputError, match=f"the scores of {re.escape(str(file.source.location))} would overwrite the input"
    ):
        check(tmp_path, file.source.location, file)


def test_scores_that_would_overwrite_another_source_are_an_error(tmp_path):
    first = source(tmp_path / "in" / "sub" / "a.parquet", relative="sub/a.parquet")
    second = source(tmp_path / "out" / "sub" / "a.parquet")
    place = second.source.location
    with pytest.raises(OutputError, match=re.escape(str(place))):
        check_output(tmp_path / "out", [first.source, second.source])


@pytest.mark.parametrize("name", ["score_prose", "n_tokens", "truncated"])
def test_an_id_called_like_a_score_column_is_an_error(tmp_path, name):
    file = source(tmp_path / "a.parquet", id_column=name, **{name: range(4)})
    with pytest.raises(OutputError, match=rf"a\.parquet: the copied column '{name}' has the name of a score column"):
        check_names(file, score_schema(HEADS), "sidecar")


def test_a_column_called_like_a_score_column_can_not_be_kept(tmp_path):
    file = source(tmp_path / "a.parquet", n_tokens=range(4))
    check_names(file, score_schema(HEADS), "sidecar")
    with pytest.raises(OutputError, match=r"a\.parquet: a column 'n_tokens' has the name of a score column"):
        check_names(file, score_schema(HEADS), "append")


@pytest.mark.parametrize("out", ["{}/file", "{}/file/out", "/proc/out"])
def test_an_output_that_cannot_be_written_is_named(tmp_path, out):
    (tmp_path / "file").write_text("kept")
    out = Path(out.format(tmp_path))
    with pytest.raises(OutputError, match=f"--out {re.escape(str(out))} is not a folder that can be written"):
        check(out, tmp_path / "a.parquet", source(tmp_path / "a.parquet"))
    assert (tmp_path / "file").read_text() == "kept"


def test_a_file_is_finished_once_it_was_written_with_the_same_settings(tmp_path):
    output = output_of(tmp_path / "out", source(tmp_path / "a.parquet"))
    assert not is_finished(output.final, output.settings)
    write_all(tmp_path / "out", output.file)
    assert is_finished(output.final, output.settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bundle": "xyz"}, "bundle 'abc' then, bundle 'xyz' now"),
        ({"id_column": "id"}, "no --id-column then, --id-column id now"),
        ({"color": "red"}, "color None then, color 'red' now"),
        ({"variant": None}, "--variant cpu-fp32 then, no --variant now"),
    ],
)
def test_other_settings_are_named(tmp_path, change, message):
    output = output_of(tmp_path / "out", source(tmp_path / "a.parquet"))
    write_all(tmp_path / "out", output.file)
    place = re.escape(str(output.final))
    with pytest.raises(OutputError, match=f"{place} exists and .* other settings: {message}; .*--overwrite"):
        is_finished(output.final, {**output.settings, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source_bytes": 13, "source_version": "5"}, r"\d+ bytes then, 13 now"),
        ({"source_version": "5"}, "of the same size, but written anew"),
    ],
)
def test_a_changed_source_is_named(tmp_path, change, message):
    output = output_of(tmp_path / "out", source(tmp_path / "a.parquet"))
    write_all(tmp_path / "out", output.file)
    with pytest.raises(
        OutputError, match=rf"a\.parquet exists .* before its source \({message}\) changed; .*--overwrite"
    ):
        is_finished(output.final, {**output.settings, **change})


@pytest.mark.parametrize("kind", ["foreign parquet", "text", "folder"])
def test_what_somebody_else_wrote_is_not_taken_for_an_output(tmp_path, kind):
    output = tmp_path / "a.parquet"
    if kind == "foreign parquet":
        source(output)
    elif kind == "text":
        output.write_text("not a table")
    else:
        output.mkdir()
    with pytest.raises(OutputError, match=r"a\.parquet exists and was not written by jql-run"):
        is_finished(output, SETTINGS)


def test_a_damaged_part_is_removed_and_its_rows_are_computed_again(tmp_path):
    output = output_of(tmp_path / "out", source(tmp_path / "a.parquet", 4))
    commit_parts(output, 0, 2, 4)
    part = output.parts / Part(output.key, 2, 4).name
    content = bytearray(part.read_bytes())
    content[4:60] = b"\xff" * 56
    part.write_bytes(content)
    with pytest.raises(PartsError, match=r"was damaged .* and is removed; start the same command again"):
        output.assemble()
    assert not part.exists()
    commit_parts(output, 2, 4)
    output.assemble()
    assert pq.read_table(tmp_path / "out/a.parquet").equals(scores(0, 4))


def test_a_file_that_was_written_since_is_not_removed(tmp_path):
    place, aside = tmp_path / "a", tmp_path / ".parts/.x.writing"
    place.write_bytes(b"old")
    found = version_of(place)
    place.write_bytes(b"newer")
    remove_version(place, found, aside)
    assert place.read_bytes() == b"newer"
    remove_version(place, version_of(place), aside)
    assert not place.exists() and not aside.exists()
