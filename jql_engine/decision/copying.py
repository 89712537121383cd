"""The kept rows of a corpus, all columns, in order: a job like jql-run's, with its parts, its resume and its claim.

Score files are joined to the corpus by name and position. What could go wrong with that is checked before anything is
written: the size and version of each source are those that its scores were computed of, files have equal rows, and
where both have ids these are compared row by row as they are read.
"""

from __future__ import annotations

import hashlib
import json
import resource
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from jql_engine.decision.corpus import check_scored
from jql_engine.decision.ids import first_difference
from jql_engine.decision.kept import Cut
from jql_engine.decision.result import Decision
from jql_engine.decision.scores import ScoreFiles
from jql_engine.errors import InputError, OutputError, UnreadableError
from jql_engine.files.chunks import WHOLE_BYTES, WHOLE_ROWS, ChunkDone, ChunkEnd, Failure, Segment, Task
from jql_engine.files.dictionaries import Column
from jql_engine.files.formats import look
from jql_engine.files.inputs import InputFile, SourceFile, find_files, identity
from jql_engine.files.location import Location, locate
from jql_engine.files.output import OutputFile
from jql_engine.files.parquet import describe_whole
from jql_engine.files.reading import Cursor
from jql_engine.files.settings import is_finished
from jql_engine.job.check import check_apart
from jql_engine.job.claim import Claim
from jql_engine.job.launch import run_work
from jql_engine.job.pipeline import in_laps
from jql_engine.job.plan import Job, plan
from jql_engine.job.progress import RunLog


@dataclass(frozen=True, slots=True)
class Joined:
    """Score files by the names of the corpus files that they are of, and what is kept by them."""

    files: ScoreFiles
    cut: Cut
    decided: Mapping[str, Any]  # what names the decision: rows of two that differ are never mixed
    numbers: Mapping[str, int]  # of score files, by name

    @classmethod
    def of(cls, decision: Decision, files: ScoreFiles) -> Joined:
        """The decision about `files`, which have been read."""
        asked = {name: value for name, value in asdict(decision.request).items() if value is not None}
        # What was left out is in the counts.
        decisive = {name: value for name, value in decision.to_json().items() if name != "without_scores"}
        digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
        numbers = {file.source.relative.text: number for number, file in enumerate(files.files)}
        decided = {**asked, "group_column": decision.group_column, "cut": digest}  # said in this order where it differs
        return cls(files.with_ids(), Cut.of(decision, files), decided, numbers)

    def number_of(self, source: SourceFile) -> int:
        """Of the scores of a corpus file; raises InputError where there are none."""
        if source.relative.text not in self.numbers:
            if source.relative.text in {one.name for one in self.files.without_scores}:
                raise InputError(
                    f"{source.location} has no scores: its job has ended without it; start that again once the "
                    "file can be read, or leave the file out of --corpus"
                )
            raise InputError(
                f"{source.location} has no scores: none of the score files is called {source.relative}; give the "
                "folder that jql-run scored, and all of its scores"
            )
        return self.numbers[source.relative.text]


def keep_rows(
    job: Job,
    joined: Joined,
    scores: Sequence[str],
    thresholds: Location,
    workers: int,
    log: RunLog,
    stop: threading.Event,
) -> dict[str, Any]:
    """Write the kept rows of the corpus `job.inputs` into `job.out`, and return the summary.

    `scores`: where the score files were found, which the output must lie outside of. `thresholds`: the file that will
    describe the rows; where some are left to be written, what is there of it is removed.

    Raises InputError where the scores do not line up with the corpus, and OutputError.
    """
    began = time.monotonic()
    log.check((job.out, *job.inputs))
    _check_all_given(job, joined)
    out = locate(job.out)
    _check_apart(out, joined, scores)
    claim = Claim(out, joined.decided)
    describe = partial(_describe_unfinished, joined, job.assume_unchanged, None if job.overwrite else out)
    work = plan(
        replace(job, chunk_rows=WHOLE_ROWS),
        claim,
        describe,
        partial(_output, out, joined),
        WHOLE_BYTES,
        description=thresholds,
    )
    specs = [Copying(joined, work.claim)] * workers
    return run_work(
        job, work, specs, on="their kept rows are copied", done="read", notes=[], began=began, log=log, stop=stop
    )


def _check_apart(out: Location, joined: Joined, scores: Sequence[str]) -> None:
    """Raise OutputError where kept rows would take the place of score files, or be read as such the next time."""
    for given in scores:
        check_apart(out, given)
    places = {identity(file.source.location) for file in joined.files.files}
    for file in joined.files.files:
        if identity(output := file.source.relative.below(out)) in places:
            raise OutputError(f"the kept rows would take the place of the scores {output}; choose another --out")


def _check_all_given(job: Job, joined: Joined) -> None:
    """Raise InputError for scores without a corpus file: what they decide about would be left out in silence."""
    given = {source.relative.text for source in find_files(job.inputs).files}
    if lone := sorted(joined.numbers.keys() - given):
        raise InputError(
            f"{len(lone)} of {len(joined.numbers)} score files are of no file of the corpus, {lone[0]} among them; "
            "give the whole corpus that was scored"
        )


def _describe_unfinished(
    joined: Joined, assume_unchanged: bool, out: Location | None, source: SourceFile
) -> InputFile | UnreadableError | None:
    """What is in a file of the corpus; None where its kept rows in `out` are finished."""
    scores = joined.files.files[joined.number_of(source)]
    if out is not None and is_finished(source.relative.below(out), _settings(joined, source)):
        return None
    try:
        file = look(source, lambda: _describe(source))
    except UnreadableError as error:
        return error
    check_scored(file, scores, assume_unchanged)
    return file


def _describe(source: SourceFile) -> InputFile:
    if source.format != "parquet":
        raise InputError(f"{source.location}: kept rows are written with all columns, of parquet files alone")
    return describe_whole(source)


def _settings(joined: Joined, source: SourceFile) -> dict[str, Any]:
    scores = joined.files.files[joined.number_of(source)].source
    return {
        **joined.decided,
        "source_bytes": source.size,
        "source_version": source.version,
        "scores_version": scores.version,
    }


def _output(out: Location, joined: Joined, file: InputFile) -> OutputFile:
    return OutputFile(out, file, file.schema, "derived", {}, own=_settings(joined, file.source))


@dataclass(frozen=True, slots=True)
class Copying:
    """What a process needs to copy kept rows; see jql_engine.job.pool.Spec."""

    joined: Joined
    claim: Claim
    device: str = "cpu"

    def open(
        self,
        outputs: Mapping[int, OutputFile],
        stop: threading.Event,
        executed: Callable[[int, int, int], None],
        say: Callable[[str], None],  # noqa: ARG002
    ) -> Callable[[Iterable[Task]], Generator[ChunkDone]]:
        """See jql_engine.job.pool.Spec."""
        return Copier(self.joined, outputs, self.claim, stop, executed).run


@dataclass(frozen=True, slots=True)
class Copier:
    """Tasks in, committed chunks out: read | write, each in its thread."""

    joined: Joined
    outputs: Mapping[int, OutputFile]  # by the number of the file; may change while tasks come
    claim: Claim
    stop: threading.Event
    executed: Callable[[int, int, int], None]

    def run(self, tasks: Iterable[Task]) -> Generator[ChunkDone]:
        """Copy the kept rows of the chunks of `tasks` and commit them; see Worker.run."""
        for end, stages in in_laps(tasks, {"read": self._read, "write": self._write}):
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            failed = {failure.segment for failure in end.failures}
            n_docs = sum(s.stop - s.start for s in end.task.chunk.segments if s not in failed)
            yield ChunkDone(end.task, end.failures, documents=n_docs, memory_bytes=memory, stages=stages)

    def _read(self, tasks: Iterator[Task]) -> Iterator[tuple[Segment, pa.Table] | ChunkEnd]:
        for task in tasks:
            if self.stop.is_set():
                return
            failures = []
            for segment in task.chunk.segments:
                try:
                    yield segment, self._kept(segment)
                except InputError as error:
                    failures.append(Failure(segment, str(error)))
                self.executed(segment.stop - segment.start, 0, 0)
            yield ChunkEnd(task, tuple(failures))

    def _kept(self, segment: Segment) -> pa.Table:
        """The kept rows of a segment; texts as distinct values, until they are written."""
        output, files = self.outputs[segment.file], self.joined.files
        columns = [Column() for _ in output.scores]
        for column, field in zip(columns, output.scores, strict=True):
            column.add(pa.chunked_array([], field.type))
        cursor = Cursor(output.file, segment.start, None)
        number = self.joined.number_of(output.file.source)
        for rows in files.read_rows(number, segment.start, segment.stop):
            kept = pa.array(self.joined.cut.kept(rows))
            at = 0
            for batch in cursor.take(len(rows)):
                _check_ids(batch, rows.columns.slice(at, batch.num_rows), files.extra_columns, output, rows.start + at)
                mine = kept.slice(at, batch.num_rows)
                for column, part in zip(columns, batch.columns, strict=True):
                    column.add(pa.chunked_array([_filtered(part, mine)]))
                at += batch.num_rows
        return pa.table([column.rows() for column in columns], names=output.scores.names)

    def _write(self, items: Iterator[tuple[Segment, pa.Table] | ChunkEnd]) -> Iterator[ChunkEnd]:
        failures: list[Failure] = []
        for item in items:
            if isinstance(item, ChunkEnd):
                yield replace(item, failures=(*item.failures, *failures))
                failures = []
                continue
            segment, table = item
            self.claim.check()
            try:
                self.outputs[segment.file].commit(segment, table)
            except InputError as error:
                failures.append(Failure(segment, str(error)))


def _filtered(column: pa.Array, kept: pa.BooleanArray) -> pa.Array:
    """The rows of `column` that are `kept`, of any type: pyarrow has no filter for some, views of texts among them."""
    try:
        return column.filter(kept)
    except pa.ArrowNotImplementedError:
        edges = np.flatnonzero(np.diff(kept.to_numpy(zero_copy_only=False), prepend=False, append=False))
        runs = [column.slice(start, stop - start) for start, stop in edges.reshape(-1, 2).tolist()]
        return pa.concat_arrays([column.slice(0, 0), *runs])


def _check_ids(
    batch: pa.RecordBatch, scores: pa.RecordBatch, ids: Sequence[str], output: OutputFile, first: int
) -> None:
    """Raise InputError where a row's scores are of another document."""
    for name in ids:
        if batch.schema.names.count(name) == 1 and (found := first_difference(batch.column(name), scores.column(name))):
            row, own, scored = found
            raise InputError(
                f"{output.file.source.location}: row {first + row} has {name} {own!r}, its scores are of {scored!r}; "
                "they are of another file"
            )
