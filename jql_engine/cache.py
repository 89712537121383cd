"""The user's cache folder, and files in it that nobody else can have written."""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from jql_engine.errors import CacheError

LOCK_SECONDS = 0.5
OTHER_FOLDER = "XDG_CACHE_HOME, or for engines --engine-cache"


def cache_folder(name: str) -> Path:
    """$XDG_CACHE_HOME/jql-engine/NAME; where that is unset or relative, ~/.cache/jql-engine/NAME."""
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not root.is_absolute():
        try:
            root = Path.home() / ".cache"
        except RuntimeError as error:  # no HOME, and no such user
            raise CacheError(f"no folder for a cache: {error} Set XDG_CACHE_HOME or HOME") from error
    return root / "jql-engine" / name


def private_folder(folder: Path) -> Path:
    """`folder`, made with mode 0700 where it is missing; raises CacheError where others can write in it."""
    with _explained(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check(folder, folder.stat())
    return folder


def read_private(file: Path) -> bytes | None:
    """The content of a file in a private folder, None where there is none.

    Raises CacheError where somebody else can have written the file, or put it there.
    """
    with _explained(file), suppress(FileNotFoundError):
        _check(file.parent, file.parent.stat())
        with open(file, "rb", opener=_open_itself) as stream:
            _check(file, os.fstat(stream.fileno()))
            return stream.read()
    return None


def write_private(file: Path, content: Any) -> None:
    """Write a buffer beside its place in a private folder, with mode 0600, and rename it."""
    with _explained(file):
        descriptor, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=private_folder(file.parent))
        aside = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content)
            aside.replace(file)
        finally:
            aside.unlink(missing_ok=True)


@contextmanager
def locked(file: Path, waiting: Callable[[], object]) -> Iterator[None]:
    """Hold the lock `file` in a private folder; `waiting` is called once where another process holds it.

    The system gives it back when its holder ends, however that happens.
    """
    private_folder(file.parent)
    with _explained(file):
        descriptor = _open_itself(str(file), os.O_WRONLY | os.O_CREAT)
    with os.fdopen(descriptor, "wb") as lock:
        _check(file, os.fstat(lock.fileno()))
        if not _take(file, lock):
            waiting()
            while not _take(file, lock):
                time.sleep(LOCK_SECONDS)
        yield


def _take(file: Path, lock: IO[bytes]) -> bool:
    with _explained(file), suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _open_itself(path: str, flags: int) -> int:
    """Open a file and nothing that a link leads to; without waiting for the other end of a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)


def _check(path: Path, found: os.stat_result) -> None:
    """Raise CacheError where anybody but this user can have written what is at `path`."""
    others = stat.S_IMODE(found.st_mode) & (stat.S_IWGRP | stat.S_IWOTH)
    if found.st_uid != os.geteuid() or others:
        advice = "take the permission away (chmod go-w)" if found.st_uid == os.geteuid() else "take it over (chown)"
        raise CacheError(
            f"{path} belongs to user {found.st_uid} and has mode {stat.S_IMODE(found.st_mode):04o}: it must belong to "
            f"user {os.geteuid()}, who runs this, and nobody else may write it, since what is there is executed: "
            f"delete it, {advice}, or name another folder by {OTHER_FOLDER}"
        )


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """CacheError in place of the system's errors."""
    try:
        yield
    except OSError as error:
        raise CacheError(
            f"{path} in the cache cannot be read or written ({error.strerror}): name another folder by {OTHER_FOLDER}"
        ) from error
