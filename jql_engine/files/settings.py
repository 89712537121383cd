"""The settings of a job, in the metadata of what it writes: what decides whether a file is this job's.

A file is finished where it is there with the same settings. They cover all that a score depends on: the bundle, the
columns, the source and its version, the versions of libraries.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pyarrow as pa

from jql_engine.errors import OutputError
from jql_engine.files.inputs import SourceFile
from jql_engine.files.location import Location, is_remote
from jql_engine.files.parts import Settings
from jql_engine.files.storage import exists, read_schema
from jql_engine.files.writing import explained

METADATA_KEY = b"jql_engine"
# Settings that are options of the commands; the others follow from the bundle, the source and what is installed.
OPTIONS = (
    "aggregate", "chunk_rows", "embeddings", "group_column", "id_column", "keep", "keep_tokens", "limit", "min_group",
    "output", "quantile", "rule", "text_column", "variant", "weight", "windows",
)  # fmt: skip
OF_SOURCE = {"source_bytes", "source_version"}  # settings that change with a source
OF_SCORES = {"rescored_from", "scores_version"}  # and with the scores that a job reads
SHA256 = re.compile(r"[0-9a-f]{64}")


def settings_of(shared: Settings, source: SourceFile, limit: int | None = None) -> dict[str, Any]:
    """The settings of a job and of one of its files."""
    return {**shared, "source_bytes": source.size, "source_version": source.version, "limit": limit}


def differences(one: Settings, other: Settings) -> list[str]:
    """Names of the settings in which two differ; a null is as good as none."""
    return [key for key in {**one, **other} if one.get(key) != other.get(key)]


def shown(key: str, value: object) -> str:
    """A setting as a user knows it: an option where it is one, a hash as its first digits."""
    if key in OPTIONS:
        option = f"--{key.replace('_', '-')}"
        return f"no {option}" if value is None else f"{option} {value}"
    key = "thresholds" if key == "cut" else key
    return f"{key} {value[:12]}" if isinstance(value, str) and SHA256.fullmatch(value) else f"{key} {value!r}"


def is_finished(output: Location, settings: Settings) -> bool:
    """True if `output` is the complete output of this very job; raises OutputError if it is another's."""
    with explained(output, "looked for"):
        if not exists(output):
            return False
    check_settings(output, settings)
    return True


def check_settings(output: Location, settings: Settings) -> None:
    """Raise OutputError where the finished file or part `output` was not written with these `settings`."""
    metadata = _metadata_of(output)
    try:
        found = dict(json.loads(metadata[METADATA_KEY]))
    except (KeyError, TypeError, ValueError) as error:
        raise OutputError(f"{output} exists and was not written by jql-run; move it, or give --overwrite") from error
    if not (different := differences(settings, found)):
        return
    key = different[0]
    if set(different) <= OF_SOURCE | OF_SCORES:
        then, now = found.get("source_bytes"), settings.get("source_bytes")
        size = f"{then} bytes then, {now} now" if then != now else "of the same size, but written anew"
        what = f"its source ({size})" if OF_SOURCE & set(different) else "the score file that it is made of"
        raise OutputError(
            f"{output} exists and was computed before {what} changed; bring that back, choose another --out, or start "
            "over with --overwrite"
        )
    then, now = found.get("limit"), settings.get("limit")
    if different == ["limit"] and None not in (then, now):
        raise OutputError(
            f"{output} exists and holds the first {then} of its documents, and --limit takes {now} of them now: with "
            "other inputs the first documents are others; choose another --out, or start over with --overwrite"
        )
    raise OutputError(
        f"{output} exists and was computed with other settings: {shown(key, found.get(key))} then, "
        f"{shown(key, settings.get(key))} now; give it again as it was then, choose another --out, or "
        "start over with --overwrite"
    )


def is_written_by_us(file: Location) -> bool:
    """False for what is damaged, or another program's."""
    return METADATA_KEY in _metadata_of(file)


def stored_settings(file: Location) -> dict[str, Any]:
    """The settings that a score file was written with; empty where it is another program's."""
    return dict(json.loads(_metadata_of(file).get(METADATA_KEY, b"{}")))


def _metadata_of(output: Location) -> dict[bytes, bytes]:
    """Of a parquet file; empty where it is none."""
    with explained(output, "read"):
        try:
            return dict(read_schema(output).metadata or {})
        except pa.ArrowException:
            return {}
        except OSError:
            if is_remote(output):
                raise
            return {}
