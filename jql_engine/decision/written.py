"""Small files that commands write: under their names complete or not at all, here and elsewhere."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import pyarrow as pa

from jql_engine.files.location import Location
from jql_engine.files.writing import explained, write


def write_text(target: Location, content: str) -> None:
    """Let the file `target` appear, in the place of one that is there; raises OutputError."""
    data = content.encode("utf-8", "surrogatepass")
    with explained(target):
        if isinstance(target, Path) and (stream := _stream_at(target)) is not None:
            with stream:
                stream.write(data)
            return
        aside = target.with_name(f".{target.name}.{os.getpid()}.{uuid4().hex}.writing")
        write(target, pa.py_buffer(data), aside)


def _stream_at(target: Path) -> IO[bytes] | None:
    """A pipe, a terminal or a device, like /dev/stdout, to be written to: in its place a file would reach nobody."""
    for number in (1, 2):
        with suppress(OSError):
            if os.path.samestat(target.stat(), os.fstat(number)):
                return open(number, "wb", closefd=False)  # at its own place, so that what follows does not overwrite it
    return None if target.is_file() or target.is_dir() or not target.exists() else target.open("wb")


def write_json(target: Location, content: Any) -> None:
    """The same of JSON; a number that is not finite is an error of ours."""
    write_text(target, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
