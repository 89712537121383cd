"""The documents that a report shows: their rows of the score files, and excerpts of their texts from the corpus.

Score files are joined to the corpus by name and position. That they are of this corpus is checked: the size and version
of the source that a score file names, the number of rows, and the ids where both have them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import pyarrow as pa

from jql_engine.decision.corpus import check_scored
from jql_engine.decision.report.figures import Example
from jql_engine.decision.scores import Rows, ScoreFiles
from jql_engine.errors import InputError
from jql_engine.files.formats import open_file
from jql_engine.files.inputs import Columns, InputFile, SourceFile, find_files
from jql_engine.files.reading import Cursor, as_text

EXCERPT = 300  # characters
READ = 4 * EXCERPT  # characters looked at: white space is shortened


@dataclass(frozen=True, slots=True)
class Corpus:
    """The texts that the scores are of."""

    text_column: str
    sources: Mapping[str, SourceFile]  # by the name of the score file
    assume_unchanged: bool

    @classmethod
    def find(cls, inputs: Sequence[str], text_column: str, assume_unchanged: bool) -> Corpus:
        """Raises InputError where nothing is there."""
        sources = {source.relative.text: source for source in find_files(inputs).files}
        return cls(text_column, sources, assume_unchanged)

    def open(self, scores: InputFile, id_column: str | None) -> InputFile:
        """The file of the corpus that `scores` are of; raises InputError where there is none, or another one."""
        name, found = scores.source.relative.text, scores.source.location
        if name not in self.sources:
            raise InputError(f"the corpus holds no file that {found} could be the scores of: none is called {name}")
        try:
            file = open_file(self.sources[name], Columns(self.text_column, id_column))
        except InputError:  # is it another file altogether?
            check_scored(open_file(self.sources[name], Columns(self.text_column)), scores, self.assume_unchanged)
            raise
        check_scored(file, scores, self.assume_unchanged)
        return file


def read_examples(
    files: ScoreFiles, places: Sequence[tuple[int, int]], corpus: Corpus | None
) -> dict[tuple[int, int], Example]:
    """The documents at `places`, a file and a row each; raises InputError."""
    found: dict[tuple[int, int], Example] = {}
    described = files.with_ids()
    id_column = next(iter(described.extra_columns), None)
    for number, of_file in groupby(sorted(set(places)), key=lambda place: place[0]):
        rows = [row for _, row in of_file]
        scores = files.files[number]
        texts = None if corpus is None else _Texts(corpus.open(scores, files.settings.get("id_column")), id_column)
        for row in rows:
            example = _example(described, next(iter(described.read_rows(number, row, row + 1))))
            found[number, row] = example if texts is None else replace(example, excerpt=texts.excerpt(example))
    return found


def _example(files: ScoreFiles, rows: Rows) -> Example:
    return Example(
        file=files.files[rows.file].source.relative.text,
        row=rows.start,
        id=_id_of(rows.columns, next(iter(files.extra_columns), None)),
        group=None if files.group_column is None else files.groups.names[int(rows.groups[0])],
        scores=tuple(rows.scores[:, 0].tolist()),
        n_tokens=int(rows.n_tokens[0]) if files.has_tokens else None,
        excerpt=None,
    )


def _id_of(batch: pa.RecordBatch, column: str | None) -> str | None:
    """Of a batch of one row."""
    if column not in batch.schema.names:
        return None
    value = batch.column(column)[0].as_py()
    return None if value is None else str(value)


class _Texts:
    """Texts of a corpus file, whose rows are asked for in order."""

    def __init__(self, file: InputFile, id_column: str | None) -> None:
        self._cursor, self._id_column = Cursor(file, 0, file.columns.needed), id_column

    def excerpt(self, example: Example) -> str:
        """The beginning of a document; raises InputError where it is another one than its scores are of."""
        file = self._cursor.file
        self._cursor.skip(example.row - self._cursor.row)
        (batch,) = self._cursor.take(1)
        found = _id_of(batch, self._id_column)
        if None not in (found, example.id) and found != example.id:
            raise InputError(
                f"{file.source.location}: row {example.row} has {self._id_column} {found!r}, its scores are of "
                f"{example.id!r}; give the corpus that was scored"
            )
        texts, _ = as_text(pa.chunked_array([batch.column(file.columns.text)]))
        return shortened(texts[0].as_py() or "")


def shortened(text: str) -> str:
    """The first EXCERPT characters, every white space as one blank."""
    words = " ".join(text[:READ].split())
    return words if len(words) <= EXCERPT and len(text) <= READ else words[:EXCERPT].rstrip() + " …"
