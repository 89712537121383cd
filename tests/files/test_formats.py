from __future__ import annotations

import codecs
import gzip
import json
import random
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from upath import UPath

from jql_engine.errors import InputError, UnreadableError
from jql_engine.files import json_lines, parquet
from jql_engine.files.dictionaries import compact
from jql_engine.files.formats import batches, open_file
from jql_engine.files.inputs import Columns, InputFile
from jql_engine.files.reading import as_text
from tests.files.test_inputs import opened, source, write
from tests.fuzzing.mutate import read_struct, write_struct

PACK = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}


def lines(path: Path, *documents: object, end: str = "\n") -> Path:
    """JSON Lines, packed as the name of `path` says; bytes are a line as it is."""
    raw = [d if isinstance(d, bytes) else json.dumps(d).encode() for d in documents]
    pack = next(pack for suffix, pack in reversed(PACK.items()) if path.name.endswith(suffix))
    path.write_bytes(pack(b"".join(line + end.encode() for line in raw)))
    return path


def rows_of(file: InputFile, columns: Sequence[str] = ("text",), start: int = 0) -> list[dict[str, object]]:
    return [row for batch in batches(file, start, list(columns)) for row in batch.to_pylist()]


def texts_of(file: InputFile) -> list[str | None]:
    """As they come to the tokenizer."""
    found = [as_text(pa.Table.from_batches([batch])["text"])[0] for batch in batches(file, 0, ["text"])]
    return [text for part in found for text in part.to_pylist()]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(json_lines, "READ_BYTES", 64)


def test_the_footer_tells_rows_columns_and_sizes(tmp_path):
    file = opened(write(tmp_path / "a.parquet", ["abc"] * 5, row_group_size=2, id=range(5)))
    assert (file.n_rows, file.group_rows) == (5, (2, 2, 1))
    assert len(file.group_bytes) == 3 and min(file.group_bytes) > 0
    assert file.copied[0] == pa.field("id", pa.int64())


def test_the_size_is_that_of_the_text_column(tmp_path):
    texts, others = [str(i) * 100 for i in range(100)], [str(i) * 1000 for i in range(100)]
    first = opened(write(tmp_path / "a.parquet", texts, **{"text.raw": others, "a": others}))
    second = opened(write(tmp_path / "b.parquet", texts))
    assert first.group_bytes == second.group_bytes


@pytest.mark.parametrize("content", [b"", b"PAR1", b"text\n", b"PAR1" + b"\0" * 100 + b"PAR1"])
def test_what_is_no_parquet_file_is_named_in_one_line(tmp_path, content):
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{re.escape(str(path))} is not a complete parquet file") as raised:
        opened(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["a.json", "part-0", "a.csv"])
def test_a_name_that_says_nothing_is_answered_with_those_that_do(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"text": "x"}\n')
    with pytest.raises(InputError, match=rf"{name} has a name .* \.jsonl\.gz.* \.json\.gz.* not a complete parquet"):
        opened(tmp_path / name)


@pytest.mark.parametrize("kept", [0.2, 0.9])
def test_a_truncated_file_is_named(tmp_path, kept):
    path = write(tmp_path / "a.parquet", ["some text"] * 100)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(InputError, match=f"{re.escape(str(path))} is not a complete parquet file"):
        opened(path)


def test_a_column_name_that_is_not_utf_8_is_named(tmp_path):
    """As programs of another code page write it."""
    path = write(tmp_path / "a.parquet", ["x"], note=["y"])
    path.write_bytes(path.read_bytes().replace(b"note", b"n\xf6te"))
    with pytest.raises(
        UnreadableError, match=f"{re.escape(str(path))} is not a complete parquet.*xf6te' is a name in it"
    ):
        opened(path)


def test_a_place_that_is_none_in_a_dictionary_is_damage(tmp_path):
    """Arrow reads a dictionary of texts without looking at what the rows ask of it."""
    texts = pa.DictionaryArray.from_arrays(pa.array([0, 7], pa.int32()), pa.array(["a", "b"]), safe=False)
    with pytest.raises(pa.ArrowIndexError, match="a dictionary of 2 values is asked for number 7"):
        compact(texts)
    texts = pa.DictionaryArray.from_arrays(pa.array([0, -1], pa.int32()), pa.array(["a", "b"]), safe=False)
    with pytest.raises(pa.ArrowIndexError):
        compact(texts)


def test_an_object_as_an_id_keeps_its_keys(tmp_path, small_blocks):
    """Not only those that the documents of the first block have."""
    documents = [{"text": "x" * 100, "id": {"a": i}} for i in range(3)]
    file = opened(lines(tmp_path / "a.jsonl", *documents, {"text": "x", "id": {"b": 1}}))
    with pytest.raises(UnreadableError, match="document 4: 'id' is a dict, expected struct<a: int64>"):
        list(batches(file, 0, ["text", "id"]))


def test_a_stream_that_raises_loses_no_memory(tmp_path):
    path = lines(tmp_path / "a.jsonl.gz", *[{"text": f"text {i}"} for i in range(100)])
    path.write_bytes(path.read_bytes()[:200])
    found = source(path)

    def held() -> int:
        for _ in range(100):
            with pytest.raises(UnreadableError):
                open_file(found, Columns())
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

    held()
    assert -held() + held() < 100 << 20, "4 MB each time"


def promise(path: Path, n_rows: int, n_texts: int) -> None:
    """Let the footer say so of the first row group, whatever is in it."""
    content = path.read_bytes()
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    struct, _ = read_struct(content, start)
    group = field_of(struct, 4)[2][1][0]
    field_of(group, 3)[2] = n_rows
    field_of(field_of(field_of(group, 1)[2][1][0], 3)[2], 5)[2] = n_texts
    footer = write_struct(struct)
    path.write_bytes(content[:start] + footer + len(footer).to_bytes(4, "little") + b"PAR1")


def field_of(struct: list[list[Any]], number: int) -> list[Any]:
    return next(field for field in struct if field[0] == number)


def test_row_groups_whose_footer_contradicts_itself_are_damage(tmp_path):
    """Twice as many rows as texts: a job would be planned for them."""
    path = write(tmp_path / "a.parquet", ["some text"] * 25)
    promise(path, 50, 25)
    with pytest.raises(UnreadableError, match=r"a\.parquet is damaged: row group 0 has 50 rows and 25 texts"):
        opened(path)


def test_a_row_group_that_ends_early_does_not_give_its_place_to_the_next(tmp_path):
    path = write(tmp_path / "a.parquet", [f"text {i}" for i in range(16)], row_group_size=8)
    promise(path, 10, 10)
    with pytest.raises(EOFError, match="row group 0 lacks 2 of the 10 rows that its footer says"):
        rows_of(opened(path))


DOCUMENTS = [{"text": f"text {i}" * (i % 5), "id": i} for i in range(50)]


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n \t\r\n"], ids=["LF", "CRLF", "blank"])
@pytest.mark.parametrize("size", [16, 64, 1 << 20])
def test_json_lines_are_read_whatever_they_are_packed_in(tmp_path, monkeypatch, suffix, end, size):
    monkeypatch.setattr(json_lines, "READ_BYTES", size)
    file = opened(lines(tmp_path / f"a{suffix}", *DOCUMENTS, end=end))
    assert file.n_rows == 50 and file.copied[0] == pa.field("id", pa.int64())
    assert (len(file.group_rows) == 1) == (size == 1 << 20)
    assert rows_of(file, ["text", "id"]) == DOCUMENTS


@pytest.mark.parametrize(("suffix", "pack"), list(PACK.items())[1:])
def test_members_of_a_compressed_file_are_read_as_one(tmp_path, suffix, pack):
    path = tmp_path / f"a{suffix}"
    raw = [json.dumps(document).encode() + b"\n" for document in DOCUMENTS]
    path.write_bytes(pack(b"".join(raw[:20])) + pack(b"") + pack(b"".join(raw[20:])[:-1]))
    assert rows_of(opened(path), ["text", "id"]) == DOCUMENTS


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("content", [b"", b"\n", b" \r\n\n"])
def test_a_file_without_lines_has_no_rows(tmp_path, suffix, content):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(PACK[suffix](content))
    file = open_file(source(path), Columns("content"))
    assert (file.n_rows, file.columns.id) == (0, None)
    assert file.schema.names == ["content"]
    assert rows_of(file, ["content"]) == []


def test_a_file_of_no_bytes_may_be_called_compressed(tmp_path):
    (tmp_path / "a.jsonl.gz").touch()
    assert opened(tmp_path / "a.jsonl.gz").n_rows == 0


def test_many_blocks_are_counted_once_each(tmp_path, monkeypatch, small_blocks):
    n_summed = 0

    def counting(values: Sequence[int]) -> int:
        nonlocal n_summed
        n_summed += len(values)
        return sum(values)

    monkeypatch.setattr(json_lines, "sum", counting, raising=False)
    file = opened(lines(tmp_path / "a.jsonl", *[{"text": "x" * 64}] * 500))
    assert len(file.group_rows) > 400 and n_summed <= len(file.group_rows)


def test_the_last_line_needs_no_end(tmp_path, small_blocks):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "b"}')
    assert texts_of(opened(path)) == ["a", "b"]


def test_blank_lines_at_the_beginning_hide_nothing(tmp_path, small_blocks):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n" * 200 + b'{"text": "a", "id": 7}\n' + b"\n" * 200 + b'{"text": "b", "id": 8}\n')
    file = opened(path)
    assert file.copied[0] == pa.field("id", pa.int64())
    assert rows_of(file, ["text", "id"]) == [{"text": "a", "id": 7}, {"text": "b", "id": 8}]


def test_a_line_longer_than_a_block_is_read(tmp_path, small_blocks):
    documents = [{"text": "a"}, {"text": "süß 月亮 " * 1_000}, {"text": "b"}, {"text": "c" * 100}]
    assert rows_of(opened(lines(tmp_path / "a.jsonl.gz", *documents))) == documents


def test_a_line_without_an_end_is_an_error_before_it_fills_the_memory(tmp_path):
    """Half a gigabyte in half a megabyte."""
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(b'{"text": "a"}\n' * 3 + b'{"text": "')
        for _ in range(512):
            stream.write(b"a" * (1 << 20))
    code = (
        "import resource, sys; from pathlib import Path; from tests.files.test_inputs import opened\n"
        "base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    opened(Path(sys.argv[1]))\n"
        "except Exception as error:\n    print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    message, grown = done.stdout.splitlines()
    assert message == f"{path}: line 4 is longer than 256 MiB; cut it, or leave the file out"
    assert int(grown) < 320 << 10  # KiB


@pytest.mark.parametrize(
    "text", ["", "süß 月亮 🌙", 'a"b\\c/d', "a\x00b\x1f", "2024-01-01", "12", "null", "\u2028\x85", "a\nb\r\nc"]
)
def test_a_text_comes_out_as_it_is(tmp_path, text):
    documents = [{"text": text}, json.dumps({"text": text}, ensure_ascii=False).encode()]
    assert texts_of(opened(lines(tmp_path / "a.jsonl", *documents))) == [text, text]


def test_a_missing_text_and_a_null_are_null(tmp_path):
    documents = [{"text": "a"}, {}, {"text": None}, {"other": 1}, {"text": ""}]
    assert texts_of(opened(lines(tmp_path / "a.jsonl", *documents))) == ["a", None, None, None, ""]


def test_texts_that_are_all_null_are_null(tmp_path):
    assert texts_of(opened(lines(tmp_path / "a.jsonl", {"text": None}, {"text": None}))) == [None, None]


@pytest.mark.parametrize("bad", [rb'{"text": "a\ud800b"}', rb'{"text": "\udc00\ud83d"}', b'{"text": "a\xffb"}'])
def test_what_is_no_unicode_is_null_and_counted(tmp_path, small_blocks, bad):
    good = [{"text": f"text {i}"} for i in range(20)]
    file = opened(lines(tmp_path / "a.jsonl", *good[:10], bad, {"text": None}, *good[10:], bad))
    expected = [document["text"] for document in good]
    assert texts_of(file) == [*expected[:10], None, None, *expected[10:], None]
    table = pa.Table.from_batches(list(batches(file, 0, ["text"])))
    assert as_text(table["text"])[1] == 2


def test_escaped_pairs_are_one_character(tmp_path):
    path = lines(tmp_path / "a.jsonl", rb'{"text": "\ud83c\udf19 \u6708"}', rb'{"text": "\ud800 \ud83c\udf19"}')
    assert texts_of(opened(path)) == ["🌙 月", None]


@pytest.mark.parametrize(
    "odd",
    [b'{"text": "odd", "n": NaN}', b'{"n": 1, "text": "even", "text": "odd"}', b'\xef\xbb\xbf{"text": "odd"}'],
    ids=["NaN", "twice", "byte order mark"],
)
@pytest.mark.parametrize("place", [0, 10])
def test_what_is_nearly_json_is_read(tmp_path, small_blocks, odd, place):
    documents: list[object] = [{"text": f"text {i}"} for i in range(20)]
    documents.insert(place, odd)
    texts = texts_of(opened(lines(tmp_path / "a.jsonl", *documents)))
    assert texts[place] == "odd" and len(texts) == 21 and texts[-1] == "text 19"


def test_other_columns_may_hold_anything(tmp_path, small_blocks):
    others = [1, "x", None, {"a": [1]}, {"a": "b"}, [], [{}], 2.5, "2024-01-01", 10**30, True]
    documents = [{"meta": other, "text": f"text {i}", "id": f"{i}"} for i, other in enumerate(others * 3)]
    documents += [{"late": {"deep": [i]}, "text": "late", "id": "x"} for i in range(3)]
    found = rows_of(opened(lines(tmp_path / "a.jsonl", *documents)), ["text", "id"])
    assert found == [{"text": document["text"], "id": document["id"]} for document in documents]


@pytest.mark.parametrize("first", [b"", codecs.BOM_UTF8, b'{"id": "\\ud800", "text": "x"}\n'])
def test_ids_that_are_not_utf8_stay_the_bytes_that_they_are(tmp_path, first):
    (tmp_path / "a.jsonl").write_bytes(first + b'{"id": "caf\xe9", "text": "x"}\n{"id": "b", "text": "y"}\n')
    file = opened(tmp_path / "a.jsonl")
    [batch] = batches(file, 0, ["id"])
    assert file.copied[0].type == pa.string()
    assert batch["id"].view(pa.binary()).to_pylist()[-2:] == [b"caf\xe9", b"b"]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (b'"caf\xe9 \\ud800"', b"caf\xe9 \xed\xa0\x80"),
        (b'"\\udcc3\\udca9"', "\udcc3\udca9".encode(errors="surrogatepass")),  # no "\u00e9" was written
        (b'"\\udcc3\xe9"', b"\xc3\xe9"),
    ],
)
def test_escaped_surrogates_and_raw_bytes_make_no_text(tmp_path, written, read):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x", "id": ' + written + b"}\n")
    [batch] = batches(opened(tmp_path / "a.jsonl"), 0, ["id"])
    assert batch["id"].view(pa.binary()).to_pylist() == [read]


@pytest.mark.parametrize("content", [codecs.BOM_UTF8, codecs.BOM_UTF8 + b"\r\n", codecs.BOM_UTF8 + b"\n\n"])
def test_a_byte_order_mark_alone_is_no_document(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    assert opened(tmp_path / "a.jsonl").n_rows == 0
    (tmp_path / "a.jsonl").write_bytes(content + b'{"text": "x"}\n')
    assert opened(tmp_path / "a.jsonl").n_rows == 1


def test_an_integer_beyond_64_bits_is_named(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"text": "x", "id": 2**64})
    with pytest.raises(UnreadableError, match=r"document 1: 'id' is a int, expected int64$"):
        opened(path)


@pytest.mark.parametrize(
    ("ids", "kind"),
    [
        ([5, 3, None], pa.int64()),
        (["a", "2024-01-01", None], pa.string()),
        (["2024-01-01"], pa.string()),
        ([1, 2.5], pa.float64()),
        ([1, 2**64 - 1, None], pa.uint64()),
        ([None, True], pa.bool_()),
        ([None, None], pa.string()),
        ([{"a": 1}], pa.struct({"a": pa.int64()})),
    ],
    ids=str,
)
@pytest.mark.parametrize("slowly", [False, True])
def test_ids_keep_their_type(tmp_path, ids, kind, slowly):
    documents: list[object] = [{"text": "x", "id": value} for value in ids]
    if slowly:
        documents.append(rb'{"text": "\ud800"}')
    file = opened(lines(tmp_path / "a.jsonl", *documents))
    assert file.copied[0] == pa.field("id", kind)
    assert [row["id"] for row in rows_of(file, ["id"])][: len(ids)] == ids


def test_a_file_without_ids_has_none(tmp_path):
    assert opened(lines(tmp_path / "a.jsonl", {"text": "x"})).columns.id is None


def test_another_id_can_be_asked_for_and_the_text_can_be_it(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"text": "x", "id": 1, "url": "u"})
    assert (opened(path, "url").copied[0], opened(path, "text").copied[0]) == (
        pa.field("url", pa.string()),
        pa.field("text", pa.string()),
    )


def test_a_key_that_no_document_of_the_first_block_has_is_an_error_that_lists_those_it_has(tmp_path, small_blocks):
    path = lines(tmp_path / "a.jsonl", *[{"content": "x", "url": "y"}] * 9, {"text": "z"})
    message = f"{re.escape(str(path))} has no column 'text'; it has content, url: .* --text-column"
    with pytest.raises(InputError, match=message) as caught:
        opened(path)
    assert not isinstance(caught.value, UnreadableError)  # the same for all files: the job is wrong
    with pytest.raises(InputError, match=r"no column 'key'; it has content, url: .* --id-column"):
        open_file(source(path), Columns("content", "key"))


@pytest.mark.parametrize("place", [0, 1, 25, 49])
@pytest.mark.parametrize("slowly", [False, True])
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (b'{"text": "x"', "is no JSON"),
        (b"text", "is no JSON"),
        (b'{"text": "x"} {"text": "y"}', "is no JSON"),
        (b'{"text": "x"},', "is no JSON"),
        (b"[" * 100_000, "is nested too deeply"),
        (b"null", "is a NoneType, expected an object"),
        (b"[1]", "is a list, expected an object"),
        (b'"x"', "is a str, expected an object"),
        (b'{"text": 5, "id": 1}', "'text' is a int, expected text"),
        (b'{"text": ["x"], "id": 1}', "'text' is a list, expected text"),
        (b'{"text": "x", "id": "1"}', "'id' is a str, expected int64 as in the documents before it"),
        (b'{"text": "x", "id": 123456789012345678901}', "'id' is a int, expected int64"),
        (b'{"text": "x", "id": 1.5}', "'id' is a float, expected int64 as in the documents before it"),
    ],
    ids=lambda value: value.decode()[:30] if isinstance(value, bytes) else "",
)
def test_a_broken_line_is_named_with_its_file_and_number(tmp_path, small_blocks, place, slowly, broken, message):
    documents: list[object] = [{"text": f"text {i}", "id": i} for i in range(50)]
    if slowly:
        documents[:] = [rb'{"text": "\ud800", "id": 1}'] * 50
    documents[place] = broken
    path = lines(tmp_path / "a.jsonl", *documents)
    expected = f"document {place + 1}:? {message}"
    if place == 0 and b'"1"' in broken:  # then the ids after it are what does not fit
        expected = "document 2: 'id' is a int, expected text"
    if place < 2 and b"1.5" in broken:  # within the first block, which decides about the type
        assert opened(path).copied[0] == pa.field("id", pa.float64())
        return
    with pytest.raises(UnreadableError, match=f"{re.escape(str(path))}: {expected}"):
        list(batches(opened(path), 0, ["text", "id"]))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_a_truncated_compressed_file_is_named(tmp_path, suffix, kept):
    path = lines(tmp_path / f"a{suffix}", *[{"text": random.Random(i).randbytes(50).hex()} for i in range(500)])
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(UnreadableError, match=f"{re.escape(str(path))} is not a complete jsonl file"):
        opened(path)


def test_what_is_not_compressed_is_named(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(b'{"text": "x"}\n')
    with pytest.raises(UnreadableError, match=re.escape(str(path))):
        opened(path)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz"])
def test_a_remote_file_that_is_gone_is_named(name):
    location = UPath(f"memory://gone/{name}")
    location.fs.pipe_file(location.path, b"")
    gone = source(location)
    location.unlink()
    with pytest.raises(UnreadableError, match=name):
        open_file(gone, Columns())


def write_groups(path: Path, sizes: list[int]) -> list[dict[str, object]]:
    """Row groups of exactly these sizes, empty ones included, with a column besides that nobody asks for."""
    rows = [{"noise": i, "text": None if i % 7 == 3 else f"text {i}", "id": i} for i in range(sum(sizes))]
    schema = pa.schema([("noise", pa.int32()), ("text", pa.string()), ("id", pa.int64())])
    table, start = pa.Table.from_pylist(rows, schema), 0
    with pq.ParquetWriter(path, schema) as writer:
        for size in sizes:
            writer.write_table(table.slice(start, size))
            start += size
    return rows


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_rows_of_parquet_from_any_row_on_are_the_tail_of_all(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("tail") / "a.parquet"
    rows = write_groups(path, data.draw(st.lists(st.sampled_from([0, 1, 5, 2_047, 2_048, 2_500]), max_size=4)))
    file, start = opened(path), data.draw(st.integers(0, len(rows)))
    assert file.n_rows == len(rows)
    assert rows_of(file, ["text", "id"], start) == [{"text": r["text"], "id": r["id"]} for r in rows[start:]]
    if start:
        assert rows_of(file.first(start), ["id"]) == [{"id": row["id"]} for row in rows[:start]]
    assert [row for batch in batches(file, start, None) for row in batch.to_pylist()] == rows[start:]


LINE = st.one_of(
    st.builds(lambda text: json.dumps({"text": text}).encode(), st.one_of(st.none(), st.text(max_size=30))),
    st.builds(lambda text: json.dumps({"text": text}, ensure_ascii=False).encode(), st.text('aé月\n\r"', max_size=9)),
    st.sampled_from(
        [b"", b"  \r", b'{"text": "' + b"x" * 100 + b'"}', b'{"x": [{"text": 1}]}\r', rb'{"text": "\ud800"}']
    ),
)


@given(st.lists(LINE, max_size=30), st.sampled_from(sorted(PACK)), st.integers(1, 200), st.booleans(), st.data())
@settings(deadline=None, max_examples=150)
def test_rows_of_json_lines_from_any_row_on_are_the_tail_of_all(tmp_path_factory, found, suffix, size, ends, data):
    path = tmp_path_factory.mktemp("tail") / f"a{suffix}"
    found = [b'{"text": "first"}', *found]
    path.write_bytes(PACK[suffix](b"\n".join(found) + b"\n" * ends))
    expected = [json.loads(line).get("text") for line in found if line.strip()]
    expected = [None if text and any("\ud800" <= c <= "\udfff" for c in text) else text for text in expected]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lines, "READ_BYTES", size)
        file = opened(path)
        start = data.draw(st.integers(0, len(expected)))
        tail = [as_text(pa.Table.from_batches([batch])["text"])[0] for batch in batches(file, start, ["text"])]
    assert file.n_rows == len(expected)
    assert [text for part in tail for text in part.to_pylist()] == expected[start:]


def test_a_row_group_is_not_held_whole(tmp_path):
    """32 MB in one row group, read a few at a time."""
    texts = [random.Random(i).randbytes(1 << 19).hex() for i in range(32)]
    path = tmp_path / "a.parquet"
    # Arrow looks at the size of a page only after so many rows.
    pq.write_table(pa.table({"text": texts}), path, use_dictionary=False, compression="none", write_batch_size=1)
    assert pq.read_metadata(path).num_row_groups == 1
    file, before = opened(path), pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in batches(file, 0, ["text"])]
    assert len(held) >= 8 and max(held) < 20 << 20


def test_rows_with_a_wide_column_besides_the_text_are_few_at_a_time(tmp_path):
    """64 MB in one row group, of which the texts are almost nothing."""
    images = [random.Random(i).randbytes(1 << 20) for i in range(64)]
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["x"] * 64, "image": images})
    pq.write_table(table, path, use_dictionary=False, compression="none", write_batch_size=1)
    assert pq.read_metadata(path).num_row_groups == 1
    del table
    file, before = opened(path), pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in batches(file, 0, None)]
    assert len(held) >= 16 and max(held) < 20 << 20


def test_two_columns_of_one_name_are_read_in_their_order(tmp_path):
    columns = [pa.array(["a", "b"]), pa.array([1, 2]), pa.array([3, 4])]
    table = pa.Table.from_arrays(columns, names=["text", "x", "x"])
    pq.write_table(table, tmp_path / "a.parquet")
    file = opened(tmp_path / "a.parquet")
    assert pa.Table.from_batches(list(batches(file, 0, None))).equals(table)
    assert rows_of(file) == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(("name", "option"), [("text", "--text-column"), ("id", "--id-column")])
def test_two_texts_or_ids_are_an_error(tmp_path, name, option):
    columns = [pa.array(["a"])] * 3
    pq.write_table(pa.Table.from_arrays(columns, names=["text" if name == "id" else "id", name, name]), tmp_path / "a")
    with pytest.raises(InputError, match=f"has 2 columns named '{name}'.*{option}"):
        opened(tmp_path / "a", "id")


def write_mixed(path: Path, **options: object) -> list[str]:
    """One row group whose dictionary was full after 400 rows of one text of 100 kB; 300 others follow."""
    large = random.Random(0).randbytes(50_000).hex()
    texts = [large] * 400 + [random.Random(i).randbytes(300).hex() for i in range(300)]
    pq.write_table(pa.table({"text": texts}), path, write_batch_size=100, **options)
    return texts


def test_a_column_all_of_whose_values_are_in_a_dictionary_stays_one(tmp_path):
    texts = write_mixed(tmp_path / "a.parquet")
    found = list(batches(opened(tmp_path / "a.parquet"), 0, ["text"]))
    assert [row for batch in found for row in batch["text"].to_pylist()] == texts
    assert len(found) == 1 and pa.types.is_dictionary(found[0]["text"].type)


@pytest.mark.parametrize("columns", [["text"], None])
def test_values_outside_of_a_dictionary_are_not_collected_in_it(tmp_path, monkeypatch, columns):
    monkeypatch.setattr(parquet, "DECODED_BYTES", 2_000_000)
    monkeypatch.setattr(parquet, "UNKNOWN_BYTES", 10_000)
    texts = write_mixed(tmp_path / "a.parquet", dictionary_pagesize_limit=120_000)
    group = pq.read_metadata(tmp_path / "a.parquet").row_group(0).column(0)
    assert 1.5e5 < group.total_uncompressed_size < 3e5  # of 40 MB
    file, before = opened(tmp_path / "a.parquet"), pa.total_allocated_bytes()
    found, held = [], 0
    for batch in batches(file, 0, columns):
        held = max(held, pa.total_allocated_bytes() - before)
        assert batch["text"].type == pa.string()
        found += batch["text"].to_pylist()
    assert found == texts and held < 12e6


def test_a_file_that_is_exchanged_after_it_was_found_is_noticed_as_it_is_opened(tmp_path):
    for path in (write(tmp_path / "a.parquet", ["x"] * 9), lines(tmp_path / "a.jsonl", {"text": "x"})):
        file = opened(path)
        path.rename(tmp_path / "old")
        path.write_bytes((tmp_path / "old").read_bytes())
        with pytest.raises(InputError, match="was changed during the run; start the same command again"):
            list(batches(file, 0, ["text"]))
