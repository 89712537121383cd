"""Small files that commands write: under their names complete or not at all, here and elsewhere."""

from __future__ import annotations

import json
import os
from typing import Any
from uuid import uuid4

import pyarrow as pa

from jql_engine.files.location import Location
from jql_engine.files.output import explained
from jql_engine.files.writing import write


def write_text(target: Location, content: str) -> None:
    """Let the file `target` appear, in the place of one that is there; raises OutputError."""
    aside = target.with_name(f".{target.name}.{os.getpid()}.{uuid4().hex}.writing")
    with explained(target):
        write(target, pa.py_buffer(content.encode("utf-8", "surrogatepass")), aside)


def write_json(target: Location, content: Any) -> None:
    """The same of JSON; a number that is not finite is an error of ours."""
    write_text(target, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
