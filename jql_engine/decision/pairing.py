"""Two sets of score files of the same documents, side by side: row by row, file by file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from jql_engine.decision.comparison import Paired
from jql_engine.decision.ids import first_difference
from jql_engine.decision.opening import open_scores, remind_of_groups
from jql_engine.decision.scores import Rows, ScoreFiles
from jql_engine.errors import InputError
from jql_engine.files.settings import stored_settings


def read_pair(
    first: Sequence[str], second: Sequence[str], columns: Sequence[str] = (), group_column: str | None = None
) -> Paired:
    """Read two sets of score files; `columns` names the score columns of the second, in the order of the first's heads.

    Groups and lengths are the first set's. Raises InputError where the sets are not of the same heads and documents.
    """
    a, b = open_scores(first, (), group_column), open_scores(second, columns)
    remind_of_groups(a)
    _check_same(a, b, bool(columns))
    with_ids = a.with_ids()
    if all(file.schema.names.count(name) == 1 for name in with_ids.extra_columns for file in b.files):
        a, b = with_ids, replace(b, extra_columns=with_ids.extra_columns)
    scores = [np.empty((len(a.heads), a.n_rows), np.float32) for _ in range(2)]
    n_tokens, groups = np.zeros(a.n_rows, np.int64), np.zeros(a.n_rows, np.int64)
    row = 0
    for one, other in _aligned(a.read(), b.read()):
        rows = slice(row, row + len(one))
        _check_ids(a, one, other)
        scores[0][:, rows], scores[1][:, rows] = one.scores, other.scores
        n_tokens[rows], groups[rows] = one.n_tokens, one.groups
        row += len(one)
    return Paired(a.heads, scores[0], scores[1], n_tokens, groups, tuple(a.groups.names))


def _check_same(a: ScoreFiles, b: ScoreFiles, is_foreign: bool) -> None:
    if len(a.heads) != len(b.heads) or (not is_foreign and a.heads != b.heads):
        raise InputError(
            f"the first scores are of heads {', '.join(a.heads)}, the second of {', '.join(b.heads)}; give --columns, "
            "the second's score columns in the order of the first's heads"
        )
    names = [[file.source.relative.text for file in files.files] for files in (a, b)]
    if names[0] != names[1] and not (len(names[0]) == len(names[1]) == 1):
        lone = sorted(set(names[0]) ^ set(names[1]))[0]
        raise InputError(f"{lone} is in one of the two sets alone; give scores of the same files")
    for one, other in zip(a.files, b.files, strict=True):
        if one.n_rows != other.n_rows:
            raise InputError(
                f"{one.source.location} has {one.n_rows:,} rows and {other.source.location} {other.n_rows:,}; they are "
                "not of the same documents"
            )
    for one, other in zip(a.files, b.files, strict=True):
        sizes = [stored_settings(file.source.location).get("source_bytes") for file in (one, other)]
        if None not in sizes and sizes[0] != sizes[1]:
            raise InputError(
                f"{one.source.location} is of a file of {sizes[0]:,} bytes and {other.source.location} of one of "
                f"{sizes[1]:,}; they are not of the same documents"
            )


def _aligned(first: Iterator[Rows], second: Iterator[Rows]) -> Iterator[tuple[Rows, Rows]]:
    """The rows of both in pieces of equal length; files have equal rows, batches of them need not."""
    one = other = None
    while True:
        one = one if one is not None else next(first, None)
        other = other if other is not None else next(second, None)
        if one is None or other is None:
            assert one is other is None, "files of equal rows gave different numbers of them"
            return
        n_rows = min(len(one), len(other))
        yield one.slice(0, n_rows), other.slice(0, n_rows)
        one = one.slice(n_rows, len(one)) if len(one) > n_rows else None
        other = other.slice(n_rows, len(other)) if len(other) > n_rows else None


def _check_ids(files: ScoreFiles, one: Rows, other: Rows) -> None:
    for name in files.extra_columns:
        if found := first_difference(one.columns.column(name), other.columns.column(name)):
            row, a, b = found
            location = files.files[one.file].source.location
            raise InputError(f"{location}: row {one.start + row} has {name} {a!r}, the second set {b!r}")
