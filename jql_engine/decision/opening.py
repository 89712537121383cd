"""Find score files, and make sure that they are finished, of one job, and have the columns that are asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa

from jql_engine.data import score_column
from jql_engine.decision.scores import TOKENS, ScoreFiles
from jql_engine.errors import InputError
from jql_engine.files.formats import look
from jql_engine.files.inputs import InputFile, SourceFile, check_group_type, find_files, with_shared_schemas
from jql_engine.files.parquet import describe_whole
from jql_engine.files.settings import METADATA_KEY, OF_SCORES, OF_SOURCE, differences, shown
from jql_engine.job.apart import in_threads
from jql_engine.job.finished import check_finished
from jql_engine.job.unfinished import Unfinished
from jql_engine.printing import say

# Settings that differ between the files of one job: what they were made of, and how many rows of the last were scored.
OF_ONE_FILE = {"limit"} | OF_SOURCE | OF_SCORES


def open_scores(
    inputs: Sequence[str],
    columns: Sequence[str] = (),
    group_column: str | None = None,
    extra_columns: Sequence[str] = (),
) -> ScoreFiles:
    """Find score files, and check that they are finished, of one job, and have the columns.

    `columns` names the score columns; without it they are those that jql-run wrote. `extra_columns` are read besides.
    Raises InputError.
    """
    # Before: a job that ends while files are listed is not seen after it. After: one that has begun; one that begins
    # later changes files, which is noticed.
    _check_all_finished(inputs)
    listing = find_files(inputs)
    unfinished = _check_all_finished(inputs)
    if unfinished:
        say(f"jql: {_warning(inputs, list(unfinished.values()))}")
    if listing.refused:
        raise InputError("; ".join(one.reason for one in listing.refused[:3]))
    if other := next((source for source in listing.files if source.format != "parquet"), None):
        raise InputError(f"{other.location} is no parquet file, as scores are; give the folder that jql-run wrote")
    looked = in_threads(_look, listing.files)
    first = looked[0]
    for one in looked:
        _check_one_job(first, one)
    settings = json.loads(first.settings)
    scores = tuple(columns) or tuple(score_column(head) for head in _heads(first, settings))
    heads = tuple(name.removeprefix("score_") for name in scores)
    if len(set(heads)) < len(heads):
        raise InputError(f"the score columns {', '.join(scores)} name a head twice; give each once")
    has_tokens = TOKENS in first.file.schema.names
    for one in looked:
        _check_columns(one.file, scores, group_column, [*extra_columns, *((TOKENS,) if has_tokens else ())])
    if any(one.is_limited for one in looked):
        say("jql: the first documents alone were scored (jql-run --limit), which are no sample of all")
    wide = [name for name in scores if any(pa.types.is_float64(one.file.schema.field(name).type) for one in looked)]
    if wide:
        say(
            f"jql: {', '.join(wide)} is double: its values are taken as float32, as jql-run writes them and as "
            "thresholds are; where a threshold is compared with it elsewhere, do the same"
        )
    files = tuple(with_shared_schemas([one.file for one in looked]))
    return ScoreFiles(
        files, heads, scores, group_column, has_tokens, tuple(extra_columns), settings, tuple(unfinished.values())
    )


def _check_all_finished(inputs: Sequence[str]) -> dict[str, Unfinished]:
    return {one.file: one for given in inputs for one in check_finished(given)}


def remind_of_groups(files: ScoreFiles) -> None:
    """Say that there are groups where they are not asked for."""
    known = files.settings.get("group_column")
    if known and files.group_column is None:
        say(f"jql: the scores know the groups of {known!r}; without --group-column {known} all documents are one group")


def _warning(inputs: Sequence[str], unfinished: Sequence[Unfinished]) -> str:
    count = "an input file has" if len(unfinished) == 1 else f"{len(unfinished):,} input files have"
    return (
        f"{', '.join(inputs[:3])}: {count} no scores and no part in what follows; start that job's command again once "
        "all can be read or are taken away, or remove its file *.run in .parts if nobody wants them: "
        f"{unfinished[0].reason}"
    )


@dataclass(frozen=True, slots=True)
class _Looked:
    """What is in a score file, and the settings of its job, as JSON."""

    file: InputFile
    settings: str
    is_limited: bool  # whether the first rows alone were scored


def _look(source: SourceFile) -> _Looked:
    return look(source, partial(_describe, source))


def _describe(source: SourceFile) -> _Looked:
    file = describe_whole(source)
    found = json.loads((file.schema.metadata or {}).get(METADATA_KEY, b"{}"))
    shared = json.dumps({key: found[key] for key in sorted(found) if key not in OF_ONE_FILE})
    is_limited = found.get("limit") is not None
    return _Looked(replace(file, schema=file.schema.remove_metadata()), sys.intern(shared), is_limited)


def _check_one_job(first: _Looked, other: _Looked) -> None:
    if first.settings == other.settings:
        return
    one, two = json.loads(first.settings), json.loads(other.settings)
    names = f"{first.file.source.location} and {other.file.source.location}"
    if not (one and two):
        raise InputError(f"of {names} one was written by jql-run and one was not; give the files of one job")
    if not (different := differences(one, two)):
        return
    key = different[0]
    raise InputError(
        f"{names} are of different jobs: {shown(key, one.get(key))} in the first, {shown(key, two.get(key))} in the "
        "second; their scores cannot be compared: give the files of one job"
    )


def _heads(looked: _Looked, settings: Mapping[str, Any]) -> list[str]:
    location = looked.file.source.location
    if "heads" not in settings:
        raise InputError(
            f"{location} was not written by jql-run; name its score columns with --columns (for "
            f"jql-compare give it as SECOND): it has {', '.join(looked.file.schema.names)}"
        )
    if not settings["heads"]:
        raise InputError(f"{location} holds no scores: the bundle has no heads; apply some with jql-rescore")
    return list(settings["heads"])


def _check_columns(file: InputFile, scores: Sequence[str], group: str | None, extra_columns: Sequence[str]) -> None:
    """Raise InputError where a column is missing, or of a type that cannot be used."""
    location, schema = file.source.location, file.schema
    copied = "; jql-run --group-column copies a column of the documents into the score files"
    for name in (*scores, *extra_columns, *(() if group is None else (group,))):
        if (count := schema.names.count(name)) != 1:
            found = f"{count} columns named" if count else "no column"
            raise InputError(
                f"{location} has {found} {name!r}; it has {', '.join(schema.names)}{copied if name == group else ''}"
            )
    for name in (*scores, *((TOKENS,) if TOKENS in extra_columns else ())):
        kind = schema.field(name).type
        if not (pa.types.is_integer(kind) or (pa.types.is_floating(kind) and name != TOKENS)):
            raise InputError(f"{location}: column {name!r} is {kind}, expected numbers")
    if group is not None:
        check_group_type(location, group, schema.field(group).type)
