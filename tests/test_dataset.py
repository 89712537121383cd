from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jql_engine.data import Chunk, Segment
from jql_engine.dataset import CHUNK_BYTES, CHUNK_ROWS, InputFile, find_files, open_file, read, split
from jql_engine.errors import InputError


def write(path: Path, texts: list[str | None] | pa.Array, row_group_size: int | None = None, **columns: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts, **columns}), path, row_group_size=row_group_size)
    return path


def opened(path: Path, id_column: str | None = None) -> InputFile:
    return open_file(path, Path(path.name), "text", id_column)


def footer(*groups: tuple[int, int]) -> InputFile:
    """What open_file would find in a file of these row groups of (rows, bytes of text)."""
    schema = pa.schema([("text", pa.string())])
    rows, sizes = zip(*groups, strict=True) if groups else ((), ())
    return InputFile(Path("x.parquet"), Path("x.parquet"), "text", None, schema, rows, sizes)


def test_a_file_gives_its_name(tmp_path):
    path = write(tmp_path / "deep" / "a.parquet", ["x"])
    assert find_files([str(path)]) == [(path, Path("a.parquet"))]


def test_a_folder_gives_its_files_at_their_paths_inside_it(tmp_path):
    names = ["b.parquet", "a/z.parquet", "a/a.parquet", "lang=de/year=2024/part-0.parquet"]
    for name in [*names, ".hidden.parquet", "_part.parquet", ".git/c.parquet", "_temporary/0/d.parquet"]:
        write(tmp_path / name, ["x"])
    (tmp_path / "a" / "notes.txt").touch()
    assert find_files([str(tmp_path)]) == [(tmp_path / name, Path(name)) for name in sorted(names)]


def test_a_folder_below_a_hidden_one_can_be_given(tmp_path):
    path = write(tmp_path / ".cache" / "_in" / "a.parquet", ["x"])
    assert find_files([str(path.parent)]) == [(path, Path("a.parquet"))]


def test_a_folder_that_is_called_like_a_file_is_a_folder(tmp_path):
    path = write(tmp_path / "spark.parquet" / "part-0.parquet", ["x"])
    assert find_files([str(tmp_path)]) == [(path, Path("spark.parquet/part-0.parquet"))]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.parquet", ["a.parquet", "b.parquet"]),
        ("[!a].parquet", ["b.parquet"]),
        ("sub?/*.parquet", ["sub1/c.parquet", "sub2/c.parquet"]),
        ("**/*.parquet", ["a.parquet", "b.parquet", "sub1/c.parquet", "sub1/x/y/d.parquet", "sub2/c.parquet"]),
        ("sub1/**/?.parquet", ["c.parquet", "x/y/d.parquet"]),
    ],
)
def test_a_glob_gives_what_it_matches_below_its_fixed_part(tmp_path, monkeypatch, pattern, expected):
    for name in ["a.parquet", "b.parquet", "sub1/c.parquet", "sub2/c.parquet", "sub1/x/y/d.parquet"]:
        write(tmp_path / name, ["x"])
    (tmp_path / "subfolder.parquet").mkdir()
    found = find_files([str(tmp_path / pattern)])
    assert [relative.as_posix() for _, relative in found] == expected
    assert all(path.is_file() and path.is_relative_to(tmp_path) for path, _ in found)
    monkeypatch.chdir(tmp_path)
    assert [(tmp_path / path, relative) for path, relative in find_files([pattern])] == found


def test_a_file_with_a_wildcard_in_its_name_is_itself(tmp_path):
    path = write(tmp_path / "a[1].parquet", ["x"])
    assert find_files([str(path)]) == [(path, Path("a[1].parquet"))]


def test_a_file_given_twice_is_scored_once(tmp_path):
    path = write(tmp_path / "a.parquet", ["x"])
    assert find_files([str(path), str(tmp_path), str(tmp_path / "*.parquet")]) == [(path, Path("a.parquet"))]


def test_two_files_that_would_be_written_to_one_are_an_error(tmp_path):
    first, second = (write(tmp_path / name / "a.parquet", ["x"]) for name in ("one", "two"))
    with pytest.raises(InputError) as caught:
        find_files([str(first), str(second.parent)])
    assert str(first) in str(caught.value) and str(second) in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [("absent.parquet", "does not exist"), ("*.parquet", "matches no file"), ("empty", "holds no *.parquet file")],
)
def test_where_nothing_is_found_the_input_is_named(tmp_path, given, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=f"{re.escape(str(tmp_path / given))}.*{re.escape(message)}"):
        find_files([str(tmp_path / given)])


def test_the_footer_tells_rows_columns_and_sizes(tmp_path):
    file = opened(write(tmp_path / "a.parquet", ["abc"] * 5, row_group_size=2, id=range(5)))
    assert (file.n_rows, file.group_rows) == (5, (2, 2, 1))
    assert len(file.group_bytes) == 3 and min(file.group_bytes) > 0
    assert file.id_field == pa.field("id", pa.int64())


def test_the_size_is_that_of_the_text_column(tmp_path):
    texts, others = [str(i) * 100 for i in range(100)], [str(i) * 1000 for i in range(100)]
    first = opened(write(tmp_path / "a.parquet", texts, **{"text.raw": others, "a": others}))
    second = opened(write(tmp_path / "b.parquet", texts))
    assert first.group_bytes == second.group_bytes


@pytest.mark.parametrize(
    ("columns", "asked", "expected"),
    [
        ({"id": [1]}, None, "id"),
        ({"key": [1]}, None, None),
        ({"id": [1], "key": [2]}, "key", "key"),
        ({}, "text", "text"),
    ],
)
def test_the_id_column_is_the_one_named_or_id_where_there_is_one(tmp_path, columns, asked, expected):
    file = opened(write(tmp_path / "a.parquet", ["x"], **columns), asked)
    assert file.id_column == expected


@pytest.mark.parametrize("content", [b"", b"PAR1", b"text\n", b"PAR1" + b"\0" * 100 + b"PAR1"])
def test_what_is_no_parquet_file_is_named(tmp_path, content):
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{re.escape(str(path))} is not a complete parquet file"):
        opened(path)


@pytest.mark.parametrize("kept", [0.2, 0.9])
def test_a_truncated_file_is_named(tmp_path, kept):
    path = write(tmp_path / "a.parquet", ["some text"] * 100)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(InputError, match=f"{re.escape(str(path))} is not a complete parquet file"):
        opened(path)


def test_a_missing_text_column_lists_those_that_are_there(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"content": ["x"], "url": ["y"]}), path)
    with pytest.raises(InputError, match=r"a.parquet has no column 'text'; it has content, url: .* --text-column"):
        opened(path)


def test_a_missing_id_column_lists_those_that_are_there(tmp_path):
    path = write(tmp_path / "a.parquet", ["x"], url=["y"])
    with pytest.raises(InputError, match=r"a.parquet has no column 'key'; it has text, url: .* --id-column"):
        opened(path, "key")


def test_a_text_column_that_is_there_twice_is_an_error(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table([["x"], ["y"]], names=["text", "text"]), path)
    with pytest.raises(InputError, match="2 columns named 'text'"):
        opened(path)


@pytest.mark.parametrize(
    "values",
    [[1], [1.5], [True], [["x"]], [{"text": "x"}], pa.array([b"ab"], pa.binary(2)), pa.array([3]).dictionary_encode()],
    ids=["int", "float", "bool", "list", "struct", "fixed", "dictionary"],
)
def test_a_text_column_that_holds_no_text_is_named_with_its_type(tmp_path, values):
    path = write(tmp_path / "a.parquet", values)
    found = pq.read_schema(path).field("text").type
    with pytest.raises(InputError, match=f"a.parquet: column 'text' is {re.escape(str(found))}, expected text"):
        opened(path)


ROWS_OF_A_GROUP = st.one_of(st.integers(0, 5), st.integers(0, 3 * CHUNK_ROWS))
GROUP = st.tuples(ROWS_OF_A_GROUP, st.sampled_from([0, 10, 900, 5_000, 1 << 20])).map(lambda g: (g[0], g[0] * g[1]))
FILE = st.lists(GROUP, max_size=4).map(lambda groups: footer(*groups))


@given(st.lists(FILE, max_size=8))
@settings(deadline=None, max_examples=100)
def test_segments_cover_every_row_of_every_file_once_in_order(files):
    reached = [0] * len(files)
    seen = []
    for segment in (segment for chunk in split(files) for segment in chunk.segments):
        assert segment.start == reached[segment.file]
        assert segment.stop > segment.start or files[segment.file].n_rows == 0
        reached[segment.file] = segment.stop
        seen.append(segment.file)
    assert reached == [file.n_rows for file in files]
    assert seen == sorted(seen) and set(seen) == set(range(len(files)))


@given(st.lists(FILE, max_size=8))
@settings(deadline=None, max_examples=80)
def test_a_chunk_is_bounded_and_small_files_are_joined_as_long_as_they_fit(files):
    chunks = list(split(files))
    for chunk, after in pairwise([*chunks, None]):
        assert chunk.segments and chunk.n_docs <= CHUNK_ROWS
        if len(chunk.segments) > 1:
            assert sum(sum(files[segment.file].group_bytes) for segment in chunk.segments) <= CHUNK_BYTES
        segments = [*chunk.segments, *(after.segments[:1] if after else ())]
        joined = [files[segment.file] for segment in segments]
        if after and all(s.stop - s.start == file.n_rows for s, file in zip(segments, joined, strict=True)):
            n_bytes = sum(sum(file.group_bytes) for file in joined)
            assert sum(file.n_rows for file in joined) > CHUNK_ROWS or n_bytes > CHUNK_BYTES


def test_a_large_row_group_is_cut_into_equal_parts():
    chunks = list(split([footer((40_001, 100))]))
    assert [chunk.n_docs for chunk in chunks] == [13_333, 13_334, 13_334]


def test_long_texts_are_cut_by_their_size():
    chunks = list(split([footer((100, 5 * CHUNK_BYTES))]))
    assert [chunk.n_docs for chunk in chunks] == [20] * 5


def test_a_text_larger_than_a_chunk_is_a_chunk():
    assert [chunk.n_docs for chunk in split([footer((2, 9 * CHUNK_BYTES))])] == [1, 1]


def test_small_row_groups_are_joined():
    groups = [(1_000, 10_000)] * 45
    assert [chunk.n_docs for chunk in split([footer(*groups)])] == [20_000, 20_000, 5_000]


def test_small_files_are_joined_empty_ones_included():
    files = [footer((3, 9)), footer(), footer((0, 0)), footer((4, 9), (5, 9))]
    assert list(split(files)) == [Chunk((Segment(0, 0, 3), Segment(1, 0, 0), Segment(2, 0, 0), Segment(3, 0, 9)))]


def test_small_files_of_long_texts_are_joined_up_to_a_chunk_of_text():
    files = [footer((10, CHUNK_BYTES // 2))] * 3
    assert [chunk.n_docs for chunk in split(files)] == [20, 10]


def test_no_file_gives_no_chunk():
    assert list(split([])) == []


def texts_of(chunks) -> list[str | None]:
    return [text for chunk in chunks for text in chunk.documents.texts.to_pylist()]


@given(st.data())
@settings(deadline=None, max_examples=40)
def test_chunks_hold_the_rows_of_the_files_wherever_reading_starts(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("read")
    groups = st.lists(st.sampled_from([0, 1, 5, 1023, 1024, 1025, 2500]), max_size=4)
    layouts = data.draw(st.lists(groups, min_size=1, max_size=3))
    tables = [write_groups(folder / f"{number}.parquet", sizes) for number, sizes in enumerate(layouts)]
    files = [opened(folder / f"{number}.parquet") for number in range(len(layouts))]
    chunks = []
    for number, table in enumerate(tables):
        cuts = [0, *sorted(data.draw(st.lists(st.integers(0, table.num_rows), max_size=3))), table.num_rows]
        for segment in (Segment(number, *cut) for cut in pairwise(cuts)):
            joins = chunks and data.draw(st.booleans())
            chunks.append(Chunk((*(chunks.pop().segments if joins else ()), segment)))
    chunks = chunks[data.draw(st.integers(0, len(chunks))) :]
    found = list(read(files, chunks))
    assert [documents.chunk for documents in found] == chunks
    for documents in found:
        parts = [tables[s.file].slice(s.start, s.stop - s.start) for s in documents.chunk.segments]
        assert documents.documents.texts.to_pylist() == pa.concat_tables(parts)["text"].to_pylist()
        assert documents.documents.rows.tolist() == list(range(documents.chunk.n_docs))
        assert [ids.to_pylist() for ids in documents.ids] == [part["id"].to_pylist() for part in parts]
        assert documents.n_invalid == 0


def test_a_large_file_among_small_ones_is_read_whole(tmp_path):
    sizes = {"a": 3, "b": 2 * CHUNK_ROWS + 500, "c": 0, "d": 10}
    texts = {name: [f"{name}{i}" for i in range(size)] for name, size in sizes.items()}
    files = [
        opened(write(tmp_path / f"{name}.parquet", pa.array(texts[name], pa.string()), row_group_size=17_000))
        for name in sizes
    ]
    chunks = list(split(files))
    assert len(chunks) > 3
    everything = [text for name in sizes for text in texts[name]]
    assert texts_of(read(files, chunks)) == everything
    last = chunks[len(chunks) // 2 :]
    assert texts_of(read(files, last)) == everything[-sum(chunk.n_docs for chunk in last) :]


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view(),
        pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.large_string()),
        pa.dictionary(pa.int32(), pa.binary()),
    ],
    ids=str,
)  # fmt: skip
def test_every_type_of_text_is_read(tmp_path, kind):
    texts = ["plain", None, "", "süß 月亮", "plain", "a\x00b"] * 3
    file = opened(write(tmp_path / "a.parquet", as_type(texts, kind), row_group_size=4))
    [found] = read([file], list(split([file])))
    assert found.documents.texts.to_pylist() == texts
    assert found.n_invalid == 0


def test_a_column_of_nulls_is_read(tmp_path):
    file = opened(write(tmp_path / "a.parquet", pa.nulls(3)))
    [found] = read([file], list(split([file])))
    assert found.documents.texts.to_pylist() == [None] * 3


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary()], ids=str)
@pytest.mark.parametrize("dictionary", [True, False])
def test_what_is_not_utf8_is_null_and_counted(tmp_path, kind, dictionary):
    texts = not_utf8()
    texts = texts.dictionary_encode() if dictionary and kind == pa.string() else texts.cast(kind)
    path = write(tmp_path / "a.parquet", texts, id=range(5))
    assert b"\xff\xfe" in path.read_bytes()
    file = opened(path)
    [found] = read([file], list(split([file])))
    assert found.documents.texts.to_pylist() == ["good", None, None, None, "süß"]
    assert found.n_invalid == 2
    assert found.ids[0].to_pylist() == list(range(5))


def test_the_text_can_be_the_id(tmp_path):
    file = opened(write(tmp_path / "a.parquet", ["x", "y"]), "text")
    [found] = read([file], list(split([file])))
    assert found.documents.texts.to_pylist() == found.ids[0].to_pylist() == ["x", "y"]


def test_damaged_pages_are_an_error_that_names_the_file(tmp_path):
    path = write(tmp_path / "a.parquet", [f"text {i}" for i in range(5_000)], row_group_size=1_000)
    file, chunks = opened(path), [Chunk((Segment(0, i, i + 1_000),)) for i in range(0, 5_000, 1_000)]
    damage(path, row_group=3)
    chunks_read = []
    with pytest.raises(InputError, match=f"{re.escape(str(path))} cannot be read to its end"):
        chunks_read.extend(read([file], chunks))
    assert opened(path) == file


@pytest.mark.parametrize("texts", [["x"] * 3, ["x"] * 2, []], ids=["fewer rows", "fewer groups", "nothing"])
def test_a_file_that_shrank_since_its_footer_was_read_is_named(tmp_path, texts):
    path = write(tmp_path / "a.parquet", ["x"] * 4, row_group_size=2)
    file = opened(path)
    write(path, pa.array(texts, pa.string()), row_group_size=2)
    with pytest.raises(InputError, match=re.escape(str(path))):
        list(read([file], list(split([file]))))


def test_a_file_that_is_gone_is_named(tmp_path):
    file = opened(write(tmp_path / "a.parquet", ["x"]))
    file.path.unlink()
    with pytest.raises(InputError, match=re.escape(str(file.path))):
        list(read([file], list(split([file]))))


def write_groups(path: Path, sizes: list[int]) -> pa.Table:
    """Row groups of exactly these sizes, empty ones included, with a column besides that nobody asks for."""
    rows = range(sum(sizes))
    texts = pa.array([None if i % 7 == 3 else f"{path.stem}-{i}" for i in rows], pa.string())
    table = pa.table({"noise": pa.array(rows, pa.int32()), "text": texts, "id": pa.array(rows, pa.int64())})
    start = 0
    with pq.ParquetWriter(path, table.schema) as writer:
        for size in sizes:
            writer.write_table(table.slice(start, size))
            start += size
    return table


def as_type(texts: list[str | None], kind: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(kind):
        return pa.array(texts).cast(kind.value_type).dictionary_encode().cast(kind)
    return pa.array(texts).cast(kind)


def not_utf8() -> pa.StringArray:
    """Texts number 1 and 3 are no UTF-8, number 2 is null; Arrow does not look."""
    parts = [b"good", b"\xff\xfe", b"", b"caf\xe9", "süß".encode()]
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int32)
    valid = pa.py_buffer(bytes([0b11011]))
    return pa.StringArray.from_buffers(5, pa.py_buffer(offsets.tobytes()), pa.py_buffer(b"".join(parts)), valid, 1)


def damage(path: Path, row_group: int) -> None:
    """Overwrite the text of one row group; the footer stays as it is."""
    metadata = pq.read_metadata(path).row_group(row_group)
    column = next(
        metadata.column(i) for i in range(metadata.num_columns) if metadata.column(i).path_in_schema == "text"
    )
    with path.open("r+b") as stream:
        stream.seek(column.dictionary_page_offset or column.data_page_offset)
        stream.write(b"\xff" * column.total_compressed_size)
