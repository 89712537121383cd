from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from upath import UPath

from jql_engine.errors import EngineError
from jql_engine.files import retries
from jql_engine.files.location import is_remote, locate
from jql_engine.files.retries import RetryPolicy, retry, set_retries
from jql_engine.files.storage import (
    exists,
    list_files,
    open_parquet,
    open_read,
    remove_empty_folders,
    remove_file,
    remove_files,
)
from jql_engine.files.versions import modified, version_of
from jql_engine.files.writing import NO_LINKS, write, writing


@pytest.fixture
def remote():
    folder = UPath("memory://storage-test")
    yield folder
    if folder.fs.exists(folder.path):
        folder.fs.rm(folder.path, recursive=True)


class Disk(LocalFileSystem):
    """A remote file system with real folders and files that are seen while they are written, as FTP and HDFS are."""

    protocol = "disk"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(str(path).removeprefix("disk://"))

    def unstrip_protocol(self, name: str) -> str:
        return f"disk://{self._strip_protocol(name)}"


@pytest.fixture
def disk(tmp_path):
    fsspec.register_implementation("disk", Disk, clobber=True)
    return UPath(f"disk://{tmp_path}")


@pytest.fixture(params=["local", "remote", "disk"])
def folder(request, tmp_path):
    return tmp_path if request.param == "local" else request.getfixturevalue(request.param)


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """Every wait, on a clock that waiting alone moves on."""
    found: list[float] = []
    monkeypatch.setattr(retries, "time", SimpleNamespace(sleep=found.append, monotonic=lambda: sum(found)))
    return found


class Resetting(MemoryFileSystem):
    """Removes nothing the first time, and says where it fails that there is nothing, as fsspec does."""

    protocol = "resetting"
    failures = 0

    def rm_file(self, path: str) -> None:
        if type(self).failures:
            type(self).failures -= 1
            raise ConnectionResetError("reset by peer")
        super()._rm(path)

    def exists(self, path: str, **_: object) -> bool:
        return not type(self).failures and super().exists(path)


def test_a_removal_that_fails_is_tried_again(waits):
    fsspec.register_implementation("resetting", Resetting, clobber=True)
    file = UPath("resetting://storage-test/a")
    file.fs.pipe_file(file.path, b"x")
    Resetting.failures = 2
    remove_file(file)
    assert waits and not file.exists()
    remove_file(file)


def put(target, data: bytes | pa.Buffer, **options) -> None:
    write(target, pa.py_buffer(data), target.parent / ".aside.writing", **options)


def put_stream(target, data: bytes, **options) -> None:
    with writing(target, target.parent / ".aside.writing", **options) as stream:
        stream.write(data)


def names(folder) -> list[str]:
    return [name for _, name in list_files(folder)]


def test_a_path_stays_a_path_and_a_url_becomes_one(tmp_path):
    assert locate("a/b.parquet") == Path("a/b.parquet") and not is_remote(locate("a/b"))
    assert locate(tmp_path) is tmp_path
    with pytest.raises(EngineError, match=r"^s3://…@bucket/x names a user, which buckets have not"):
        locate("s3://AKIA:5e/cre7@bucket/x")
    assert locate(f"file://{tmp_path}") == tmp_path
    url = locate("memory://a/b.parquet")
    assert is_remote(url) and url.name == "b.parquet" and locate(url) is url


def test_an_unknown_file_system_is_an_error_that_names_the_url():
    with pytest.raises(EngineError, match="nosuch://x/y"):
        locate("nosuch://x/y")


def test_what_was_written_is_read(folder):
    target = folder / "a" / "b.bin"
    assert not exists(target)
    put(target, b"one")
    put(target, pa.py_buffer(b"three"))
    assert exists(target) and names(folder) == ["a/b.bin"]
    with open_read(target) as stream:
        assert stream.read() == b"three"
    assert version_of(target)[0] == 5


def test_the_version_changes_with_the_content(folder):
    target = folder / "a.bin"
    put(target, b"one")
    before = version_of(target)
    assert version_of(target) == before
    if isinstance(target, Path):
        os.utime(target, ns=(0, 0))
    else:
        put(target, b"two")
    assert version_of(target) != before


def test_a_file_appears_when_it_is_complete(folder, tmp_path):
    target = folder / "out" / "a.bin"
    with writing(target, folder / "parts" / "a.bin" / ".writing") as stream:
        stream.write(b"x" * 100_000)
        stream.flush()
        assert not exists(target)
    assert target.read_bytes() == b"x" * 100_000
    assert names(folder) == ["out/a.bin"]


def test_a_file_that_was_there_is_replaced_only_when_the_new_one_is_complete(folder):
    target = folder / "a.bin"
    put(target, b"old")
    with pytest.raises(ZeroDivisionError), writing(target, folder / ".writing") as stream:
        stream.write(b"half")
        stream.flush()
        raise ZeroDivisionError
    assert target.read_bytes() == b"old" and names(folder) == ["a.bin"]


@pytest.mark.parametrize("writes", [put, put_stream])
def test_a_file_that_must_not_be_there_is_created_and_never_replaced(folder, writes):
    target = folder / "out" / "a.bin"
    writes(target, b"first", replace=False)
    with pytest.raises(FileExistsError, match=r"a\.bin"):
        writes(target, b"second", replace=False)
    assert target.read_bytes() == b"first" and names(folder) == ["out/a.bin"]


def test_of_many_that_create_one_file_one_succeeds(tmp_path):
    def create(number: int) -> bool:
        start.wait()
        try:
            with writing(tmp_path / "a.bin", tmp_path / f".{number}.writing", replace=False) as stream:
                stream.write(b"%d" % number)
        except FileExistsError:
            return False
        return True

    start = threading.Barrier(16)
    with ThreadPoolExecutor(16) as pool:
        created = list(pool.map(create, range(16)))
    assert created.count(True) == 1
    assert (tmp_path / "a.bin").read_bytes() == b"%d" % created.index(True)
    assert names(tmp_path) == ["a.bin"]


def test_a_link_that_was_made_although_it_failed_is_ours(tmp_path, monkeypatch):
    """NFS sends a request again whose answer was lost, and finds that the name is taken."""
    real = os.link

    def answered_twice(source: Path, target: Path) -> None:
        real(source, target)
        real(source, target)

    monkeypatch.setattr(os, "link", answered_twice)
    put(tmp_path / "a", b"ours", replace=False)
    assert (tmp_path / "a").read_bytes() == b"ours" and names(tmp_path) == ["a"]
    with pytest.raises(FileExistsError):
        put(tmp_path / "a", b"late", replace=False)
    assert (tmp_path / "a").read_bytes() == b"ours" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("code", sorted(NO_LINKS), ids=errno.errorcode.get)
def test_a_file_system_without_links_has_files_created_too(tmp_path, monkeypatch, code):
    def unsupported(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", unsupported)
    put(tmp_path / "new" / "a", b"ours", replace=False)
    with pytest.raises(FileExistsError):
        put(tmp_path / "new" / "a", b"late", replace=False)
    assert (tmp_path / "new" / "a").read_bytes() == b"ours" and names(tmp_path) == ["new/a"]


@pytest.mark.parametrize("writes", [put, put_stream])
def test_no_remote_file_is_seen_half_written(disk, monkeypatch, writes):
    """Whatever is uploaded directly is seen as it grows; a target must not be."""
    seen, real_put, real_pipe = [], Disk.put_file, Disk.pipe_file

    def uploads(real):
        def upload(self, first, second, **options):
            seen.append(Path(first if real is real_pipe else second).name)
            return real(self, first, second, **options)

        return upload

    monkeypatch.setattr(Disk, "put_file", uploads(real_put))
    monkeypatch.setattr(Disk, "pipe_file", uploads(real_pipe))
    for content in (b"one", b"two"):
        writes(disk / "out" / "a.bin", content)
        assert (disk / "out" / "a.bin").read_bytes() == content
    assert seen == [".aside.writing"] * 2 and names(disk) == ["out/a.bin"]


def test_a_move_whose_answer_was_lost_is_not_made_twice(disk, monkeypatch, waits):
    real = Disk.mv

    def loses_its_answer(self, *arguments, **options):
        real(self, *arguments, **options)
        monkeypatch.setattr(Disk, "mv", real)
        raise OSError("reset")

    monkeypatch.setattr(Disk, "mv", loses_its_answer)
    put(disk / "a", b"ours", replace=False)
    assert (disk / "a").read_bytes() == b"ours" and len(waits) == 1


def test_nothing_is_left_in_the_temporary_folder(remote, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with writing(remote / "a.bin", remote / ".writing") as stream:
        stream.write(b"x")
    with pytest.raises(ZeroDivisionError), writing(remote / "b.bin", remote / ".writing"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == [] and names(remote) == ["a.bin"]


def test_a_folder_that_is_a_file_is_the_systems_error(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(OSError), writing(tmp_path / "a" / "b", tmp_path / ".writing"):
        pass


def test_parquet_is_read_where_it_lies(folder):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"x": range(10)}), sink, row_group_size=3)
    put(folder / "a.parquet", sink.getvalue())
    for buffer_size in (0, 16):
        with open_parquet(folder / "a.parquet", buffer_size) as file:
            assert file.metadata.num_row_groups == 4
            assert [row["x"] for batch in file.iter_batches(2) for row in batch.to_pylist()] == list(range(10))


def test_files_are_listed_from_the_inside_of_a_folder_in_order(folder):
    assert list_files(folder / "absent") == []
    for name in ("b", "a/z", "a/a/.x.writing", "ab"):
        put(folder / "in" / name, b"")
    put(folder / "in.side", b"")
    found = list_files(folder / "in")
    assert [name for _, name in found] == ["a/a/.x.writing", "a/z", "ab", "b"]
    assert all(exists(location) and location.name == name.rpartition("/")[2] for location, name in found)


def test_a_folder_that_others_remove_while_it_is_listed_is_passed_over(tmp_path, monkeypatch):
    for name in ("a/1", "gone/2", "z/3"):
        put(tmp_path / name, b"")
    real = os.scandir

    def removed_before(folder: object) -> object:
        if str(folder).endswith("gone"):
            shutil.rmtree(folder)
        return real(folder)

    monkeypatch.setattr(os, "scandir", removed_before)
    assert names(tmp_path) == ["a/1", "z/3"]


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path, monkeypatch):
    def broken(folder: Path) -> object:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "scandir", broken)
    with pytest.raises(OSError, match="Input/output error"):
        list_files(tmp_path)


def test_empty_folders_are_removed_and_others_stay(folder):
    root = folder / "parts"
    remove_empty_folders(root)  # that is not there
    put(root / "de" / "a.parquet" / "1", b"")
    if isinstance(root, Path):
        (root / "fr/x/b.parquet").mkdir(parents=True)
        (root / "de/b.parquet").mkdir()
    remove_empty_folders(root)
    assert names(root) == ["de/a.parquet/1"]
    if isinstance(root, Path):
        assert sorted(path.relative_to(root).as_posix() for path in root.rglob("*")) == [
            "de", "de/a.parquet", "de/a.parquet/1",
        ]  # fmt: skip
    remove_file(root / "de/a.parquet/1")
    remove_empty_folders(root)
    assert not exists(root)


def test_a_file_that_is_gone_can_be_removed(folder):
    put(folder / "a", b"")
    remove_file(folder / "a")
    remove_file(folder / "a")
    assert not exists(folder / "a")


def test_a_name_that_looks_like_a_pattern_removes_itself_alone(folder):
    for name in ("a", "*", "x[1]", "x1", "b/?", "b/c"):
        put(folder / name, b"")
    remove_files([folder / name for name in ("*", "x[1]", "b/?", "b/absent*")])
    assert names(folder) == ["a", "b/c", "x1"]


def test_the_time_of_a_change_is_told(folder):
    put(folder / "a", b"")
    assert abs(modified(folder / "a") - time.time()) < 60
    assert modified(folder / "absent") is None


class Flaky:
    """Fails so often, then answers."""

    def __init__(self, n_failures: int, error: Exception) -> None:
        self.left, self.error, self.calls = n_failures, error, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.left:
            self.left -= 1
            raise self.error
        return "answer"


def named(name: str, base: type[Exception] = Exception, **attributes: object) -> Exception:
    """An error of a library that need not be there."""
    return type(name, (base,), attributes)("x")


@pytest.mark.parametrize("error", [OSError("reset"), TimeoutError(), RuntimeError("503"), ConnectionError()], ids=repr)
def test_what_may_pass_is_tried_again_after_longer_and_longer(remote, waits, error):
    longest = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 32.0)
    assert retry(remote, Flaky(len(longest), error)) == "answer"
    for wait, most in zip(waits, longest, strict=True):
        assert most / 2 <= wait <= most


@pytest.mark.parametrize("minutes", [0, 0.5, 10, 120])
def test_a_server_is_asked_for_as_long_as_the_policy_says(remote, waits, monkeypatch, minutes):
    monkeypatch.setattr(retries, "_retries", retries._retries)  # as it was, afterwards
    set_retries(RetryPolicy(minutes))
    flaky = Flaky(10_000, OSError("down"))
    with pytest.raises(OSError, match="down"):
        retry(remote, flaky)
    assert sum(waits) == pytest.approx(60 * minutes) and flaky.calls == len(waits) + 1
    assert len(waits) <= 6 + 4 * minutes


@pytest.mark.parametrize(
    "error",
    [
        ValueError("half an answer"),
        named("ClientResponseError", status=503),
        named("HfHubHTTPError", OSError, response=SimpleNamespace(status_code=500)),
        named("ClientError", response={"Error": {}}),
    ],
    ids=repr,
)
def test_what_a_server_may_get_over_is_tried_again(remote, waits, error):
    assert retry(remote, Flaky(1, error)) == "answer" and len(waits) == 1


def test_every_wait_is_a_line_on_stderr(remote, waits, capsys):
    retry(remote / "a.parquet", Flaky(2, TimeoutError("no answer\nfrom there")))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    for line, wait in zip(said, waits, strict=True):
        assert line == f"jql: {remote / 'a.parquet'}: TimeoutError: no answer; again in {wait:.2g} s"


def test_a_wait_shows_no_secret(waits, capsys):
    retry(UPath("http://127.0.0.1/a?sig=secret"), Flaky(1, OSError("http://me:secret@h/b?sig=secret: no")))
    said = capsys.readouterr().err
    assert said.startswith("jql: http://127.0.0.1/a?…: OSError: http://…@h/b?…: no; again in ")


def test_an_error_without_words_is_named(remote, waits, capsys):
    retry(remote, Flaky(1, TimeoutError()))
    assert f"{remote}: TimeoutError; again in " in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        *(FileNotFoundError(), FileExistsError(), PermissionError(), pa.ArrowInvalid("x"), EngineError("x")),
        *(TypeError("x"), AttributeError("x"), AssertionError("x"), pa.ArrowTypeError("x")),
        *(named("NoCredentialsError"), named("GatedRepoError", OSError), named("RepositoryNotFoundError", OSError)),
        type("Inherited", (type(named("GatedRepoError")),), {})(),
        named("ClientResponseError", status=401),
        named("HfHubHTTPError", OSError, response=SimpleNamespace(status_code=403)),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_waiting_does_not_change_is_raised_at_once(remote, waits, error):
    flaky = Flaky(1, error)
    with pytest.raises(type(error)):
        retry(remote, flaky)
    assert (flaky.calls, waits) == (1, [])


def test_the_local_disk_is_asked_once(tmp_path, waits):
    flaky = Flaky(1, OSError("broken"))
    with pytest.raises(OSError, match="broken"):
        retry(tmp_path, flaky)
    assert (flaky.calls, waits) == (1, [])


@pytest.mark.parametrize("call", ["pipe_file", "put_file"])
def test_a_write_is_tried_again(remote, waits, monkeypatch, call):
    fs, failures = fsspec.filesystem("memory"), [OSError("reset"), OSError("reset")]
    real = getattr(fs, call)

    def fails_twice(*arguments: object, **options: object) -> object:
        if failures:
            raise failures.pop()
        return real(*arguments, **options)

    monkeypatch.setattr(type(fs), call, staticmethod(fails_twice))
    if call == "pipe_file":
        put(remote / "a", b"content")
    else:
        with writing(remote / "a", remote / ".writing") as stream:
            stream.write(b"content")
    assert (remote / "a").read_bytes() == b"content" and len(waits) == 2
