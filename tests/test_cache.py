from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from jql_engine.cache import cache_folder, locked, private_folder, read_private, write_private
from jql_engine.errors import CacheError

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def refuses(function, *arguments):
    with pytest.raises(CacheError) as raised:
        function(*arguments)
    return str(raised.value)


@pytest.fixture(params=[0o000, 0o002, 0o022, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.fixture
def folder(tmp_path):
    return private_folder(tmp_path / "cache")


@pytest.mark.parametrize(("variable", "root"), [("/x", "/x"), ("", "/home/me/.cache"), ("x", "/home/me/.cache")])
def test_the_cache_is_where_the_xdg_specification_says(monkeypatch, variable, root):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", variable)
    assert cache_folder("engines") == Path(root) / "jql-engine" / "engines"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("engines") == Path("/home/me/.cache/jql-engine/engines")


def test_the_folder_and_its_files_are_the_users_alone(umask, tmp_path):
    file = tmp_path / "new" / "engines" / "file"
    write_private(file, b"content")
    assert (mode(file.parent), mode(file)) == (0o700, 0o600)
    assert read_private(file) == b"content"
    assert list(file.parent.iterdir()) == [file]


def test_a_file_is_replaced_whole(folder):
    for content in (b"old and long", b"new"):
        write_private(folder / "file", content)
    assert read_private(folder / "file") == b"new"


@pytest.mark.parametrize("path", ["cache/file", "absent/file"])
def test_a_file_that_is_not_there_is_none(folder, path):
    assert read_private(folder.parent / path) is None
    assert not (folder.parent / "absent").exists()


@pytest.mark.parametrize("permissions", [0o770, 0o702, 0o1777])
def test_a_folder_that_others_can_write_is_neither_read_nor_written(folder, permissions):
    write_private(folder / "file", b"planted")
    folder.chmod(permissions)
    for message in (
        refuses(private_folder, folder),
        refuses(read_private, folder / "file"),
        refuses(write_private, folder / "file", b"x"),
        refuses(locked(folder / "lock", print).__enter__),
    ):
        assert f"{folder} belongs to user {os.geteuid()} and has mode {permissions:04o}" in message
        assert (
            "chmod go-w" in message
            and "name another folder by XDG_CACHE_HOME, or for engines --engine-cache" in message
        )
    assert (folder / "file").read_bytes() == b"planted" and not (folder / "lock").exists()


@pytest.mark.parametrize("permissions", [0o755, 0o750, 0o500])
def test_a_folder_that_others_can_only_read_is_the_users(folder, permissions):
    write_private(folder / "file", b"content")
    folder.chmod(permissions)
    assert private_folder(folder) == folder and read_private(folder / "file") == b"content"


@as_root
def test_a_folder_of_another_user_is_refused(folder):
    os.chown(folder, NOBODY, -1)
    assert f"{folder} belongs to user {NOBODY} and has mode 0700" in refuses(private_folder, folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root owns that folder")
def test_a_folder_of_root_is_refused():
    assert "/usr belongs to user" in refuses(private_folder, Path("/usr"))


@pytest.mark.parametrize("permissions", [0o620, 0o602])
def test_a_file_that_others_can_write_is_refused(folder, permissions):
    write_private(folder / "file", b"x")
    (folder / "file").chmod(permissions)
    assert f"{folder / 'file'} belongs to user" in refuses(read_private, folder / "file")


@as_root
def test_a_file_of_another_user_is_refused(folder):
    write_private(folder / "file", b"planted")
    os.chown(folder / "file", NOBODY, -1)
    assert f"{folder / 'file'} belongs to user {NOBODY}" in refuses(read_private, folder / "file")
    refuses(locked(folder / "file", print).__enter__)


@pytest.mark.parametrize("target", ["here", "nowhere"])
def test_a_link_in_place_of_a_file_is_not_followed(folder, tmp_path, target):
    (tmp_path / "here").write_bytes(b"planted")
    (folder / "file").symlink_to(tmp_path / target)
    assert str(folder / "file") in refuses(read_private, folder / "file")
    refuses(locked(folder / "file", print).__enter__)
    write_private(folder / "file", b"content")
    assert read_private(folder / "file") == b"content" and not (folder / "file").is_symlink()
    assert (tmp_path / "here").read_bytes() == b"planted" and not (tmp_path / "nowhere").exists()


def test_a_folder_in_place_of_a_file_is_named(folder):
    (folder / "file").mkdir()
    assert str(folder / "file") in refuses(read_private, folder / "file")
    assert str(folder / "file") in refuses(write_private, folder / "file", b"x")
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_a_pipe_in_place_of_a_file_is_not_waited_for(folder):
    os.mkfifo(folder / "file", 0o600)
    assert read_private(folder / "file") == b""


@pytest.mark.parametrize("blocked", ["a file in its place", "read-only"])
def test_a_folder_that_cannot_be_written_names_the_option_for_another(tmp_path, blocked):
    if blocked == "read-only":
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
        tmp_path.chmod(0o555)
    else:
        (tmp_path / "cache").touch()
    for function in (lambda file: write_private(file, b"x"), lambda file: locked(file, print).__enter__()):
        message = refuses(function, tmp_path / "cache" / "file")
        assert (
            "cannot be read or written" in message
            and "name another folder by XDG_CACHE_HOME, or for engines --engine-cache" in message
        )


def test_the_lock_of_a_process_that_was_killed_is_free(folder):
    lock, waits = folder / "lock", []
    code = (
        f"import fcntl, time; file = open({str(lock)!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with lock.open("w") as stream, pytest.raises(BlockingIOError):
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with locked(lock, lambda: waits.append(holder.kill())):
        assert len(waits) == 1
    holder.wait()
