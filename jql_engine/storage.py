"""Files here and elsewhere: pathlib.Path for the local disk, universal_pathlib's UPath for any URL that fsspec knows.

A file appears under its name complete or not at all. Locally it is written aside, synced and renamed; elsewhere it is
uploaded in one request whose completion makes it visible, which is how object stores rename.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from jql_engine.errors import EngineError, InputError

Location: TypeAlias = Path | UPath
T = TypeVar("T")

# Seconds between attempts on a remote file system, each drawn from half of it to all: 7 attempts in about a minute.
BACK_OFF = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
# Waiting changes none of these. A ValueError is not among them: what network libraries raise where half an answer came,
# JSONDecodeError for one, is one too.
FINAL = (
    FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError, ImportError,
    TypeError, AttributeError, AssertionError, pa.ArrowInvalid, EngineError,
)  # fmt: skip
# Nor these, of libraries that are not imported for a local job. FileExpired is s3fs's: the object is another one now;
# opened again it would give rows of that.
FINAL_NAMES = {
    "FileExpired", "NoCredentialsError", "PartialCredentialsError", "GatedRepoError", "RepositoryNotFoundError",
    "RevisionNotFoundError",
}  # fmt: skip
UNKNOWN = "unknown"  # the version of a file of which the file system says nothing that changes with the content
DENIED = (401, 403)  # statuses of http
MKDIR_ATTEMPTS = 8
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
    except (ImportError, ValueError) as error:
        raise EngineError(f"{text} cannot be used: {error}") from error
    return Path(path) if location.protocol in ("file", "local") else location


def is_remote(location: Location) -> bool:
    """True where fsspec, not the operating system, reads and writes."""
    return isinstance(location, UPath)


def retry(location: Location, function: Callable[[], T]) -> T:
    """`function()`, again after a while where a remote file system failed in a way that may pass."""
    for seconds in BACK_OFF if is_remote(location) else ():
        try:
            return function()
        except Exception as error:  # every file system has errors of its own
            if _is_final(error):
                raise
            seconds *= random.uniform(0.5, 1)
            report_wait(location, error, seconds)
            time.sleep(seconds)
    return function()


def report_wait(location: Location, error: Exception, seconds: float) -> None:
    """Say on stderr what went wrong and when it is tried again."""
    start = "\r\x1b[K" if sys.stderr.isatty() else ""  # over the live line
    what = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
    sys.stderr.write(f"{start}jql-run: {location}: {what}; again in {seconds:.2g} s\n")
    sys.stderr.flush()


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
        status = location.stat()
        return status.st_size, str(status.st_mtime_ns)
    return version_from(retry(location, lambda: location.fs.info(location.path)))


def version_from(info: dict[str, object]) -> tuple[int, str]:
    """The same from what fsspec says of a file."""
    keys = ("ETag", "etag", "LastModified", "last_modified", "Last-Modified", "mtime", "updated", "created", "blob_id")
    size = info.get("size")
    value = next((info[key] for key in keys if info.get(key)), UNKNOWN)
    # In a listing some file systems give a time in seconds, of the file alone as a datetime.
    version = str(value.timestamp() if isinstance(value, datetime) else value)
    return (size if isinstance(size, int) else -1), version


def check_version(location: Location, found: tuple[int, str], expected: tuple[int, str]) -> None:
    """Raise InputError where a file is not the one of which `version_of` gave what is `expected`."""
    if found != expected:
        raise exchanged(location)


def exchanged(location: Location) -> InputError:
    """The error of a file that is not the one that was found when the run began."""
    return InputError(f"{location} was changed during the run; start the same command again")


def is_exchange(error: Exception) -> bool:
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


def exists(location: Location) -> bool:
    """Whether there is a file or folder."""
    return bool(retry(location, location.exists))


def write(target: Location, data: pa.Buffer, aside: Location) -> None:
    """Let `target` appear with the content `data`; see `writing`."""
    if isinstance(target, Path):
        with writing(target, aside) as stream:
            stream.write(data)
    else:
        retry(target, lambda: target.fs.pipe_file(target.path, data.to_pybytes()))


@contextmanager
def writing(target: Location, aside: Location) -> Iterator[BinaryIO]:
    """A stream whose content appears as `target` once the block ends well, and never if it does not.

    Until then it is the file `aside`, on the file system of `target`; where that is remote, a temporary file here,
    without a name, so that nothing is left of it if this process is killed.
    """
    if isinstance(target, Path):
        assert isinstance(aside, Path)
        with _writing_aside(target, aside) as stream:
            yield stream
    else:
        with tempfile.TemporaryFile() as stream:
            yield stream
            stream.flush()
            retry(target, lambda: target.fs.put_file(f"/proc/self/fd/{stream.fileno()}", target.path))


@contextmanager
def _writing_aside(target: Path, unfinished: Path) -> Iterator[BinaryIO]:
    try:
        with _made(unfinished, lambda: unfinished.open("wb")) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        _made(target, lambda: unfinished.rename(target))
    except BaseException:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def _made(file: Path, function: Callable[[], T]) -> T:
    """`function()`; where a folder of `file` is missing, or is removed by others as empty meanwhile, made and again."""
    for _ in range(MKDIR_ATTEMPTS):
        try:
            return function()
        except FileNotFoundError:
            with suppress(FileNotFoundError):
                file.parent.mkdir(parents=True, exist_ok=True)
    return function()


def remove_file(location: Location) -> None:
    """Remove a file that may be gone already."""
    with suppress(FileNotFoundError):
        retry(location, location.unlink)


def remove_folder(folder: Location, root: Location) -> None:
    """Remove `folder` with all in it, and the folders above it, below `root` and `root` itself, that are left empty."""
    if isinstance(folder, Path):
        with suppress(FileNotFoundError, NotADirectoryError):  # others remove it too
            for name in os.listdir(folder):  # noqa: PTH208 (a list: what is removed meanwhile does not matter)
                (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # another process still writes there, or it is gone
            for empty in (folder, *folder.parents):
                empty.rmdir()
                if empty == root:
                    break
    else:
        with suppress(FileNotFoundError):
            retry(folder, lambda: folder.fs.rm(folder.path, recursive=True))
        folder.fs.invalidate_cache(folder.path)


def remove_empty_folders(root: Location) -> None:
    """Remove `root` and the folders in it as far as nothing is in them; object stores have no folders."""
    if isinstance(root, Path):
        for folder, _, _ in os.walk(root, topdown=False):
            remove_if_empty(Path(folder))


def remove_if_empty(folder: Location) -> None:
    """Remove a folder that nothing is in; object stores have no folders."""
    if isinstance(folder, Path):
        with suppress(OSError):
            folder.rmdir()


def list_files(folder: Location) -> list[tuple[Location, str]]:
    """Every file below `folder`, with its path inside of it, sorted; none where there is no folder."""
    if isinstance(folder, Path):
        found: list[tuple[Location, str]] = [
            (file, file.relative_to(folder).as_posix()) for file in _walk(folder) if file.is_file()
        ]
    else:
        folder.fs.invalidate_cache(folder.path)  # what it knows of other folders saves a request for each file
        root = folder.path.rstrip("/") + "/"
        paths: list[str] = retry(folder, lambda: folder.fs.find(folder.path))
        found = [(folder / path.removeprefix(root), path.removeprefix(root)) for path in paths if path.startswith(root)]
    return sorted(found, key=lambda item: item[1])


def _walk(folder: Path) -> Iterator[Path]:
    """Whatever is below a folder and no folder; those that others remove meanwhile are passed over."""
    for parent, _, names in os.walk(folder, onerror=_raise_unless_gone):
        yield from (Path(parent, name) for name in names)


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error
