"""Where a file is: pathlib.Path for the local disk, universal_pathlib's UPath for any URL that fsspec knows."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from upath import UPath

from jql_engine.errors import EngineError
from jql_engine.printing import redact

Location: TypeAlias = Path | UPath
# Protocols of stores where an upload becomes visible when it is complete. Moving means copying there, so that uploading
# aside would only double the work.
BUCKETS = frozenset({"s3", "s3a", "gs", "gcs"})
OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hf"})


def locate(text: str | Path | UPath) -> Location:
    """A path as it is, a URL ("s3://bucket/key", "hf://datasets/...") as its file system's path; raises EngineError."""
    if not isinstance(text, str):
        return text
    if "://" not in text:
        return Path(text)
    protocol, _, rest = text.partition("://")
    bucket = rest.partition("/")[0]
    if protocol in BUCKETS and "@" in rest and (":" in bucket or "@" in bucket) and not bucket.startswith("arn:"):
        raise EngineError(
            f"{redact(text)} names a user, which buckets have not; give keys by the environment or a profile"
        )
    try:
        location = UPath(text)
        path = location.path if location.fs else ""
    except Exception as error:  # every file system has errors of its own; some connect already
        raise EngineError(f"{text} cannot be used: {error}") from error
    return Path(path) if location.protocol in ("file", "local") else location


def is_remote(location: Location) -> bool:
    """True where fsspec, not the operating system, reads and writes."""
    return isinstance(location, UPath)
