from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from upath import UPath
from upath.implementations.memory import MemoryPath
from upath.registry import register_implementation

from jql_engine.errors import InputError
from jql_engine.files import json_lines, parquet, retries
from jql_engine.files.chunks import Chunk, ChunkEnd, Piece, Segment, Task
from jql_engine.files.inputs import InputFile
from jql_engine.files.reading import Cursor, as_text, read
from jql_engine.files.versions import version_of
from tests.files.test_formats import PACK, lines, write_groups
from tests.files.test_inputs import chunks_of, opened, write
from tests.inputs import damage, not_utf8


def tasks_of(chunks: Iterable[Chunk]) -> list[Task]:
    return [Task(number, chunk) for number, chunk in enumerate(chunks)]


def read_all(files: Sequence[InputFile], chunks: Iterable[Chunk]) -> list[tuple[list[Piece], ChunkEnd]]:
    """Pieces and end of each chunk."""
    found, pieces = [], []
    for item in read(files.__getitem__, tasks_of(chunks)):
        if isinstance(item, Piece):
            pieces.append(item)
        else:
            found.append((pieces, item))
            pieces = []
    assert not pieces, "an end follows every piece"
    return found


def texts_of(found: list[tuple[list[Piece], ChunkEnd]]) -> list[str | None]:
    assert not [end.failures for _, end in found if end.failures]
    return [text for pieces, _ in found for piece in pieces for text in piece.texts.to_pylist()]


def rows_of(pieces: Sequence[Piece]) -> list[int]:
    """The numbers of their rows."""
    return [row for piece in pieces for row in range(piece.first, piece.first + len(piece.texts))]


def one(file: InputFile) -> tuple[list[str | None], list[object], int]:
    """Texts, ids and number of invalid texts of a file."""
    [(pieces, end)] = read_all([file], [Chunk((Segment(0, 0, file.n_rows),))])
    assert end.failures == ()
    texts = [text for piece in pieces for text in piece.texts.to_pylist()]
    ids = [value for piece in pieces for column in piece.copied for value in column.to_pylist()]
    return texts, ids, sum(piece.n_invalid for piece in pieces)


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_pieces_hold_the_rows_of_their_chunks_wherever_reading_starts(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("read")
    groups = st.lists(st.sampled_from([0, 1, 5, 2_047, 2_048, 2_500]), max_size=4)
    files, rows = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "READ_BYTES", 5_000)
        patch.setattr(json_lines, "READ_BYTES", 5_000)
        for number, sizes in enumerate(data.draw(st.lists(groups, min_size=1, max_size=3))):
            rows.append(write_groups(folder / f"{number}.parquet", sizes))
            path = folder / f"{number}.parquet"
            if data.draw(st.booleans()) and rows[-1]:
                path = lines(folder / f"{number}{data.draw(st.sampled_from(sorted(PACK)))}", *rows[-1])
            files.append(opened(path))
        chunks: list[Chunk] = []
        for number, of_file in enumerate(rows):
            cuts = [0, *sorted(data.draw(st.lists(st.integers(0, len(of_file)), max_size=3))), len(of_file)]
            for segment in (Segment(number, *cut) for cut in pairwise(cuts)):
                joins = chunks and data.draw(st.booleans())
                chunks.append(Chunk((*(chunks.pop().segments if joins else ()), segment)))
        kept = data.draw(st.lists(st.booleans(), min_size=len(chunks), max_size=len(chunks)))  # the others are done
        chunks = [chunk for chunk, left in zip(chunks, kept, strict=True) if left]
        found = read_all(files, chunks)
    assert [end.task for _, end in found] == tasks_of(chunks)
    for pieces, end in found:
        expected = [row for s in end.task.chunk.segments for row in rows[s.file][s.start : s.stop]]
        assert [t for piece in pieces for t in piece.texts.to_pylist()] == [row["text"] for row in expected]
        assert [i for piece in pieces for i in piece.copied[0].to_pylist()] == [row["id"] for row in expected]
        assert rows_of(pieces) == list(range(end.task.chunk.n_docs))
        assert {piece.segment for piece in pieces} <= set(end.task.chunk.segments) and end.failures == ()


def test_a_large_file_among_small_ones_is_read_whole(tmp_path):
    sizes = {"a": 3, "b": 45_500, "c": 0, "d": 10}
    texts = {name: [f"{name}{i}" for i in range(size)] for name, size in sizes.items()}
    files = [
        opened(write(tmp_path / f"{name}.parquet", pa.array(texts[name], pa.string()), row_group_size=17_000))
        for name in sizes
    ]
    chunks = chunks_of(*files)
    assert len(chunks) > 3
    everything = [text for name in sizes for text in texts[name]]
    assert texts_of(read_all(files, chunks)) == everything


def test_pieces_are_small_however_large_the_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "READ_BYTES", 100_000)
    file = opened(write(tmp_path / "a.parquet", [f"{i:06}" + "x" * 10_000 for i in range(200)]))
    [(pieces, _)] = read_all([file], [Chunk((Segment(0, 0, 200),))])
    assert max(piece.texts.nbytes for piece in pieces) < 300_000


KINDS = [
    pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view(),
    pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.large_string()),
    pa.dictionary(pa.int32(), pa.binary()),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_type_of_text_is_read(tmp_path, kind):
    texts = ["plain", None, "", "süß 月亮", "plain", "a\x00b"] * 3
    array = pa.array(texts).cast(kind.value_type if pa.types.is_dictionary(kind) else kind)
    array = array.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else array
    assert one(opened(write(tmp_path / "a.parquet", array, row_group_size=4))) == (texts, [], 0)


def test_a_column_of_nulls_is_read(tmp_path):
    assert one(opened(write(tmp_path / "a.parquet", pa.nulls(3)))) == ([None] * 3, [], 0)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary()], ids=str)
@pytest.mark.parametrize("dictionary", [True, False])
def test_what_is_not_utf8_is_null_and_counted(tmp_path, kind, dictionary):
    texts = not_utf8()
    texts = texts.dictionary_encode() if dictionary and kind == pa.string() else texts.cast(kind)
    path = write(tmp_path / "a.parquet", texts, id=range(5))
    assert b"\xff\xfe" in path.read_bytes()
    assert one(opened(path)) == (["good", None, None, None, "süß"], list(range(5)), 2)


def test_the_text_can_be_the_id(tmp_path):
    file = opened(write(tmp_path / "a.parquet", ["x", "y"]), "text")
    assert file.columns.needed == ("text",) and one(file) == (["x", "y"], ["x", "y"], 0)


def test_text_of_many_chunks_and_none_is_joined():
    assert as_text(pa.chunked_array([], pa.string()))[0].to_pylist() == []
    assert as_text(pa.chunked_array([["a"], [], [None, "b"]]))[0].to_pylist() == ["a", None, "b"]


def thousands(n_docs: int) -> list[Chunk]:
    return [Chunk((Segment(0, i, i + 1_000),)) for i in range(0, n_docs, 1_000)]


def test_a_damaged_file_is_named_and_the_others_go_on(tmp_path):
    texts = [f"text {i}" for i in range(5_000)]
    bad, good = (write(tmp_path / f"{name}.parquet", texts, row_group_size=1_000) for name in ("bad", "good"))
    files = [opened(bad), opened(good)]
    damage(bad, row_group=2)
    chunks = [
        *thousands(4_000),
        Chunk((Segment(0, 4_000, 5_000), Segment(1, 0, 2_000))),
        Chunk((Segment(1, 2_000, 5_000),)),
    ]
    found = read_all(files, chunks)
    assert [len(end.failures) for _, end in found] == [0, 0, 1, 1, 1, 0]
    failed = [failure for _, end in found for failure in end.failures]
    assert [failure.segment for failure in failed] == [Segment(0, i, i + 1_000) for i in (2_000, 3_000, 4_000)]
    assert all(f"{bad} cannot be read to its end" in failure.message for failure in failed)
    whole = [
        piece for pieces, end in found for piece in pieces if piece.segment not in {f.segment for f in end.failures}
    ]
    assert [t for piece in whole for t in piece.texts.to_pylist()] == texts[:2_000] + texts
    shared = [piece for piece in found[4][0] if piece.segment.file == 1]
    assert rows_of(shared) == list(range(1_000, 3_000))  # the failed rows keep their numbers


def test_a_broken_line_in_the_middle_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines, "READ_BYTES", 1_000)
    documents: list[object] = [{"text": f"text {i}"} for i in range(3_000)]
    documents[1_500] = b'{"text": 5}'
    path = lines(tmp_path / "a.jsonl.gz", *documents)
    found = read_all([opened(path)], thousands(3_000))
    assert [len(end.failures) for _, end in found] == [0, 1, 1]
    assert found[1][1].failures[0].message == f"{path}: document 1501: 'text' is a int, expected text"


def failure_of(file: InputFile) -> str:
    [(_, end)] = read_all([file], [Chunk((Segment(0, 0, file.n_rows),))])
    [failure] = end.failures
    return failure.message


@pytest.mark.parametrize("texts", [["x"] * 3, ["x"] * 2, []], ids=["fewer rows", "fewer groups", "nothing"])
@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_a_file_that_shrank_since_it_was_looked_at_is_named(tmp_path, monkeypatch, texts, name):
    for module in (json_lines, parquet):
        monkeypatch.setattr(module, "READ_BYTES", 16)

    def put(texts: list[str]) -> Path:
        if name == "a.jsonl":
            return lines(tmp_path / name, *[{"text": text} for text in texts])
        return write(tmp_path / name, pa.array(texts, pa.string()), row_group_size=2)

    path = put(["x"] * 4)
    file = opened(path)
    put(texts)
    assert str(path) in failure_of(file)


def test_a_file_that_is_gone_is_named(tmp_path):
    path = write(tmp_path / "a.parquet", ["x"])
    file = opened(path)
    path.unlink()
    assert str(path) in failure_of(file)


def test_a_cursor_moves_forward_and_knows_where_it_is(tmp_path):
    rows = write_groups(tmp_path / "a.parquet", [5, 0, 4_000, 7])
    cursor = Cursor(opened(tmp_path / "a.parquet"), 2, ["id"])
    at = 2
    for take, skip in [(1, 1), (3, 0), (2_100, 1_500), (0, 400), (3, 1)]:
        assert cursor.row == at
        found = [row["id"] for batch in cursor.take(take) for row in batch.to_pylist()]
        assert found == [row["id"] for row in rows[at : at + take]]
        cursor.skip(skip)
        at += take + skip
    assert cursor.row == at == 4_011


def test_rows_that_are_passed_over_are_not_decoded(tmp_path):
    path = write(tmp_path / "a.parquet", [f"text {i}" for i in range(5_000)], row_group_size=1_000)
    file = opened(path)
    damage(path, row_group=2)
    found = read_all([file], [Chunk((Segment(0, 0, 500),)), Chunk((Segment(0, 3_100, 5_000),))])
    assert texts_of(found) == [f"text {i}" for i in [*range(500), *range(3_100, 5_000)]]


def test_the_end_of_all_columns_is_an_error_where_the_footer_says_more(tmp_path):
    file = opened(write(tmp_path / "a.parquet", ["x"] * 4))
    write(tmp_path / "a.parquet", ["x"] * 3)
    now = replace(
        file.source, size=version_of(tmp_path / "a.parquet")[0], version=version_of(tmp_path / "a.parquet")[1]
    )
    with pytest.raises(InputError, match="ends 1 rows too early"):
        list(Cursor(replace(file, source=now), 0, ["text"]).take(4))


def test_a_file_that_was_changed_since_it_was_found_is_an_error(tmp_path):
    file = opened(write(tmp_path / "a.parquet", ["x"] * 4))
    write(tmp_path / "a.parquet", ["y"] * 4)
    with pytest.raises(InputError, match="was changed during the run; start the same command again"):
        list(Cursor(file, 0, ["text"]).take(4))


class FlakyFileSystem(MemoryFileSystem):
    """Fails as often as `faults` says, before it opens and after so many bytes."""

    protocol = "flaky"
    cachable = False
    opens = 0  # that fail from now on
    reads: list[int] = []  # noqa: RUF012  # bytes that streams opened from now on give before they fail
    n_opened = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("flaky://", "memory://"))

    def unstrip_protocol(self, name: str) -> str:
        return f"flaky://{name}"

    def _open(self, path: str, mode: str = "rb", **options: object) -> object:
        cls = FlakyFileSystem
        cls.n_opened += 1
        if cls.opens:
            cls.opens -= 1
            raise OSError("connection refused")
        stream = super()._open(path, mode, **options)
        return stream if mode != "rb" or not cls.reads else _Breaking(stream.getvalue(), cls.reads.pop(0))


class _Breaking:
    """A stream that gives so many bytes."""

    closed = False

    def __init__(self, content: bytes, n_bytes: int) -> None:
        self.content, self.left, self.at = content, n_bytes, 0

    def read(self, n_bytes: int = -1) -> bytes:
        found = self.content[self.at :] if n_bytes < 0 else self.content[self.at : self.at + n_bytes]
        if len(found) > self.left:
            raise ConnectionResetError("reset by peer")
        self.left, self.at = self.left - len(found), self.at + len(found)
        return found

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = (0, self.at, len(self.content))[whence] + offset
        return self.at

    def tell(self) -> int:
        return self.at

    def readable(self) -> bool:
        return True

    seekable = readable

    def writable(self) -> bool:
        return False

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> _Breaking:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FlakyPath(MemoryPath):
    pass


@pytest.fixture
def flaky(monkeypatch):
    """A folder on a file system that fails on request, and waits that take no time."""
    monkeypatch.setattr(retries, "_retries", retries.RetryPolicy(minutes=0.5 / 60, first=1e-3))
    for module in (json_lines, parquet):
        monkeypatch.setattr(module, "READ_BYTES", 2_000)
    monkeypatch.setattr(parquet, "BUFFER_BYTES", 1_000)
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    register_implementation("flaky", FlakyPath, clobber=True)
    FlakyFileSystem.opens, FlakyFileSystem.reads, FlakyFileSystem.n_opened = 0, [], 0
    folder = UPath("flaky://flaky-test")
    yield folder
    folder.fs.rm(folder.path, recursive=True)


def stored(folder: UPath, name: str, tmp_path: Path) -> tuple[InputFile, list[str]]:
    texts = [f"text {i} {i * 7919 % 1_000_003}" for i in range(3_000)]
    if name == "a.parquet":
        write(tmp_path / name, texts, row_group_size=1_000)
    else:
        lines(tmp_path / name, *[{"text": text} for text in texts])
    (folder / name).write_bytes((tmp_path / name).read_bytes())
    return opened(str(folder / name)), texts


NAMES = ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("broken", [[0], [9_000], [9_000, 500, 12_000], [1_000] * 4], ids=str)
def test_a_connection_that_breaks_is_taken_up_where_it_broke_off(flaky, tmp_path, name, broken):
    file, texts = stored(flaky, name, tmp_path)
    FlakyFileSystem.reads, FlakyFileSystem.n_opened = list(broken), 0
    found = read_all(
        [file], [Chunk((Segment(0, 0, 700),)), Chunk((Segment(0, 700, 2_999),)), Chunk((Segment(0, 2_999, 3_000),))]
    )
    assert texts_of(found) == texts
    assert rows_of(found[1][0]) == list(range(2_299))
    assert FlakyFileSystem.n_opened > len(broken) and FlakyFileSystem.reads == []


@pytest.mark.parametrize("name", NAMES)
def test_opening_is_tried_again(flaky, tmp_path, name):
    file, texts = stored(flaky, name, tmp_path)
    FlakyFileSystem.opens = 3
    assert opened(str(flaky / name)) == file
    FlakyFileSystem.opens = 4
    assert one(file)[0] == texts
    assert FlakyFileSystem.opens == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_connection_that_stays_broken_is_named(flaky, tmp_path, name):
    file, _ = stored(flaky, name, tmp_path)
    FlakyFileSystem.reads = [2_500] * 100
    message = failure_of(file)
    assert name in message and "cannot be read to its end" in message and "reset by peer" in message
    FlakyFileSystem.reads, FlakyFileSystem.opens = [], 100
    with pytest.raises(InputError, match=f"{re.escape(name)}.*connection refused"):
        opened(str(flaky / name))


class WaitingFileSystem(FlakyFileSystem):
    """Counts how many files are being opened at once."""

    protocol = "waiting"
    together = most = 0
    lock = threading.Lock()

    def _open(self, path: str, mode: str = "rb", **options: object) -> object:
        cls = WaitingFileSystem
        with cls.lock:
            cls.together += 1
            cls.most = max(cls.most, cls.together)
        time.sleep(0.02)
        with cls.lock:
            cls.together -= 1
        return super()._open(path, mode, **options)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("waiting://", "memory://"))

    def unstrip_protocol(self, name: str) -> str:
        return f"waiting://{name}"


class WaitingPath(MemoryPath):
    pass


def test_small_files_of_a_chunk_are_opened_ahead_and_come_in_order(flaky, tmp_path):
    fsspec.register_implementation("waiting", WaitingFileSystem, clobber=True)
    register_implementation("waiting", WaitingPath, clobber=True)
    folder, files = UPath("waiting://flaky-test"), []
    for i in range(20):
        write(tmp_path / "a.parquet", [f"text {i} {k}" for k in range(3)])
        (folder / f"{i:02}.parquet").write_bytes((tmp_path / "a.parquet").read_bytes())
        files.append(opened(str(folder / f"{i:02}.parquet")))
    (folder / "07.parquet").write_bytes(b"PAR1")
    WaitingFileSystem.most = 0
    [(pieces, end)] = read_all(files, [Chunk(tuple(Segment(i, 0, 3) for i in range(20)))])
    assert WaitingFileSystem.most > 2
    texts = [text for piece in pieces for text in piece.texts.to_pylist()]
    assert texts == [f"text {i} {k}" for i in range(20) if i != 7 for k in range(3)]
    assert [failure.segment for failure in end.failures] == [Segment(7, 0, 3)]
    assert rows_of(pieces) == [row for row in range(60) if row // 3 != 7]


def test_json_lines_are_text_whatever_they_look_like(tmp_path):
    texts = ["2024-01-01", "1", "true", json.dumps({"text": "inner"})]
    file = opened(lines(tmp_path / "a.jsonl", *[{"text": text} for text in texts]))
    assert one(file) == (texts, [], 0)
