"""New heads on stored vectors: scores without the encoder."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors.numpy import load_file

from jql_engine.bundle import Bundle
from jql_engine.data import EMBEDDING, score_column
from jql_engine.dataset import SourceFile, find_files
from jql_engine.errors import BundleError, InputError
from jql_engine.interrupt import StopError
from jql_engine.output import METADATA_KEY, PARTS, aside_of, check_output, explained, final_of, find_parts, is_finished
from jql_engine.progress import LOG_SECONDS
from jql_engine.ranks import share
from jql_engine.run import OPENERS, Job
from jql_engine.storage import Location, locate, open_parquet, read_schema, remove_file, remove_if_empty, writing

ROWS = 16_384  # vectors read and written at a time
PRODUCT_ROWS = 4_096  # vectors in one product: what lies between its two halves is [PRODUCT_ROWS, K]


@dataclass(frozen=True, slots=True)
class Heads:
    """All heads of a bundle, stacked: relu(e hidden_weight^T + hidden_bias) output_weight + output_bias."""

    hidden_weight: NDArray[np.float32]  # [D, K]
    hidden_bias: NDArray[np.float32]  # [K]
    output_weight: NDArray[np.float32]  # [K, H]
    output_bias: NDArray[np.float32]  # [H]

    @classmethod
    def of(cls, bundle: Bundle) -> Heads:
        """The heads of heads.safetensors."""
        tensors = load_file(bundle.path / "heads.safetensors")
        hidden = np.ascontiguousarray(tensors["hidden.weight"].T)
        return cls(hidden, tensors["hidden.bias"], tensors["output.weight"], tensors["output.bias"])

    def score(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scores [n, H] of `embeddings` [n, D]."""
        scores = np.empty((len(embeddings), len(self.output_bias)), np.float32)
        hidden = np.empty((min(PRODUCT_ROWS, len(embeddings)), len(self.hidden_bias)), np.float32)
        for start in range(0, len(embeddings), PRODUCT_ROWS):
            part = embeddings[start : start + PRODUCT_ROWS]
            between = np.matmul(part, self.hidden_weight, out=hidden[: len(part)])
            between += self.hidden_bias
            np.maximum(between, 0, out=between)
            np.matmul(between, self.output_weight, out=scores[start : start + PRODUCT_ROWS])
        scores += self.output_bias
        return scores


@dataclass(slots=True)
class Progress:
    """Counts what is done, and says so now and then on stderr."""

    total: int  # files
    documents: int = 0
    files: int = 0  # finished by this run or before it
    started: float = field(default_factory=time.monotonic)
    shown: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return max(1e-9, time.monotonic() - self.started)

    def add(self, n_docs: int) -> None:
        """So many more documents have new scores."""
        self.documents += n_docs
        if time.monotonic() - self.shown >= LOG_SECONDS:
            self.shown = time.monotonic()
            rate = self.documents / self.seconds
            line = f"{self.documents:,} documents, {self.files:,} of {self.total:,} files, {rate:,.0f} documents/s"
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()


def rescore_files(job: Job, bundle: Bundle, stop: threading.Event) -> dict[str, Any]:
    """Write, for every output with embeddings that `job` names, the same rows with the scores of `bundle`'s heads.

    Vectors are not copied. Returns the summary; raises InputError where a file holds no vectors or another encoder's,
    BundleError where the bundle has no heads.
    """
    if not bundle.heads:
        raise BundleError(f"{bundle.path} has no heads to apply; give a bundle of the same encoder with heads")
    heads, out = Heads.of(bundle), locate(job.out)
    listing = find_files(job.inputs)
    sources = share(listing.files, job.rank)
    progress = Progress(len(sources))
    with ThreadPoolExecutor(OPENERS) as pool:
        plans = list(pool.map(lambda source: _look(source, bundle), sources))
        check_output(out, job.inputs, sources)
        done = list(
            pool.map(lambda plan: not job.overwrite and is_finished(final_of(out, plan.source), plan.settings), plans)
        )
    for file in find_parts(out).left_by(sources):  # by a run that was killed
        remove_file(file)
    progress.files = n_finished = sum(done)
    for plan in (plan for plan, finished in zip(plans, done, strict=True) if not finished):
        with closing(_tables(plan, heads)) as tables:
            _write(out, plan, tables, progress, stop)
        progress.files += 1
    remove_if_empty(out / PARTS)
    return {
        "documents": progress.documents,
        "seconds": round(progress.seconds, 3),
        "documents_per_second": round(progress.documents / progress.seconds, 1),
        "files": progress.files - n_finished,
        "skipped_files": n_finished,
        "unfinished": [asdict(file) for file in listing.refused],
        "bundle": bundle.hash,
    }


@dataclass(frozen=True, slots=True)
class Plan:
    """A file of vectors, and what its new output will be."""

    source: SourceFile
    schema: pa.Schema
    settings: dict[str, Any]


def _look(source: SourceFile, bundle: Bundle) -> Plan:
    try:
        schema = read_schema(source.location)
        before = dict(json.loads((schema.metadata or {})[METADATA_KEY]))
        encoder = str(before["encoder"])
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise InputError(f"{source.location} was not written by jql-run ({error!r})") from error
    if EMBEDDING not in schema.names:
        raise InputError(f"{source.location} has no column {EMBEDDING!r}; score it again with --embeddings fp16")
    if encoder != bundle.encoder_hash:
        raise InputError(
            f"{source.location} holds vectors of encoder {encoder[:12]}..., the heads of {bundle.path} read "
            f"those of {bundle.encoder_hash[:12]}...; use a bundle of the same encoder, pooling and length"
        )
    settings = {**before, "bundle": bundle.hash, "heads": list(bundle.heads), "rescored_from": source.version}
    return Plan(source, _schema(source, schema, bundle, settings), settings)


def _schema(source: SourceFile, stored: pa.Schema, bundle: Bundle, settings: dict[str, Any]) -> pa.Schema:
    """The stored columns with the new heads' in the place of the old ones', and without the vectors."""
    old = {score_column(head) for head in json.loads(stored.metadata[METADATA_KEY])["heads"]}
    kept = [field for field in stored if field.name not in old and field.name != EMBEDDING]
    at = next(i for i, field in enumerate(kept) if field.name == "n_tokens")
    new = [pa.field(score_column(head), pa.float32()) for head in bundle.heads]
    if clash := {field.name for field in kept} & {field.name for field in new}:
        raise InputError(
            f"{source.location}: a column {min(clash)!r} has the name of a score column; choose other head names"
        )
    metadata = {**stored.metadata, METADATA_KEY: json.dumps(settings)}
    return pa.schema([*kept[:at], *new, *kept[at:]], metadata=metadata)


def _write(out: Location, plan: Plan, tables: Iterable[pa.Table], progress: Progress, stop: threading.Event) -> None:
    target = final_of(out, plan.source)
    with (
        explained(target),
        writing(target, aside_of(out, plan.source)) as stream,
        pq.ParquetWriter(stream, plan.schema, compression="zstd") as writer,
    ):
        for table in tables:
            if stop.is_set():
                raise StopError("interrupted; start the same command again to continue")
            writer.write_table(table)
            progress.add(table.num_rows)


def _tables(plan: Plan, heads: Heads) -> Generator[pa.Table]:
    new = [score_column(head) for head in plan.settings["heads"]]
    with open_parquet(plan.source.location, 1 << 20) as file:
        stored = file.schema_arrow.names
        columns = [name for name in stored if name in plan.schema.names or name == EMBEDDING]
        with closing(_ahead(_batches(plan.source, file, columns))) as batches:
            for batch in batches:
                vectors = batch.column(EMBEDDING)
                null = vectors.is_null().to_numpy(zero_copy_only=False)
                scores = heads.score(_matrix(vectors, null))
                by_name = {name: batch.column(name) for name in batch.schema.names}
                by_name |= {name: pa.array(np.ascontiguousarray(scores[:, i]), mask=null) for i, name in enumerate(new)}
                yield pa.table([by_name[name] for name in plan.schema.names], schema=plan.schema)


def _matrix(vectors: pa.FixedSizeListArray, null: NDArray[np.bool_]) -> NDArray[np.float32]:
    """[n, D]; zeros where there is no vector. A NaN in a vector stays one, and makes its scores NaN."""
    width = vectors.type.list_size
    values = vectors.values.slice(vectors.offset * width, len(vectors) * width).to_numpy(zero_copy_only=False)
    matrix: NDArray[np.float32] = values.reshape(len(vectors), width).astype(np.float32, copy=bool(null.any()))
    if null.any():
        matrix[null] = 0
    return matrix


def _ahead(batches: Iterator[pa.RecordBatch]) -> Generator[pa.RecordBatch]:
    """The same; the next one is read while this one is in use."""
    with ThreadPoolExecutor(1, thread_name_prefix="read") as pool:
        following = pool.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = pool.submit(next, batches, None)
            yield batch


def _batches(source: SourceFile, file: pq.ParquetFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
    try:
        yield from file.iter_batches(ROWS, columns=columns)
    except Exception as error:  # a remote file system has errors of its own
        raise InputError(f"{source.location} cannot be read to its end: {error}; start again") from error
