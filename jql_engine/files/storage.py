"""Files here and elsewhere: pathlib.Path for the local disk, universal_pathlib's UPath for any URL that fsspec knows.

A file appears under its name complete or not at all. Locally it is written aside, synced and renamed; to an object
store it is uploaded in one request whose completion makes it visible; elsewhere it is uploaded aside and moved.
"""

from __future__ import annotations

import errno
import io
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from jql_engine.errors import EngineError, InputError
from jql_engine.printing import say

Location: TypeAlias = Path | UPath
T = TypeVar("T")

# Waiting changes none of these. A ValueError is not among them: what network libraries raise where half an answer came,
# JSONDecodeError for one, is one too.
FINAL = (
    FileExistsError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError,
    ImportError, TypeError, AttributeError, AssertionError, pa.ArrowInvalid, EngineError,
)  # fmt: skip
# Nor these, of libraries that are not imported for a local job. FileExpired is s3fs's: the object is another one now;
# opened again it would give rows of that.
FINAL_NAMES = {
    "FileExpired", "NoCredentialsError", "PartialCredentialsError", "GatedRepoError", "RepositoryNotFoundError",
    "RevisionNotFoundError",
}  # fmt: skip
DENIED = (401, 403)  # statuses of http
# Protocols of stores where an upload becomes visible when it is complete. Moving means copying there, so that uploading
# aside would only double the work.
OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hf"})
# What a store answers where a file that must not exist does; fsspec makes a FileExistsError of most of these.
CONDITION_FAILED = {"PreconditionFailed", "412"}
# Of a file system without hard links, or one that is put together from several.
NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV}
# What the file systems of fsspec call entity tags, hashes and times of modification.
VERSION_KEYS = (
    "ETag", "etag", "LastModified", "last_modified", "Last-Modified", "Content-MD5", "Digest", "mtime", "updated",
    "modified", "modify", "modificationTime", "created", "blob_id", "sha",
)  # fmt: skip
UNKNOWN = "unknown"  # the version of a file of which only the size is told
MKDIR_ATTEMPTS = 8
REMOVALS = 16  # files removed at once
# fsspec reads ahead by this much; parquet column chunks of one text column are read front to back.
REMOTE_BLOCK = 8 << 20


def locate(text: str | Path | UPath) -> Location:
    """A path as it is, a URL ("s3://bucket/key", "hf://datasets/...") as its file system's path; raises EngineError."""
    if not isinstance(text, str):
        return text
    if "://" not in text:
        return Path(text)
    try:
        location = UPath(text)
        path = location.path if location.fs else ""
    except Exception as error:  # every file system has errors of its own; some connect already
        raise EngineError(f"{text} cannot be used: {error}") from error
    return Path(path) if location.protocol in ("file", "local") else location


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """For how long a remote file system that fails is asked again."""

    minutes: float = 10.0
    first: float = 1.0  # seconds to the second attempt; every pause is twice as long as the one before
    longest: float = 32.0

    def pauses(self) -> Iterator[float]:
        """Seconds to wait before each attempt, drawn from half a pause to all of it, until the time is over."""
        end, pause = time.monotonic() + 60 * self.minutes, self.first
        while (left := end - time.monotonic()) > 0:
            yield min(left, pause * random.uniform(0.5, 1))
            pause = min(2 * pause, self.longest)


# Of this process. Where a retry is needed nobody knows of the command line, and every call would hand it through.
_retries = RetryPolicy()


def set_retries(policy: RetryPolicy) -> None:
    """Let `retry` follow `policy` in this process; for the beginning of a process."""
    global _retries
    _retries = policy


def current_retries() -> RetryPolicy:
    """The policy of this process, for those that it starts."""
    return _retries


def is_remote(location: Location) -> bool:
    """True where fsspec, not the operating system, reads and writes."""
    return isinstance(location, UPath)


def retry(location: Location, function: Callable[[], T]) -> T:
    """`function()`, again after a while where a remote file system failed in a way that may pass."""
    pauses = _retries.pauses() if is_remote(location) else iter(())
    while True:
        try:
            return function()
        except Exception as error:  # every file system has errors of its own
            seconds = None if _is_final(error) else next(pauses, None)
            if seconds is None:
                raise
            report_wait(location, error, seconds)
            time.sleep(seconds)


def report_wait(location: Location, error: Exception, seconds: float) -> None:
    """Say on stderr what went wrong and when it is tried again."""
    what = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
    say(f"jql-run: {location}: {what}; again in {seconds:.2g} s")


def _is_final(error: Exception) -> bool:
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and type(cause).__module__.startswith("aiohttp"):
        # fsspec's http says of whatever happens that the file was not found.
        return 400 <= getattr(cause, "status", 0) < 500
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, FINAL) or not names.isdisjoint(FINAL_NAMES) or _status_of(error) in DENIED


def _status_of(error: Exception) -> object:
    """Of an error of http: aiohttp's know it, the hub's know the answer."""
    return getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)


def version_of(location: Location) -> tuple[int, str]:
    """Size in bytes, and a text that changes when the content does: modification time or entity tag."""
    if isinstance(location, Path):
        return version_from_status(location.stat())
    if location.protocol in OBJECT_STORES:
        location.fs.invalidate_cache(location.path)  # a listing may be older than what is asked
    return version_from(retry(location, lambda: location.fs.info(location.path)))


def version_from_status(status: os.stat_result) -> tuple[int, str]:
    """The same from what the operating system says of a file."""
    return status.st_size, str(status.st_mtime_ns)


def version_from(info: dict[str, object]) -> tuple[int, str]:
    """The same from what fsspec says of a file; UNKNOWN where that tells neither tag nor time."""
    size = info.get("size")
    value = next((info[key] for key in VERSION_KEYS if info.get(key)), UNKNOWN)
    if isinstance(value, datetime):  # in a listing some file systems give seconds, of the file alone a datetime
        value = value.replace(tzinfo=value.tzinfo or UTC).timestamp()
    version = str(value)
    return (size if isinstance(size, int) else -1), version


def modified(location: Location) -> float | None:
    """When a file was last written, in seconds since 1970; None where that is not told, or it is gone."""
    with suppress(Exception):  # every file system has errors of its own
        if isinstance(location, Path):
            return location.stat().st_mtime
        found: datetime = location.fs.modified(location.path)
        return found.replace(tzinfo=found.tzinfo or UTC).timestamp()
    return None


def check_version(location: Location, found: tuple[int, str], expected: tuple[int, str]) -> None:
    """Raise InputError where a file is not the one of which `version_of` gave what is `expected`."""
    if found != expected:
        raise exchanged(location)


def exchanged(location: Location) -> InputError:
    """The error of a file that is not the one that was found when the run began."""
    return InputError(f"{location} was changed during the run; start the same command again")


def is_exchange(error: BaseException) -> bool:
    """Whether `error` is how s3fs says that an object is another one than it knows."""
    return type(error).__name__ == "FileExpired"


def open_read(location: Location, expected: tuple[int, str] | None = None) -> BinaryIO:
    """A file to read from, at its beginning; opening and reading are for the caller to `retry` together.

    Raises InputError where it has not the size and version `expected`.
    """
    if isinstance(location, Path):
        stream: BinaryIO = location.open("rb")
    else:
        stream = location.fs.open(location.path, "rb", block_size=REMOTE_BLOCK)
    try:
        if expected is not None:
            check_version(location, _version_of_opened(location, stream), expected)
    except BaseException:
        stream.close()
        raise
    return stream


def _version_of_opened(location: Location, stream: BinaryIO) -> tuple[int, str]:
    """Of the file that was opened, whatever its name stands for by now."""
    if isinstance(location, Path):
        status = os.fstat(stream.fileno())
        return status.st_size, str(status.st_mtime_ns)
    # Object stores said it in answer to the opening; for the others it is a request.
    found = version_from(getattr(stream, "details", None) or {})
    return found if found[1] != UNKNOWN else version_from(location.fs.info(location.path))


@contextmanager
def open_parquet(
    location: Location, buffer_size: int = 0, dictionaries: Sequence[str] = ()
) -> Iterator[pq.ParquetFile]:
    """A parquet file; `buffer_size` bytes of a column are read at a time, 0 means a whole column chunk.

    `dictionaries`: columns of text to be read as such.
    """
    options: Any = {"buffer_size": buffer_size, "pre_buffer": False, "read_dictionary": dictionaries}
    if isinstance(location, Path):
        with pq.ParquetFile(location, **options) as file:
            yield file
    else:
        with open_read(location) as stream, pq.ParquetFile(stream, **options) as file:
            yield file


def read_schema(location: Location) -> pa.Schema:
    """The schema of a parquet file, with its metadata."""

    def read() -> pa.Schema:
        with open_parquet(location) as file:
            return file.schema_arrow

    return retry(location, read)


def read_file(location: Location) -> bytes | None:
    """The content of a small file; None where there is none."""
    try:
        if isinstance(location, Path):
            return location.read_bytes()
        return retry(location, lambda: bytes(location.fs.cat_file(location.path)))
    except FileNotFoundError:
        return None


def exists(location: Location) -> bool:
    """Whether there is a file or folder."""
    return bool(retry(location, location.exists))


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
            _remove(aside)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        _remove(target)
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


def remove_file(location: Location) -> None:
    """Remove a file that may be gone already."""
    with suppress(FileNotFoundError):
        retry(location, lambda: _remove(location))


def remove_version(location: Location, expected: tuple[int, str], aside: Location) -> None:
    """Remove a file where its size and version are `expected`; one that was written later stays.

    Raises FileNotFoundError. On a local disk the file is moved to `aside` first, and moved back where it is another.
    """
    if not isinstance(location, Path):
        if version_of(location) == expected:
            remove_file(location)
        return
    assert isinstance(aside, Path)
    if version_of(location) != expected:
        return
    _made(aside, lambda: location.rename(aside))
    if version_of(aside) != expected:
        with suppress(FileExistsError):
            os.link(aside, location)
    aside.unlink()


def remove_files(files: Sequence[Location]) -> None:
    """Remove files that may be gone already, several at a time."""
    with ThreadPoolExecutor(REMOVALS, thread_name_prefix="remove") as pool:
        list(pool.map(remove_file, files))


def _remove(location: Location) -> None:
    if isinstance(location, Path):
        location.unlink()
        return
    try:
        location.fs.rm_file(location.path)
    except NotImplementedError:
        location.fs.rm(location.path)  # which takes a name with "*" for a pattern


def remove_empty_parents(folder: Location, root: Location) -> None:
    """Remove `folder` and those above it, up to and with `root`, as far as nothing is in them."""
    for parent in (folder, *folder.parents):
        remove_if_empty(parent)
        if parent == root:
            break


def remove_empty_folders(root: Location) -> None:
    """Remove `root` and the folders in it as far as nothing is in them."""
    if isinstance(root, Path):
        for folder, _, _ in os.walk(root, topdown=False):
            remove_if_empty(Path(folder))
    elif root.protocol not in OBJECT_STORES:
        for path in [path for path, _, _ in root.fs.walk(root.path, topdown=False)]:
            with suppress(Exception):  # as below
                root.fs.rmdir(path)


def remove_if_empty(folder: Location) -> None:
    """Remove a folder that nothing is in; object stores have no folders."""
    if isinstance(folder, Path):
        with suppress(OSError):
            folder.rmdir()
    elif folder.protocol not in OBJECT_STORES:
        with suppress(Exception):  # it is not empty; every file system has errors of its own
            folder.fs.rmdir(folder.path)


def list_files(folder: Location) -> list[tuple[Location, str]]:
    """Every file below `folder`, with its path inside of it, sorted; none where there is no folder."""
    if isinstance(folder, Path):
        found: list[tuple[Location, str]] = [
            (file, file.relative_to(folder).as_posix()) for file in _walk(folder) if file.is_file()
        ]
    else:
        folder.fs.invalidate_cache(folder.path)  # what it knows of other folders saves a request for each file
        root = folder.path.rstrip("/") + "/"
        paths: list[str] = []
        with suppress(FileNotFoundError):
            paths = retry(folder, lambda: folder.fs.find(folder.path))
        found = [(folder / path.removeprefix(root), path.removeprefix(root)) for path in paths if path.startswith(root)]
    return sorted(found, key=lambda item: item[1])


def _walk(folder: Path) -> Iterator[Path]:
    """Whatever is below a folder and no folder; those that others remove meanwhile are passed over."""
    for parent, _, names in os.walk(folder, onerror=_raise_unless_gone):
        yield from (Path(parent, name) for name in names)


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error
