"""New heads on stored vectors: scores without the encoder."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
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
from jql_engine.ranks import share
from jql_engine.run import Job
from jql_engine.storage import Location, locate, open_parquet, read_schema, remove_file, remove_if_empty, writing

ROWS = 16_384  # vectors in one product


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
        hidden = embeddings @ self.hidden_weight
        hidden += self.hidden_bias
        np.maximum(hidden, 0, out=hidden)
        scores: NDArray[np.float32] = (hidden @ self.output_weight).astype(np.float32, copy=False)
        scores += self.output_bias
        return scores


def rescore_files(job: Job, bundle: Bundle, stop: threading.Event) -> dict[str, Any]:
    """Write, for every output with embeddings that `job` names, the same rows with the scores of `bundle`'s heads.

    Vectors are not copied. Returns the summary; raises InputError where a file holds no vectors or another encoder's,
    BundleError where the bundle has no heads.
    """
    if not bundle.heads:
        raise BundleError(f"{bundle.path} has no heads to apply; give a bundle of the same encoder with heads")
    started, heads, out = time.monotonic(), Heads.of(bundle), locate(job.out)
    sources = share(find_files(job.inputs), job.rank)
    plans = [(source, *_look(source, bundle)) for source in sources]
    check_output(out, job.inputs, sources)
    for file in find_parts(out).left_by(sources):  # by a run that was killed
        remove_file(file)
    n_docs = n_files = n_finished = 0
    for source, schema, settings in plans:
        if not job.overwrite and is_finished(final_of(out, source), settings):
            n_finished += 1
            continue
        with closing(_tables(source, heads, schema)) as tables:
            n_docs += _write(out, source, schema, tables, stop)
        n_files += 1
    remove_if_empty(out / PARTS)
    seconds = time.monotonic() - started
    return {
        "documents": n_docs,
        "seconds": round(seconds, 3),
        "documents_per_second": round(n_docs / seconds, 1),
        "files": n_files,
        "skipped_files": n_finished,
        "bundle": bundle.hash,
    }


def _look(source: SourceFile, bundle: Bundle) -> tuple[pa.Schema, dict[str, Any]]:
    """The schema of the new output, and its settings."""
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
    return _schema(source, schema, bundle, settings), settings


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


def _write(
    out: Location, source: SourceFile, schema: pa.Schema, tables: Iterable[pa.Table], stop: threading.Event
) -> int:
    """Write the new output and return its number of rows."""
    n_docs, target = 0, final_of(out, source)
    with (
        explained(target),
        writing(target, aside_of(out, source)) as stream,
        pq.ParquetWriter(stream, schema, compression="zstd") as writer,
    ):
        for table in tables:
            if stop.is_set():
                raise StopError("interrupted; start the same command again to continue")
            writer.write_table(table)
            n_docs += table.num_rows
    return n_docs


def _tables(source: SourceFile, heads: Heads, schema: pa.Schema) -> Generator[pa.Table]:
    new = [score_column(head) for head in json.loads(schema.metadata[METADATA_KEY])["heads"]]
    with open_parquet(source.location, 1 << 20) as file:
        stored = file.schema_arrow.names
        columns = [name for name in stored if name in schema.names or name == EMBEDDING]
        for batch in _batches(source, file, columns):
            vectors = batch.column(EMBEDDING)
            values = vectors.values.slice(
                vectors.offset * vectors.type.list_size, len(vectors) * vectors.type.list_size
            )
            matrix = values.to_numpy(zero_copy_only=False).reshape(len(vectors), -1).astype(np.float32, copy=False)
            scores = heads.score(np.nan_to_num(matrix))
            null = vectors.is_null().to_numpy(zero_copy_only=False)
            by_name = {name: batch.column(name) for name in batch.schema.names}
            by_name |= {name: pa.array(np.ascontiguousarray(scores[:, i]), mask=null) for i, name in enumerate(new)}
            yield pa.table([by_name[name] for name in schema.names], schema=schema)


def _batches(source: SourceFile, file: pq.ParquetFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
    try:
        yield from file.iter_batches(ROWS, columns=columns)
    except Exception as error:  # a remote file system has errors of its own
        raise InputError(f"{source.location} cannot be read to its end: {error}; start again") from error
