"""Score files: one parquet per input file, written aside and renamed when complete."""

from __future__ import annotations

import errno
import glob
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jql_engine.data import Chunk, score_schema
from jql_engine.dataset import InputFile, fixed_part
from jql_engine.errors import OutputError

METADATA_KEY = b"jql_engine"


def check_output(out: Path, inputs: Sequence[str], files: Sequence[InputFile], heads: Sequence[str]) -> None:
    """Create the folder `out` and make sure that this job may write there; raises OutputError."""
    for given in inputs:
        _check_apart(out, given)
    sources = {file.path.resolve() for file in files}
    for file in files:
        if (target := (out / file.relative).resolve()) in sources:
            raise OutputError(f"the scores of {file.path} would overwrite the input {target}; choose another --out")
        if file.id_column in score_schema(heads).names:
            raise OutputError(f"{file.path}: the id column {file.id_column!r} has the name of a score column")
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".jql-run-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"--out {out} is not a folder that can be written: {error.strerror}") from error


def is_finished(target: Path, settings: Mapping[str, Any]) -> bool:
    """True if `target` is the complete output of this very job; raises OutputError if it is another's."""
    if not target.exists():
        return False
    try:
        found = dict(json.loads(pq.read_schema(target).metadata[METADATA_KEY]))
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise OutputError(f"{target} exists and was not written by jql-run; move it, or give --overwrite") from error
    if different := [key for key in {**settings, **found} if found.get(key) != settings.get(key)]:
        key = different[0]
        raise OutputError(
            f"{target} exists and was computed with other settings: {key} was {found.get(key)!r}, is now "
            f"{settings.get(key)!r}; choose another --out, or give --overwrite"
        )
    return True


class ScoreWriter:
    """Takes the scores of chunk after chunk and writes file after file."""

    def __init__(
        self, out: Path, files: Sequence[InputFile], heads: Sequence[str], settings: Sequence[Mapping[str, Any]]
    ) -> None:
        """`settings` of each file go into its metadata; every file's rows must arrive in order."""
        self._out, self._files, self._heads, self._settings = out, files, heads, settings
        self._open: _OpenFile | None = None

    def put(self, chunk: Chunk, scores: pa.Table, ids: Sequence[pa.ChunkedArray | None]) -> None:
        """Append `scores`, the columns of `score_schema` for all documents of `chunk`; raises OutputError."""
        start = 0
        for segment, segment_ids in zip(chunk.segments, ids, strict=True):
            n_rows = segment.stop - segment.start
            table = scores.slice(start, n_rows)
            if segment_ids is not None:
                table = table.add_column(0, self._files[segment.file].id_field, segment_ids)
            self._append(segment.file, table)
            start += n_rows

    def _append(self, number: int, table: pa.Table) -> None:
        file = self._files[number]
        target = self._out / file.relative
        try:
            if self._open is None:
                self._open = _OpenFile(target, self._schema(number))
            self._open.write(table)
            if self._open.n_rows == file.n_rows:
                self._open.finish()
                self._open = None
        except OSError as error:
            advice = "free some space" if error.errno == errno.ENOSPC else "check the folder"
            raise OutputError(
                f"{target} cannot be written: {error.strerror or error}; {advice} and start again"
            ) from error

    def _schema(self, number: int) -> pa.Schema:
        id_field = self._files[number].id_field
        fields = [] if id_field is None else [id_field]
        metadata = {METADATA_KEY: json.dumps(self._settings[number])}
        return pa.schema([*fields, *score_schema(self._heads)], metadata=metadata)

    def close(self) -> None:
        """Drop a file that was begun and not finished."""
        if self._open is not None:
            self._open.discard()


class _OpenFile:
    """A parquet file in the making, under a name that no reader takes for data."""

    def __init__(self, target: Path, schema: pa.Schema) -> None:
        self.n_rows = 0
        self._target, self._aside = target, target.with_name(f".{target.name}.writing")
        target.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self._aside.open("wb")
        self._writer = pq.ParquetWriter(self._stream, schema, compression="zstd")

    def write(self, table: pa.Table) -> None:
        if table.num_rows:
            self._writer.write_table(table.cast(self._writer.schema))
        self.n_rows += table.num_rows

    def finish(self) -> None:
        self._writer.close()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._aside.rename(self._target)

    def discard(self) -> None:
        # What was written is dropped: that it cannot be completed (a full disk, say) is no news.
        with suppress(OSError, ValueError):
            self._writer.close()
        with suppress(OSError):
            self._stream.close()
        self._aside.unlink(missing_ok=True)


def _check_apart(out: Path, given: str) -> None:
    """The next run would read this run's output."""
    if Path(given).is_dir():
        inside = _contains(Path(given), out)
    elif glob.has_magic(given) and not Path(given).exists():
        inside = _contains(fixed_part(given), out) if "**" in given else fixed_part(given).resolve() == out.resolve()
    else:
        inside = False
    if inside:
        raise OutputError(f"--out {out} lies inside of the input {given}; choose a folder outside of it")


def _contains(folder: Path, inner: Path) -> bool:
    return inner.resolve().is_relative_to(folder.resolve())
