"""Whether a file is still the one that was found: its size, and its time of modification or entity tag."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from jql_engine.errors import InputError
from jql_engine.files.location import OBJECT_STORES, Location
from jql_engine.files.retries import retry

# What the file systems of fsspec call entity tags, hashes and times of modification.
VERSION_KEYS = (
    "ETag", "etag", "LastModified", "last_modified", "Last-Modified", "Content-MD5", "Digest", "mtime", "updated",
    "modified", "modify", "modificationTime", "created", "blob_id", "sha",
)  # fmt: skip
UNKNOWN = "unknown"  # the version of a file of which only the size is told


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
