from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from upath import UPath

from jql_engine.errors import EngineError, InputError
from jql_engine.files import inputs as dataset
from jql_engine.files import retries
from jql_engine.files.chunks import Chunk, Segment, split
from jql_engine.files.formats import open_file
from jql_engine.files.inputs import Columns, InputFile, Listing, SourceFile, find_files
from jql_engine.files.versions import version_from, version_of
from jql_engine.job.check import with_usable_names
from jql_engine.names import RelativeName
from tests.inputs import damage, not_utf8

__all__ = ["damage", "not_utf8", "write"]  # used by other tests

CHUNK_ROWS, CHUNK_BYTES = 20_000, 4 << 20


def write(path: Path, texts: list[str | None] | pa.Array, row_group_size: int | None = None, **columns: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts, **columns}), path, row_group_size=row_group_size)
    return path


def source(path: Path | UPath) -> SourceFile:
    [found] = find_files([str(path)]).files
    return found


def opened(path: Path | UPath, id_column: str | None = None) -> InputFile:
    return open_file(source(path), Columns("text", id_column))


def footer(*groups: tuple[int, int]) -> InputFile:
    """What open_file would find in a file of these row groups of (rows, bytes of text)."""
    schema = pa.schema([("text", pa.string())])
    rows, sizes = zip(*groups, strict=True) if groups else ((), ())
    path = Path("x.parquet")
    return InputFile(SourceFile(path, RelativeName(path.name), 0, ""), Columns(), schema, rows, sizes)


def chunks_of(*files: InputFile) -> list[Chunk]:
    return list(split(files, CHUNK_ROWS, CHUNK_BYTES))


def places(found: Listing) -> list[tuple[Path, Path]]:
    assert found.refused == ()
    return [(file.location, Path(file.relative.text)) for file in found.files]


def test_a_file_gives_its_name(tmp_path):
    path = write(tmp_path / "deep" / "a.parquet", ["x"])
    assert places(find_files([str(path)])) == [(path, Path("a.parquet"))]


def test_a_folder_gives_its_files_at_their_paths_inside_it(tmp_path):
    names = ["b.parquet", "a/z.parquet", "a/a.parquet", "lang=de/year=2024/part-0.parquet"]
    for name in [*names, ".hidden.parquet", "_part.parquet", ".git/c.parquet", "_temporary/0/d.parquet"]:
        write(tmp_path / name, ["x"])
    (tmp_path / "a" / "notes.txt").touch()
    assert places(find_files([str(tmp_path)])) == [(tmp_path / name, Path(name)) for name in sorted(names)]


def test_a_folder_below_a_hidden_one_can_be_given(tmp_path):
    path = write(tmp_path / ".cache" / "_in" / "a.parquet", ["x"])
    assert places(find_files([str(path.parent)])) == [(path, Path("a.parquet"))]


def test_a_folder_that_is_called_like_a_file_is_a_folder(tmp_path):
    path = write(tmp_path / "spark.parquet" / "part-0.parquet", ["x"])
    assert places(find_files([str(tmp_path)])) == [(path, Path("spark.parquet/part-0.parquet"))]


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
    found = places(find_files([str(tmp_path / pattern)]))
    assert [relative.as_posix() for _, relative in found] == expected
    assert all(path.is_file() and path.is_relative_to(tmp_path) for path, _ in found)
    monkeypatch.chdir(tmp_path)
    assert [(tmp_path / path, relative) for path, relative in places(find_files([pattern]))] == found


def test_a_file_url_is_the_path_itself(tmp_path):
    path = write(tmp_path / "a.parquet", ["x"])
    for place in (path, tmp_path, tmp_path / "*.parquet"):
        assert places(find_files([f"file://{place}"])) == [(path, Path("a.parquet"))]


def test_a_file_with_a_wildcard_in_its_name_is_itself(tmp_path):
    path = write(tmp_path / "a[1].parquet", ["x"])
    assert places(find_files([str(path)])) == [(path, Path("a[1].parquet"))]


def test_a_file_given_twice_is_scored_once(tmp_path):
    path = write(tmp_path / "a.parquet", ["x"])
    assert places(find_files([str(path), str(tmp_path), str(tmp_path / "*.parquet")])) == [(path, Path("a.parquet"))]


def test_files_are_looked_up_only_where_two_have_one_output(tmp_path, monkeypatch):
    looked_up = []
    real = dataset.identity
    monkeypatch.setattr(dataset, "identity", lambda location: looked_up.append(location) or real(location))
    paths = [write(tmp_path / f"{number}.parquet", ["x"]) for number in range(5)]
    assert len(find_files([str(tmp_path)]).files) == 5 and looked_up == []
    assert len(find_files([str(tmp_path), str(paths[0])]).files) == 5 and looked_up == [paths[0]] * 2


def test_two_files_that_would_be_written_to_one_are_an_error(tmp_path):
    first, second = (write(tmp_path / name / "a.parquet", ["x"]) for name in ("one", "two"))
    with pytest.raises(InputError) as caught:
        find_files([str(first), str(second.parent)])
    assert str(first) in str(caught.value) and str(second) in str(caught.value)


def test_a_source_knows_its_size_version_and_format(tmp_path):
    path = write(tmp_path / "a.parquet", ["x"])
    [found] = find_files([str(path)]).files
    assert (found.size, found.version, found.format) == (*version_of(path), "parquet")
    assert found.size == path.stat().st_size


JSON_LINES = ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.json.gz", "e.json.zst"]


def test_a_folder_gives_json_lines_too_and_each_becomes_parquet(tmp_path):
    for name in ["z.parquet", *JSON_LINES, "notes.json", "log.gz", ".hidden.jsonl", "_tmp/x.jsonl.gz"]:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    found = find_files([str(tmp_path / "in")]).files
    assert [file.relative.text for file in found] == [f"{name}.parquet" for name in "abcdez"]
    assert [file.location.name for file in found] == [*JSON_LINES, "z.parquet"]
    assert [file.format for file in found] == ["jsonl"] * 5 + ["parquet"]


def test_the_same_file_is_not_scored_twice(tmp_path):
    for name in ("a.parquet", "sub/b.parquet"):
        write(tmp_path / name, ["x"])
    with pytest.raises(InputError, match=r"b\.parquet is given twice, as sub/b\.parquet and as b\.parquet"):
        find_files([str(tmp_path), str(tmp_path / "sub")])
    assert len(find_files([str(tmp_path), str(tmp_path / "a.parquet")]).files) == 2


def test_scores_have_names_that_a_search_finds(tmp_path):
    """Whatever was named or matched: what is scored must not be left out of what follows."""
    (tmp_path / "in").mkdir()
    for name in ("A.PARQUET", "b.JSONL.GZ", "part-0", "_c.parquet", ".d.parquet", f"{'n' * 249}.jsonl"):
        (tmp_path / "in" / name).touch()
    listed = find_files([str(file) for file in sorted((tmp_path / "in").iterdir())])
    assert len(listed.files) == 6, "who only reads takes what is named"
    usable = with_usable_names(listed, tmp_path / "out")
    names = sorted(file.relative.text for file in usable.files)
    assert names == ["A.PARQUET", "b.parquet", "part-0.parquet"]
    reasons = [one.reason.partition(" would be written to ")[2] for one in usable.refused]
    assert [reason.split(",")[0] for reason in reasons] == ["a hidden name"] * 2 + ["a name of over 255 bytes"]
    (tmp_path / "out").mkdir()
    for name in names:
        (tmp_path / "out" / name).touch()
    assert sorted(file.relative.text for file in find_files([str(tmp_path / "out")]).files) == names


def test_only_the_suffix_of_a_name_changes(tmp_path):
    for name in ["v1.2.jsonl.gz", "x.jsonl.d/y.jsonl", "part-0"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_files([str(tmp_path), str(tmp_path / "part-0")]).files
    assert [file.relative.text for file in found] == ["v1.2.parquet", "x.jsonl.d/y.parquet", "part-0.parquet"]
    assert found[2].format == "parquet"


def test_two_formats_of_one_name_are_an_error(tmp_path):
    (tmp_path / "a.jsonl").touch()
    write(tmp_path / "a.parquet", ["x"])
    with pytest.raises(InputError) as caught:
        find_files([str(tmp_path)])
    assert all(str(tmp_path / name) in str(caught.value) for name in ("a.jsonl", "a.parquet"))


@pytest.fixture
def remote():
    """A folder on a file system that is not the operating system's."""
    fs = fsspec.filesystem("memory")
    shown, hidden = ["b.parquet", "a.jsonl.gz", "de/c.parquet", "de/x/d.parquet"], [".git/e.parquet", "_old/f.jsonl"]
    for name in [*shown, *hidden, "n.txt"]:
        fs.pipe_file(f"/corpus/{name}", name.encode())
    yield "memory://corpus"
    fs.rm("/corpus", recursive=True)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", ["a.parquet", "b.parquet", "de/c.parquet", "de/x/d.parquet"]),
        ("/", ["a.parquet", "b.parquet", "de/c.parquet", "de/x/d.parquet"]),
        ("/de", ["c.parquet", "x/d.parquet"]),
        ("/b.parquet", ["b.parquet"]),
        ("/n.txt", ["n.txt.parquet"]),
        ("/a.jsonl.gz", ["a.parquet"]),
        ("/*.parquet", ["b.parquet"]),
        ("/d?/*.parquet", ["de/c.parquet"]),
        ("/de/**/*.parquet", ["c.parquet", "x/d.parquet"]),
    ],
)
def test_a_url_gives_files_folders_and_globs(remote, given, expected):
    found = find_files([remote + given]).files
    assert [file.relative.text for file in found] == expected
    for file in found:
        assert file.location.read_bytes().decode().endswith(file.location.name)
        assert file.size == version_of(file.location)[0] and file.version != "unknown"


def test_a_remote_file_given_twice_is_scored_once(remote):
    assert len(find_files([f"{remote}/b.parquet", f"{remote}/*.parquet"]).files) == 1


def test_a_remote_file_and_a_local_one_that_would_be_written_to_one_are_an_error(remote, tmp_path):
    path = write(tmp_path / "b.parquet", ["x"])
    with pytest.raises(InputError, match=r"memory://.*corpus/b\.parquet and .*/b\.parquet would both be written"):
        find_files([f"{remote}/b.parquet", str(path)])


@pytest.mark.parametrize("given", ["/absent", "/absent.parquet", "/x*.parquet", "/de/x/y/"])
def test_a_url_where_nothing_is_found_is_named(remote, given):
    with pytest.raises(InputError, match=re.escape(remote + given)):
        find_files([remote + given])


def test_a_url_of_an_unknown_file_system_is_named():
    with pytest.raises(EngineError, match="s4://bucket/x cannot be used"):
        find_files(["s4://bucket/x"])


@pytest.mark.parametrize(
    ("given", "message"),
    [("absent.parquet", "does not exist"), ("*.parquet", "matches no file"), ("empty", "holds no file that ends in")],
)
def test_where_nothing_is_found_the_input_is_named(tmp_path, given, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=f"{re.escape(str(tmp_path / given))}.*{re.escape(message)}"):
        find_files([str(tmp_path / given)])


def test_links_are_followed(tmp_path):
    write(tmp_path / "elsewhere" / "deep" / "a.parquet", ["x"])
    write(tmp_path / "b.parquet", ["x"])
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "c.parquet").symlink_to(tmp_path / "b.parquet")
    expected = [Path("c.parquet"), Path("linked/deep/a.parquet")]
    for asked in (folder, folder / "**/*.parquet", folder / "**"):
        assert [relative for _, relative in places(find_files([str(asked)]))] == expected
    assert [relative for _, relative in places(find_files([str(folder / "*/deep/*")]))] == expected[1:]


def test_a_folder_under_two_names_is_two_folders(tmp_path):
    write(tmp_path / "in/a/x.parquet", {"text": ["a"]})
    (tmp_path / "in/b").symlink_to("a")
    assert [file.relative.text for file in find_files([str(tmp_path / "in")]).files] == ["a/x.parquet", "b/x.parquet"]


def test_folders_that_all_link_to_each_other_are_an_error_soon(tmp_path):
    for i in range(12):
        write(tmp_path / f"in/{i}/x.parquet", {"text": ["a"]})
        for j in range(12):
            (tmp_path / f"in/{i}/to{j}").symlink_to(f"../{j}")
    with pytest.raises(InputError, match="is a folder that more than 64 ways lead to"):
        find_files([str(tmp_path / "in")])


def test_a_loop_of_links_ends(tmp_path):
    write(tmp_path / "in" / "a" / "x.parquet", ["x"])
    (tmp_path / "in" / "a" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "here").symlink_to(".")
    for asked in ("in", "in/**/*.parquet"):
        assert [relative for _, relative in places(find_files([str(tmp_path / asked)]))] == [Path("a/x.parquet")]
    found = places(find_files([str(tmp_path / "in/*/up/a/*.parquet")]))  # a way that ends leads through a loop as well
    assert [relative for _, relative in found] == [Path("a/up/a/x.parquet")]


NO_LISTING = """
import os, sys
from jql_engine.files.inputs import find_files
from jql_engine.errors import InputError
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
for given in sys.argv[1:]:
    try:
        print(len(find_files([given]).files))
    except InputError as error:
        print(error)
"""


@pytest.mark.parametrize("mode", [0o000, 0o444], ids=oct)  # nothing; names, and nothing about them
def test_a_folder_that_may_not_be_listed_is_an_error(tmp_path, mode):
    write(tmp_path / "in" / "a.parquet", ["x"])
    write(tmp_path / "in" / "closed" / "b.parquet", ["x"])
    for parent in (tmp_path, *tmp_path.parents[:-1]):
        if parent.stat().st_mode & 0o077 == 0 and parent.is_relative_to(tempfile.gettempdir()):
            parent.chmod(0o755)
    (tmp_path / "in" / "closed").chmod(mode)
    try:
        given = [str(tmp_path / name) for name in ("in", "in/**/*.parquet", "in/*/*", "in/*.parquet", "in/closed/x")]
        done = subprocess.run([sys.executable, "-c", NO_LISTING, *given], capture_output=True, text=True, check=True)
    finally:
        (tmp_path / "in" / "closed").chmod(0o755)
    *errors, count, single = done.stdout.splitlines()
    assert len(errors) == 3 and all(re.search("in/closed.* cannot be listed: Permission denied", e) for e in errors)
    assert count == "1" and "Permission denied" in single


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES], ids=errno.errorcode.get)
@pytest.mark.parametrize("given", ["", "**/*.parquet", "*/*.parquet"])
def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch, code, given):
    write(tmp_path / "a.parquet", ["x"])
    write(tmp_path / "bad" / "b.parquet", ["x"])
    real = os.scandir

    def scandir(folder):
        if Path(folder).name == "bad":
            raise OSError(code, os.strerror(code), str(folder))
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match=f"{re.escape(str(tmp_path / 'bad'))} cannot be listed: {os.strerror(code)}"):
        find_files([str(tmp_path / given)])


def refused(listing: Listing) -> dict[str, str]:
    return {one.file: one.reason for one in listing.refused}


def test_what_is_no_file_is_refused_by_name_and_the_others_are_found(tmp_path):
    good = write(tmp_path / "good.parquet", ["x"])
    (tmp_path / "gone.parquet").symlink_to("nothing")
    (tmp_path / "unmounted").symlink_to("nothing")  # it may have been a folder of inputs
    (tmp_path / "self.parquet").symlink_to("self.parquet")
    (tmp_path / "v1.0").symlink_to("good.parquet/v1.0")  # and so may this
    os.mkfifo(tmp_path / "pipe.parquet")
    os.mkfifo(tmp_path / "pipe.txt")
    for name in (".#lock", "notes.txt", "README.md", "a.tar.gz"):  # no names of inputs, nor of folders
        (tmp_path / name).symlink_to("nothing")
    found = find_files([str(tmp_path)])
    assert [file.location for file in found.files] == [good]
    links, pipe = ("gone.parquet", "self.parquet", "unmounted", "v1.0"), str(tmp_path / "pipe.parquet")
    assert refused(found).keys() == {*(str(tmp_path / name) for name in links), pipe}
    for file, reason in refused(found).items():
        assert (
            reason.startswith(file) and ("neither a file nor a folder" if file == pipe else "link to nothing") in reason
        )
    named = refused(find_files([str(tmp_path / "*.parquet")])).keys()
    assert named == refused(found).keys() - {f"{tmp_path}/unmounted", f"{tmp_path}/v1.0"}
    assert refused(find_files([str(tmp_path / "**/*.parquet")])).keys() == refused(found).keys()


class Links(MemoryFileSystem):
    """Empty files stand for links to nothing, as the file system of SFTP tells of them."""

    protocol = "links"
    store: ClassVar[dict[str, object]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("links://").strip("/")

    def ls(self, path, detail=True, **options):
        found = super().ls(path, detail=True, **options)
        return [{**one, "type": one["type"] if one["size"] or one["type"] == "directory" else "link"} for one in found]

    def info(self, path, **options):
        found = super().info(path, **options)
        if found["type"] == "file" and not found["size"]:
            raise FileNotFoundError(path)
        return found


def test_of_remote_links_to_nothing_those_are_refused_that_may_hide_files():
    fsspec.register_implementation("links", Links, clobber=True)
    fs = fsspec.filesystem("links")
    for name in ("gone.parquet", "unmounted", "v1.0", "notes.txt"):
        fs.pipe_file(f"/corpus/{name}", b"")
    fs.pipe_file("/corpus/a.parquet", b"x")
    found = find_files(["links://corpus"])
    assert [file.relative.text for file in found.files] == ["a.parquet"]
    assert {file.rpartition("/")[2] for file in refused(found)} == {"gone.parquet", "unmounted", "v1.0"}


def test_a_name_that_is_not_utf8_is_refused_and_can_be_printed(tmp_path):
    good = write(tmp_path / "good.parquet", ["x"])
    for name in (b"\xe9.parquet", b"caf\xe9/inside.parquet"):
        place = Path(os.fsdecode(bytes(tmp_path) + b"/" + name))
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(good.read_bytes())
    for asked in (tmp_path, tmp_path / "**/*.parquet"):
        found = find_files([str(asked)])
        assert [file.location for file in found.files] == [good]
        assert refused(found).keys() == {f"{tmp_path}/\\udce9.parquet", f"{tmp_path}/caf\\udce9/inside.parquet"}
        json.dumps([asdict(one) for one in found.refused], ensure_ascii=False).encode()
    with pytest.raises(InputError, match="not UTF-8"):
        find_files([os.fsdecode(bytes(tmp_path) + b"/caf\xe9")])


@pytest.mark.parametrize(
    "names", [("a.jsonl", "a.parquet/part-0.parquet"), ("a.parquet/b.parquet/c.parquet", "a.jsonl")]
)
def test_an_output_that_would_be_a_folder_of_another_is_an_error(tmp_path, names):
    for name in names:
        write(tmp_path / "in" / name, ["x"])
    for asked in ([tmp_path / "in"], [tmp_path / "in" / "a.jsonl", tmp_path / "in"]):
        with pytest.raises(InputError, match="folder of that name") as caught:
            find_files([str(one) for one in asked])
        assert all(str(tmp_path / "in" / name) in str(caught.value) for name in names)


class ShutFolder(MemoryFileSystem):
    """One of its folders cannot be listed, and fsspec's find and glob do not say so."""

    protocol = "shut"
    store: ClassVar[dict[str, object]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    error: ClassVar[Exception] = PermissionError("not yours")

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("shut://").strip("/")

    def ls(self, path, detail=True, **options):
        if path.rstrip("/").endswith("/bad"):
            raise self.error
        return super().ls(path, detail=detail, **options)


@pytest.fixture
def shut(monkeypatch):
    fsspec.register_implementation("shut", ShutFolder, clobber=True)
    monkeypatch.setattr(retries, "_retries", retries.RetryPolicy(minutes=0.02 / 60, first=1e-3))
    fs = fsspec.filesystem("shut")
    for name in ("good/a.parquet", "good/bad/b.parquet", "top.parquet"):
        fs.pipe_file(f"/corpus/{name}", b"x")
    yield "shut://corpus"
    ShutFolder.store.clear()


@pytest.mark.parametrize("error", [PermissionError("not yours"), OSError("reset"), FileNotFoundError("gone")], ids=repr)
def test_a_remote_folder_that_cannot_be_listed_is_an_error(shut, monkeypatch, error):
    monkeypatch.setattr(ShutFolder, "error", error)
    for asked in ("", "/**/*.parquet", "/*/bad/*.parquet", "/*/*/*"):
        with pytest.raises(InputError, match=re.escape(f"{error}")):
            find_files([shut + asked])
    for asked, name in (("/*.parquet", "top.parquet"), ("/good/*.parquet", "a.parquet")):
        assert [file.relative.text for file in find_files([shut + asked]).files] == [name]


@pytest.mark.parametrize(("told", "traceable"), [({}, False), ({"ETag": "x"}, True), ({"modify": "2024"}, True)])
def test_a_source_that_tells_neither_tag_nor_time_is_not_traceable(tmp_path, told, traceable):
    size, version = version_from({"size": 7, **told})
    assert (size, SourceFile(tmp_path, RelativeName("a"), size, version).is_traceable) == (7, traceable)
    assert source(write(tmp_path / "a.parquet", ["x"])).is_traceable


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
    assert file.columns.id == expected


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
    for segment in (segment for chunk in chunks_of(*files) for segment in chunk.segments):
        assert segment.start == reached[segment.file]
        assert segment.stop > segment.start or files[segment.file].n_rows == 0
        reached[segment.file] = segment.stop
        seen.append(segment.file)
    assert reached == [file.n_rows for file in files]
    assert seen == sorted(seen) and set(seen) == set(range(len(files)))


@given(st.lists(FILE, max_size=8))
@settings(deadline=None, max_examples=80)
def test_a_chunk_is_bounded_and_small_files_are_joined_as_long_as_they_fit(files):
    chunks = chunks_of(*files)
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
    chunks = chunks_of(footer((40_001, 100)))
    assert [chunk.n_docs for chunk in chunks] == [13_333, 13_334, 13_334]


def test_long_texts_are_cut_by_their_size():
    chunks = chunks_of(footer((100, 5 * CHUNK_BYTES)))
    assert [chunk.n_docs for chunk in chunks] == [20] * 5


def test_a_text_larger_than_a_chunk_is_a_chunk():
    assert [chunk.n_docs for chunk in chunks_of(footer((2, 9 * CHUNK_BYTES)))] == [1, 1]


def test_small_row_groups_are_joined():
    groups = [(1_000, 10_000)] * 45
    assert [chunk.n_docs for chunk in chunks_of(footer(*groups))] == [20_000, 20_000, 5_000]


def test_small_files_are_joined_empty_ones_included():
    files = [footer((3, 9)), footer(), footer((0, 0)), footer((4, 9), (5, 9))]
    assert chunks_of(*files) == [Chunk((Segment(0, 0, 3), Segment(1, 0, 0), Segment(2, 0, 0), Segment(3, 0, 9)))]


def test_small_files_of_long_texts_are_joined_up_to_a_chunk_of_text():
    files = [footer((10, CHUNK_BYTES // 2))] * 3
    assert [chunk.n_docs for chunk in chunks_of(*files)] == [20, 10]


def test_no_file_gives_no_chunk():
    assert chunks_of() == []


@given(FILE.filter(lambda file: file.n_rows), st.data())
@settings(deadline=None, max_examples=100)
def test_the_first_rows_of_a_file_are_its_row_groups_up_to_there(file, data):
    n_rows = data.draw(st.integers(1, file.n_rows))
    first = file.first(n_rows)
    assert first.n_rows == first.limit == n_rows
    assert len(first.group_bytes) == len(first.group_rows)
    group, before = file.group_of(n_rows)
    assert first.group_rows == (*file.group_rows[:group], *([n_rows - before] if n_rows > before else []))


@given(FILE, st.data())
@settings(deadline=None, max_examples=100)
def test_the_group_of_a_row_is_where_it_lies(file, data):
    row = data.draw(st.integers(0, file.n_rows))
    group, before = file.group_of(row)
    assert before == sum(file.group_rows[:group]) <= row
    assert row < before + file.group_rows[group] if row < file.n_rows else group == len(file.group_rows)
