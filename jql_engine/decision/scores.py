"""Score files in, batches of rows out: the needed columns alone, in file order, in bounded memory.

What jql-run and jql-rescore wrote, of one job; or any parquet whose score columns are named.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jql_engine.errors import InputError
from jql_engine.files.formats import unreadable
from jql_engine.files.inputs import READ_BYTES, InputFile
from jql_engine.files.reading import FILES_AHEAD, Cursor
from jql_engine.job.unfinished import Unfinished

ROWS = 65_536  # of a batch, at most
MOST_GROUPS = 65_536
TOKENS = "n_tokens"
MOST_TOKENS = (1 << 31) - 1  # of a document: jql-run writes int32


class Groups:
    """Numbers of the values of the group column, in the order in which they appear; None is the null."""

    def __init__(self) -> None:
        self.names: list[str | None] = []
        self._numbers: dict[str | None, int] = {}

    def __len__(self) -> int:
        return len(self.names)

    def number(self, names: Sequence[str | None]) -> NDArray[np.int64]:
        """The number of each name, int64 [n]; raises InputError for more than MOST_GROUPS."""
        for name in names:
            if name not in self._numbers:
                self._numbers[name] = len(self.names)
                self.names.append(name)
        if len(self.names) > MOST_GROUPS:
            raise InputError(
                f"the group column has more than {MOST_GROUPS:,} values, {self.names[-1]!r} among them; name a column "
                "that sorts the documents into fewer groups, a language for one"
            )
        return np.array([self._numbers[name] for name in names], np.int64)


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive rows of one score file."""

    file: int  # its number
    start: int  # the first row, in the file
    scores: NDArray[np.float32]  # [H, n]; NaN where null
    null: NDArray[np.bool_]  # [H, n]
    n_tokens: NDArray[np.int64]  # [n]; 0 where null, and where the files have none
    groups: NDArray[np.int64]  # [n]; 0 without a group column
    columns: pa.RecordBatch  # as they were read, with those that were asked for besides

    def __len__(self) -> int:
        return len(self.n_tokens)

    def slice(self, start: int, stop: int) -> Rows:
        """The rows [start, stop) of these."""
        rows = slice(start, stop)
        null, n_tokens, groups = self.null[:, rows], self.n_tokens[rows], self.groups[rows]
        columns = self.columns.slice(start, stop - start)
        return Rows(self.file, self.start + start, self.scores[:, rows], null, n_tokens, groups, columns)

    @property
    def is_scored(self) -> NDArray[np.bool_]:
        """Whether the scores of all heads are finite, [n]; no other document takes part in a decision."""
        return np.asarray(np.isfinite(self.scores).all(axis=0))


@dataclass(frozen=True, slots=True)
class ScoreFiles:
    """Score files of one job that were found and checked; may be read as often as needed."""

    files: tuple[InputFile, ...]
    heads: tuple[str, ...]
    score_columns: tuple[str, ...]  # one for each head
    group_column: str | None
    has_tokens: bool  # whether there is a column n_tokens
    extra_columns: tuple[str, ...]  # columns read besides
    settings: Mapping[str, Any]  # of the job; empty where jql-run did not write the files
    without_scores: tuple[Unfinished, ...] = ()  # input files that the job has ended without
    groups: Groups = field(default_factory=Groups)  # that have been read so far

    @property
    def n_rows(self) -> int:
        """Rows of all files."""
        return sum(file.n_rows for file in self.files)

    def with_ids(self) -> ScoreFiles:
        """The same, read with the column of ids where every file has one."""
        name = self.settings.get("id_column") or "id"
        has_ids = all(file.schema.names.count(name) == 1 for file in self.files)
        return replace(self, extra_columns=(name,) if has_ids else ())

    def read(self) -> Iterator[Rows]:
        """All rows, file by file, in order; raises InputError, also where a file was changed since it was found."""
        for number, batches in enumerate(_ahead(self.files, self._columns)):
            yield from self._numbered(number, 0, batches)

    def read_rows(self, number: int, start: int, stop: int) -> Iterator[Rows]:
        """The rows [start, stop) of file `number`; raises InputError."""
        return self._numbered(number, start, Cursor(self.files[number], start, self._columns, ROWS).take(stop - start))

    @property
    def _columns(self) -> list[str]:
        names = [*self.score_columns, *((TOKENS,) if self.has_tokens else ()), *self.extra_columns]
        return list(dict.fromkeys([*names, *((self.group_column,) if self.group_column else ())]))

    def _numbered(self, number: int, start: int, batches: Iterable[pa.RecordBatch]) -> Iterator[Rows]:
        for batch in batches:
            with unreadable(failed := f"{self.files[number].source.location} cannot be read", failed):
                rows = self._rows(number, start, batch)
            yield rows
            start += batch.num_rows

    def _rows(self, number: int, start: int, batch: pa.RecordBatch) -> Rows:
        scores = np.empty((len(self.heads), batch.num_rows), np.float32)
        null = np.zeros(scores.shape, np.bool_)
        for head, name in enumerate(self.score_columns):
            column = batch.column(name).cast(pa.float32(), safe=False)  # of other types the nearest float32
            if column.null_count:
                null[head] = column.is_null().to_numpy(zero_copy_only=False)
                column = column.fill_null(np.nan)
            scores[head] = column.to_numpy(zero_copy_only=False)
        groups = np.zeros(batch.num_rows, np.int64)
        if self.group_column is None:
            self.groups.number([None])
        else:
            groups = self._group_numbers(batch.column(self.group_column))
        rows = Rows(number, start, scores, null, self._n_tokens(batch), groups, batch)
        if self.has_tokens:
            self._check_tokens(rows)
        return rows

    def _group_numbers(self, column: pa.Array) -> NDArray[np.int64]:
        encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
        numbers = self.groups.number(encoded.dictionary.cast(pa.string()).to_pylist())
        indices = encoded.indices
        if encoded.null_count:
            numbers = np.append(numbers, self.groups.number([None]))
            indices = indices.cast(pa.int64()).fill_null(len(numbers) - 1)
        return np.asarray(numbers[indices.to_numpy(zero_copy_only=False)], np.int64)

    def _n_tokens(self, batch: pa.RecordBatch) -> NDArray[np.int64]:
        if not self.has_tokens:
            return np.zeros(batch.num_rows, np.int64)
        column = batch.column(TOKENS).cast(pa.int64())
        return np.asarray(column.fill_null(0).to_numpy(zero_copy_only=False), np.int64)

    def _check_tokens(self, rows: Rows) -> None:
        """Raise InputError where a document that has scores has no length."""
        column, location = rows.columns.column(TOKENS), self.files[rows.file].source.location
        if column.null_count:
            wrong = rows.is_scored & column.is_null().to_numpy(zero_copy_only=False)
            if wrong.any():
                row = rows.start + int(wrong.argmax())
                raise InputError(f"{location}: row {row} has scores and no {TOKENS}; jql-run writes both or none")
        for found in (rows.n_tokens.min(initial=0), rows.n_tokens.max(initial=0)):
            if not 0 <= found <= MOST_TOKENS:
                raise InputError(f"{location}: {TOKENS} is {found} in a row, expected 0 to {MOST_TOKENS:,}")


def _ahead(files: Sequence[InputFile], columns: Sequence[str]) -> Iterator[Iterator[pa.RecordBatch]]:
    """The batches of each file; the next files are being read meanwhile, by several threads."""
    pool = ThreadPoolExecutor(FILES_AHEAD, thread_name_prefix="read")
    waiting: deque[Future[Iterator[pa.RecordBatch]]] = deque()
    try:
        for file in files:
            waiting.append(pool.submit(_begin, file, columns))
            if len(waiting) > FILES_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # one may sleep between two attempts


def _begin(file: InputFile, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The batches of a file, of which the first READ_BYTES are read at once, the others as they are asked for."""
    batches = Cursor(file, 0, columns, ROWS).take(file.n_rows)
    read: list[pa.RecordBatch] = []
    size = 0
    while size < READ_BYTES and (batch := next(batches, None)) is not None:
        read.append(batch)
        size += batch.nbytes
    return chain(read, batches)
