"""A file appears under its name complete or not at all.

Locally it is written aside, synced and renamed; to an object store it is uploaded in one request whose completion makes
it visible; elsewhere it is uploaded aside and moved.
"""

from __future__ import annotations

import errno
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
from upath import UPath

from jql_engine.errors import EngineError, OutputError
from jql_engine.files.location import OBJECT_STORES, Location, is_remote
from jql_engine.files.retries import T, retry
from jql_engine.files.storage import REMOTE_BLOCK, open_read, remove_existing, remove_file
from jql_engine.files.versions import version_of

# What a store answers where a file that must not exist does; fsspec makes a FileExistsError of most of these.
CONDITION_FAILED = {"PreconditionFailed", "412"}
# Of a file system without hard links, or one that is put together from several.
NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV}
MKDIR_ATTEMPTS = 8


def write(target: Location, data: pa.Buffer, aside: Location, *, replace: bool = True) -> None:
    """Let `target` appear with the content `data`; see `writing`."""
    if isinstance(target, Path):
        with writing(target, aside, replace=replace) as stream:
            stream.write(data)
    else:
        assert isinstance(aside, UPath)
        content = data.to_pybytes()
        put = lambda path, **mode: target.fs.pipe_file(path, content, **mode)  # noqa: E731
        _upload(target, aside, put, io.BytesIO(content), replace)


@contextmanager
def writing(target: Location, aside: Location, *, replace: bool = True) -> Iterator[BinaryIO]:
    """A stream whose content appears as `target` once the block ends well, and never if it does not.

    Until then it is the file `aside`, on the file system of `target`; where that is remote, a temporary file here,
    without a name, so that nothing is left of it if this process is killed.

    Without `replace` a file that is there stays, and FileExistsError is raised: of several writers one succeeds. That
    is certain on a local disk or NFS with hard links, and on S3, Google Cloud Storage and Azure; elsewhere two that
    write at once may both succeed, and the last one's file stays. On an object store a file of the very same content
    counts as written: it may be this writer's own, of a request whose answer was lost.
    """
    if isinstance(target, Path):
        assert isinstance(aside, Path)
        with _writing_aside(target, aside, replace) as stream:
            yield stream
    else:
        assert isinstance(aside, UPath)
        with tempfile.TemporaryFile() as stream:
            yield stream
            stream.flush()
            put = lambda path, **mode: target.fs.put_file(f"/proc/self/fd/{stream.fileno()}", path, **mode)  # noqa: E731
            _upload(target, aside, put, stream, replace)


@contextmanager
def _writing_aside(target: Path, unfinished: Path, replace: bool) -> Iterator[BinaryIO]:
    try:
        with _made(unfinished, lambda: unfinished.open("wb")) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        _made(target, lambda: unfinished.rename(target) if replace else _rename_to_free(unfinished, target))
    except BaseException:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def _rename_to_free(file: Path, target: Path) -> None:
    """Rename `file` to a name that nobody else has; raises FileExistsError."""
    try:
        os.link(file, target)
    except OSError as error:
        if error.errno in NO_LINKS:  # not atomic, and all there is
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
            file.rename(target)
            return
        if file.stat().st_nlink != 2:  # else it was made: NFS asks again where an answer is lost; see open(2), O_EXCL
            raise
    with suppress(OSError):  # the target is there; what is left aside is removed by the next run
        file.unlink()


def _upload(target: UPath, aside: UPath, put: Callable[..., object], content: BinaryIO, replace: bool) -> None:
    """Let `put(path)` upload what `content` holds as well; `put(path, mode="create")` only to a free name."""

    def attempt() -> None:
        if target.protocol not in OBJECT_STORES:
            _upload_aside(target, aside, put, replace)
        elif replace:
            put(target.path)
        else:
            with _condition(target):
                put(target.path, mode="create")

    try:
        retry(target, attempt)
    except (FileExistsError, FileNotFoundError):
        # The answer to a request may be lost. Sent again, it finds the file there that it made, or no longer the
        # upload that it completed or the file that it moved.
        if not _holds(target, content):
            raise


def _upload_aside(target: UPath, aside: UPath, put: Callable[..., object], replace: bool) -> None:
    if not replace and target.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    _made(aside, lambda: put(aside.path))
    if target.exists():  # not every file system moves onto a file, and HDFS does not even say so
        if not replace:
            remove_existing(aside)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        remove_existing(target)
    _made(target, lambda: target.fs.mv(aside.path, target.path))


@contextmanager
def _condition(target: UPath) -> Iterator[None]:
    """A failed condition of the store as a FileExistsError."""
    try:
        yield
    except OSError as error:
        response = getattr(error.__cause__, "response", None) or {}
        if response.get("Error", {}).get("Code") in CONDITION_FAILED:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        raise


def _holds(target: UPath, content: BinaryIO) -> bool:
    """Whether `target` is a file with just this content."""

    def same() -> bool:
        content.seek(0)
        with open_read(target) as found:
            while block := found.read(REMOTE_BLOCK):
                if block != content.read(len(block)):
                    return False
        return not content.read(1)

    target.fs.invalidate_cache(target.path)
    try:
        return retry(target, same)
    except FileNotFoundError:
        return False


def _made(file: Location, function: Callable[[], T]) -> T:
    """`function()`; where a folder of `file` is missing, or is removed by others as empty meanwhile, made and again."""
    for _ in range(MKDIR_ATTEMPTS):
        with suppress(FileNotFoundError):
            if is_remote(file):  # where the error for a missing folder can be any
                file.parent.mkdir(parents=True, exist_ok=True)
            return function()
        with suppress(FileNotFoundError):
            file.parent.mkdir(parents=True, exist_ok=True)
    return function()


def remove_version(location: Location, expected: tuple[int, str], aside: Location) -> None:
    """Remove a file where its size and version are `expected`; one that was written later stays.

    Raises FileNotFoundError. On a local disk the file is moved to `aside` first, and moved back where it is another.
    """
    if not isinstance(location, Path):
        if version_of(location) == expected:
            remove_file(location)
        return
    assert isinstance(aside, Path)
    if location.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(location))
    if version_of(location) != expected:
        return
    _made(aside, lambda: location.rename(aside))
    if version_of(aside) != expected:
        with suppress(FileExistsError):
            os.link(aside, location)
    aside.unlink()


@contextmanager
def explained(output: Location, done: str = "written") -> Iterator[None]:
    """What the file system says, as an OutputError."""
    try:
        yield
    except EngineError:
        raise
    except OSError as error:
        place = f" in {tempfile.gettempdir()}" if is_remote(output) else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = f"free some space{place}" if full else "check the folder"
        raise OutputError(f"{output} cannot be {done}: {error.strerror or error}; {advice} and start again") from error
    except Exception as error:  # every file system has errors of its own
        if not is_remote(output):
            raise
        raise OutputError(f"{output} cannot be {done}: {type(error).__name__}: {error}; start again") from error
