"""Files here and elsewhere: read, listed and removed."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from jql_engine.files.location import OBJECT_STORES, Location
from jql_engine.files.retries import retry
from jql_engine.files.versions import UNKNOWN, check_version, version_from

REMOVALS = 16  # files removed at once
# fsspec reads ahead by this much; parquet column chunks of one text column are read front to back.
REMOTE_BLOCK = 8 << 20


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


def remove_file(location: Location) -> None:
    """Remove a file that may be gone already."""
    with suppress(FileNotFoundError):
        retry(location, lambda: remove_existing(location))


def remove_files(files: Sequence[Location]) -> None:
    """Remove files that may be gone already, several at a time."""
    with ThreadPoolExecutor(REMOVALS, thread_name_prefix="remove") as pool:
        list(pool.map(remove_file, files))


def remove_existing(location: Location) -> None:
    """Remove a file that is there; raises FileNotFoundError where it is not."""
    if isinstance(location, Path):
        location.unlink()
        return
    try:
        location.fs.rm_file(location.path)
    except NotImplementedError:
        location.fs.rm(location.path)  # which takes a name with "*" for a pattern
    except FileNotFoundError:
        raise
    except Exception as error:  # FTP has one of its own
        if not _is_gone(location):
            raise
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(location)) from error


def _is_gone(location: UPath) -> bool:
    """Whether the server says so; `exists` says it where it fails too."""
    try:
        location.fs.invalidate_cache(location.path)
        location.fs.info(location.path)
    except FileNotFoundError:
        return True
    except Exception:
        return False
    return False


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
