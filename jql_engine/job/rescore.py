"""New heads on stored vectors: scores without the encoder, by the same machinery as a job that has one."""

from __future__ import annotations

import json
import resource
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jql_engine.bundle import Bundle
from jql_engine.data import EMBEDDING, score_column
from jql_engine.errors import InputError, UnreadableError
from jql_engine.files.chunks import WHOLE_BYTES, WHOLE_ROWS, ChunkDone, ChunkEnd, Failure, Segment, Task
from jql_engine.files.dictionaries import encode, is_text
from jql_engine.files.formats import look
from jql_engine.files.inputs import Columns, InputFile, SourceFile
from jql_engine.files.location import Location, locate
from jql_engine.files.output import OutputFile
from jql_engine.files.parquet import describe_whole
from jql_engine.files.reading import Cursor
from jql_engine.files.settings import METADATA_KEY, is_finished
from jql_engine.job.claim import Claim
from jql_engine.job.finished import check_finished
from jql_engine.job.pipeline import Stage, in_laps
from jql_engine.job.plan import Job, Work, plan
from jql_engine.readouts import Readouts


def prepare_rescoring(job: Job, bundle: Bundle) -> Work:
    """Find and check the files of vectors and the output folder, and claim it, before anything is computed.

    Vectors are not copied. Raises InputError where no file holds vectors of the bundle's encoder, or a new head has the
    name of a column; BundleError where the bundle has no heads, or one that reads something else; OutputError.
    """
    Readouts.of(bundle)  # what is wrong with them is said before the folder is taken
    out = locate(job.out)
    claim = Claim(out, {"rescored": True, "bundle": bundle.hash, "heads": list(bundle.heads)})
    output_of = partial(_output, out, bundle)
    describe = partial(_describe_unfinished, bundle, None if job.overwrite else out)
    unfinished = [one for given in job.inputs for one in check_finished(given)]  # has no vectors, and no scores then
    return plan(replace(job, chunk_rows=WHOLE_ROWS), claim, describe, output_of, WHOLE_BYTES, unfinished)


def _describe_unfinished(
    bundle: Bundle, out: Location | None, source: SourceFile
) -> InputFile | UnreadableError | None:
    """What is in a file of vectors; None where the scores in `out` are finished."""
    try:
        file = look(source, lambda: _describe(bundle, source))
    except UnreadableError as error:
        return error
    is_done = out is not None and is_finished(source.relative.below(out), _settings(file, bundle))
    return None if is_done else file


def _describe(bundle: Bundle, source: SourceFile) -> InputFile:
    """What is in a file of vectors; raises UnreadableError where they are none, or another encoder's."""
    if source.format != "parquet":
        raise UnreadableError(f"{source.location} is no parquet file; give outputs of jql-run --embeddings")
    file = describe_whole(source)
    schema = file.schema
    try:
        stored = _stored_settings(schema)
        encoder, _ = str(stored["encoder"]), list(stored["heads"])
    except (KeyError, TypeError, ValueError) as error:
        raise UnreadableError(
            f"{source.location} was not written by jql-run ({error!r}); give outputs of jql-run --embeddings"
        ) from error
    for column in (EMBEDDING, "n_tokens"):
        if column not in schema.names:
            raise UnreadableError(f"{source.location} has no column {column!r}; score it again with --embeddings fp16")
    width, found = bundle.manifest.encoder.hidden_size, schema.field(EMBEDDING).type
    if not _holds_vectors(found, width):
        raise UnreadableError(
            f"{source.location}: column {EMBEDDING!r} is {found}, expected vectors of {width} float16 or float32"
        )
    if encoder != bundle.encoder_hash:
        raise UnreadableError(
            f"{source.location} holds vectors of encoder {encoder[:12]}..., the heads of {bundle.path} read "
            f"those of {bundle.encoder_hash[:12]}...; use a bundle of the same encoder, pooling and length"
        )
    return replace(file, columns=Columns(EMBEDDING))


def _holds_vectors(kind: pa.DataType, width: int) -> bool:
    is_list = pa.types.is_fixed_size_list(kind) and kind.list_size == width
    return is_list and kind.value_type in (pa.float16(), pa.float32())


def _stored_settings(schema: pa.Schema) -> dict[str, Any]:
    return dict(json.loads((schema.metadata or {})[METADATA_KEY]))


def _settings(file: InputFile, bundle: Bundle) -> dict[str, Any]:
    before = _stored_settings(file.schema)
    return {**before, "bundle": bundle.hash, "heads": list(bundle.heads), "rescored_from": file.source.version}


def _output(out: Location, bundle: Bundle, file: InputFile) -> OutputFile:
    """The stored columns with the new heads' in the place of the old ones', and without the vectors."""
    old = {score_column(head) for head in _stored_settings(file.schema)["heads"]}
    kept = [field for field in file.schema if field.name not in old and field.name != EMBEDDING]
    at = next(i for i, field in enumerate(kept) if field.name == "n_tokens")
    new = [pa.field(score_column(head), pa.float32()) for head in bundle.heads]
    if clash := {field.name for field in kept} & {field.name for field in new}:
        raise InputError(
            f"{file.source.location}: a column {min(clash)!r} has the name of a score column; choose other head names"
        )
    columns = pa.schema([*kept[:at], *new, *kept[at:]])
    return OutputFile(out, file, columns, "derived", {}, own=_settings(file, bundle))


@dataclass(frozen=True, slots=True)
class Rescoring:
    """What a process needs to apply heads; see jql_engine.job.pool.Spec."""

    bundle: Bundle
    claim: Claim
    device: str = "cpu"

    def open(
        self,
        outputs: Mapping[int, OutputFile],
        stop: threading.Event,
        executed: Callable[[int, int, int], None],
        say: Callable[[str], None],  # noqa: ARG002
    ) -> Callable[[Iterable[Task]], Generator[ChunkDone]]:
        """Load the heads; see jql_engine.job.pool.Spec."""
        self.bundle.check_still_there()
        return Rescorer(Readouts.of(self.bundle), outputs, self.claim, stop, executed).run


@dataclass(frozen=True, slots=True)
class Rescorer:
    """Tasks in, committed chunks out: read | execute | write, each in its thread."""

    readouts: Readouts
    outputs: Mapping[int, OutputFile]  # by the number of the file; may change while tasks come
    claim: Claim
    stop: threading.Event
    executed: Callable[[int, int, int], None]

    def run(self, tasks: Iterable[Task]) -> Generator[ChunkDone]:
        """Apply the heads to the chunks of `tasks` and commit them; see Worker.run."""
        steps: dict[str, Stage] = {"read": self._read, "execute": self._execute, "write": self._write}
        for (end, n_docs, n_null), stages in in_laps(tasks, steps):
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            yield ChunkDone(
                end.task, end.failures, documents=n_docs, null_documents=n_null, memory_bytes=memory, stages=stages
            )

    def _read(self, tasks: Iterator[Task]) -> Iterator[tuple[Segment, pa.RecordBatch] | ChunkEnd]:
        for task in tasks:
            if self.stop.is_set():
                return
            failures = []
            for segment in task.chunk.segments:
                output = self.outputs[segment.file]
                columns = [name for name in output.file.schema.names if name in (EMBEDDING, *output.scores.names)]
                try:
                    cursor = Cursor(output.file, segment.start, columns)
                    for batch in cursor.take(segment.stop - segment.start):
                        yield segment, batch
                except InputError as error:
                    failures.append(Failure(segment, str(error)))
            yield ChunkEnd(task, tuple(failures))

    def _execute(
        self, items: Iterator[tuple[Segment, pa.RecordBatch] | ChunkEnd]
    ) -> Iterator[tuple[Segment, pa.Table] | ChunkEnd]:
        for item in items:
            if isinstance(item, ChunkEnd):
                yield item
                continue
            segment, batch = item
            yield segment, self._rescored(self.outputs[segment.file].scores, batch)
            self.executed(batch.num_rows, 0, 0)

    def _rescored(self, columns: pa.Schema, batch: pa.RecordBatch) -> pa.Table:
        vectors = batch.column(EMBEDDING)
        null = vectors.is_null().to_numpy(zero_copy_only=False)
        scores = self.readouts.score(_matrix(vectors, null))
        # Texts of an appended output as distinct values, until they are written.
        by_name = {name: _kept(batch.column(name)) for name in batch.schema.names}
        for i, head in enumerate(self.readouts.outputs):
            by_name[score_column(head)] = pa.array(np.ascontiguousarray(scores[:, i]), mask=null)
        return pa.table({name: by_name[name] for name in columns.names})

    def _write(self, items: Iterator[tuple[Segment, pa.Table] | ChunkEnd]) -> Iterator[tuple[ChunkEnd, int, int]]:
        tables: dict[Segment, list[pa.Table]] = {}
        for item in items:
            if not isinstance(item, ChunkEnd):
                tables.setdefault(item[0], []).append(item[1])
                continue
            failures, n_docs = {failure.segment: failure for failure in item.failures}, 0
            n_null = 0
            for segment in item.task.chunk.segments:
                if segment in failures:
                    continue
                output = self.outputs[segment.file]
                found = tables.get(segment) or [output.scores.empty_table()]
                self.claim.check()
                try:
                    output.commit(segment, pa.concat_tables(found))
                    n_docs += segment.stop - segment.start
                    n_null += sum(table["n_tokens"].null_count for table in found)
                except InputError as error:
                    failures[segment] = Failure(segment, str(error))
            tables = {}
            yield replace(item, failures=tuple(failures.values())), n_docs, n_null


def _kept(column: pa.Array) -> pa.Array:
    return encode(pa.chunked_array([column])) if is_text(column.type) else column


def _matrix(vectors: pa.FixedSizeListArray, null: NDArray[np.bool_]) -> NDArray[np.float32]:
    """[n, D]; zeros where there is no vector. A NaN in a vector stays one, and makes its scores NaN."""
    width = vectors.type.list_size
    values = vectors.values.slice(vectors.offset * width, len(vectors) * width).to_numpy(zero_copy_only=False)
    matrix: NDArray[np.float32] = values.reshape(len(vectors), width).astype(np.float32, copy=bool(null.any()))
    if null.any():
        matrix[null] = 0
    return matrix
