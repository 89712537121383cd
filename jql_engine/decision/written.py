"""Small files that commands write: under their names complete or not at all, here and elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa

from jql_engine.files.location import Location
from jql_engine.files.output import explained
from jql_engine.files.writing import write


def write_text(target: Location, content: str) -> None:
    """Let the file `target` appear, in the place of one that is there; raises OutputError."""
    data = content.encode("utf-8", "surrogatepass")
    with explained(target):
        if isinstance(target, Path) and target.exists() and not (target.is_file() or target.is_dir()):
            target.write_bytes(data)  # a pipe or a terminal, like /dev/stdout: a file in its place would reach nobody
            return
        aside = target.with_name(f".{target.name}.{os.getpid()}.{uuid4().hex}.writing")
        write(target, pa.py_buffer(data), aside)


def write_json(target: Location, content: Any) -> None:
    """The same of JSON; a number that is not finite is an error of ours."""
    write_text(target, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
