"""Score files: parts of a file as its chunks are done, then the finished file; each appears complete or not at all.

    OUT/a/b.parquet                              the scores of the input a/b.parquet, all rows in order
    OUT/.parts/a/b.parquet/<start>-<stop>.parquet    rows [start, stop) while the file is not finished

Which files and rows are finished is what is there: no database, no lock. Two runs on one output by mistake do work
twice and no harm: each writes under names of its own, and a file that the other has finished is finished.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import socket
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from jql_engine.data import EMBEDDING, Segment
from jql_engine.dataset import InputFile, SourceFile, fixed_part, fixed_part_of_url, identity
from jql_engine.dictionaries import decode, is_text
from jql_engine.errors import EngineError, OutputError, PartsError
from jql_engine.reading import Cursor, check_unchanged
from jql_engine.storage import (
    Location,
    exists,
    is_remote,
    list_files,
    locate,
    open_parquet,
    read_schema,
    remove_file,
    remove_folder,
    retry,
    write,
    writing,
)

METADATA_KEY = b"jql_engine"
PARTS = ".parts"
OTHER_HOST_SECONDS = 24 * 3600.0
PROBE = ".jql-run"  # always the same name: where a run is killed beside it, the next one removes it
# A row group of the finished file closes past either of these.
GROUP_ROWS = 100_000
GROUP_BYTES = 64 << 20
Kind: TypeAlias = Literal["sidecar", "append"]
Settings: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Target:
    """Where the scores of one input file go, and what is written into its metadata."""

    out: Location
    file: InputFile
    scores: pa.Schema  # of the columns that scoring adds
    kind: Kind
    shared: Settings  # of the whole job, one object for all files

    @property
    def settings(self) -> dict[str, Any]:
        """What decides about the scores of this file; written into its metadata."""
        return settings_of(self.shared, self.file.source, self.file.limit)

    @property
    def final(self) -> Location:
        """The finished file."""
        return final_of(self.out, self.file.source)

    @property
    def parts(self) -> Location:
        """The folder of the parts."""
        return parts_of(self.out, self.file.source)

    @property
    def aside(self) -> Location:
        """A new name for what is not finished yet."""
        return aside_of(self.out, self.file.source)

    @property
    def part_schema(self) -> pa.Schema:
        """Id column and scores."""
        id_field = self.file.id_field
        fields = [] if id_field is None or self.kind == "append" else [id_field]
        return pa.schema([*fields, *self.scores], metadata={METADATA_KEY: json.dumps(self.settings)})

    def is_whole(self, segment: Segment) -> bool:
        """Whether the scores of `segment` are the finished file."""
        return self.kind == "sidecar" and (segment.start, segment.stop) == (0, self.file.n_rows)

    def commit(self, segment: Segment, scores: pa.Table, ids: pa.ChunkedArray | None) -> None:
        """Write the scores of a segment, as the finished file where it is all of it; raises OutputError."""
        schema = self.part_schema
        if len(schema) > scores.num_columns:
            empty = pa.chunked_array([], schema.field(0).type)
            scores = scores.add_column(0, schema.field(0).name, empty if ids is None else ids)
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, schema, compression="zstd", use_dictionary=with_dictionary(schema)) as out:
            for rows in decode(scores, schema, GROUP_BYTES):
                out.write_table(rows)
        with explained(self.final):
            part = self.parts / part_name(segment.start, segment.stop)
            write(self.final if self.is_whole(segment) else part, sink.getvalue(), self.aside)

    def assemble(self) -> None:
        """Write the finished file from its parts and remove them.

        Raises OutputError; InputError where the source was changed or cannot be read, PartsError where parts are gone.
        """
        try:
            self._assemble()
        except PartsError:
            if not is_finished(self.final, self.settings):
                raise
            with explained(self.final):  # another run on the same output was faster
                remove_folder(self.parts, self.out / PARTS)

    def _assemble(self) -> None:
        tables = self._append() if self.kind == "append" else self._tables()
        schema = self._final_schema()
        with explained(self.final):
            dictionary = with_dictionary(schema) if self.kind == "sidecar" else True
            with (
                writing(self.final, self.aside) as stream,
                pq.ParquetWriter(stream, schema, compression="zstd", use_dictionary=dictionary) as out,
            ):
                for group in _groups(tables):
                    out.write_table(group.cast(schema))
                check_unchanged(self.file.source)
            remove_folder(self.parts, self.out / PARTS)

    def _final_schema(self) -> pa.Schema:
        if self.kind == "sidecar":
            return self.part_schema
        source = self.file.schema
        metadata = {**(source.metadata or {}), METADATA_KEY: json.dumps(self.settings)}
        return pa.schema([*source, *self.scores], metadata=metadata)

    def _tables(self) -> Iterator[pa.Table]:
        row = 0
        for start, stop in sorted(part for part in (rows_of(name) for _, name in list_files(self.parts)) if part):
            if start != row:
                raise PartsError(f"{self.parts} lacks rows {row} to {start}; start the same command again")
            yield from decode(
                _read_part(self.parts / part_name(start, stop), self.part_schema), self.part_schema, GROUP_BYTES
            )
            row = stop
        if row != self.file.n_rows:
            raise PartsError(f"{self.parts} lacks rows {row} to {self.file.n_rows}; start the same command again")

    def _append(self) -> Iterator[pa.Table]:
        """The source's own columns and the scores beside them."""
        cursor = Cursor(self.file, 0, None)
        for scores in self._tables():
            at = 0
            for batch in cursor.take(scores.num_rows):
                columns = scores.slice(at, batch.num_rows)
                at += batch.num_rows
                arrays = [*(pa.chunked_array([column]) for column in batch.columns), *columns.columns]
                yield pa.table(arrays, schema=pa.schema([*batch.schema, *self.scores]))


def _read_part(part: Location, schema: pa.Schema) -> pa.Table:
    """The rows of a part; texts, which only the ids are, as dictionaries."""
    texts = [field.name for field in schema if is_text(field.type)]

    def read() -> pa.Table:
        with open_parquet(part, dictionaries=texts) as file:
            return file.read()

    try:
        return retry(part, read)
    except FileNotFoundError as error:
        raise PartsError(f"{part} is gone; start the same command again") from error


def with_dictionary(schema: pa.Schema) -> bool | list[str]:
    """Columns to encode with a dictionary: not the vectors, which read 4 times and write 3 times as fast without."""
    return [name for name in schema.names if name != EMBEDDING] if EMBEDDING in schema.names else True


def settings_of(shared: Settings, source: SourceFile, limit: int | None = None) -> dict[str, Any]:
    """The settings of a job and of one of its files."""
    return {**shared, "source_bytes": source.size, "source_version": source.version, "limit": limit}


def final_of(out: Location, source: SourceFile) -> Location:
    """The finished file of an input."""
    return source.relative.below(out)


def parts_of(out: Location, source: SourceFile) -> Location:
    """The folder of an input's parts."""
    return source.relative.below(out / PARTS)


def aside_of(out: Location, source: SourceFile) -> Location:
    """A new name for what is not finished yet of an input's output; `Parts.left_by` finds it after a kill."""
    return out / PARTS / f".{_digest(source)}.{_host()}.{os.getpid()}-{_started(os.getpid())}.{uuid4().hex}.writing"


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _started(process: int) -> str | None:
    """When a process of this machine began, in ticks since it was switched on; None where there is none any more.

    The number alone would not do: another process, or a thread of one, may have it by now.
    """
    try:
        status = Path("/proc", str(process), "stat").read_text(encoding="utf-8")
    except OSError:
        return None
    state, *fields = status.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]  # fields 3 and 22 of proc(5); a zombie writes no more


def _is_left(file: Location) -> bool:
    """Whether whoever was writing `file` is gone: on this machine as it is, on another after a day."""
    _, _, host, process, *_ = file.name.split(".")
    number, _, started = process.partition("-")
    if host == _host() and number.isdigit():
        return _started(int(number)) != started
    return isinstance(file, Path) and time.time() - file.stat().st_mtime > OTHER_HOST_SECONDS


def _digest(source: SourceFile) -> str:
    return hashlib.sha256(source.relative.text.encode()).hexdigest()[:16]


def part_name(start: int, stop: int) -> str:
    """The file name of rows [start, stop); names sort as rows do."""
    return f"{start:012}-{stop:012}.parquet"


def rows_of(name: str) -> tuple[int, int] | None:
    """The rows that a file name in a parts folder stands for."""
    start, _, stop = name.removesuffix(".parquet").partition("-")
    return (int(start), int(stop)) if start.isdigit() and stop.isdigit() else None


@dataclass(frozen=True, slots=True)
class Parts:
    """What is there of files that are not finished."""

    rows: dict[str, set[tuple[int, int]]]  # done, by the path of the file below the output folder
    unfinished: list[Location]  # files that a run was writing when it was killed, or is writing

    def left_by(self, sources: Iterable[SourceFile]) -> list[Location]:
        """The unfinished files of these inputs that nobody is writing any more."""
        digests = {_digest(source) for source in sources}
        return [file for file in self.unfinished if file.name.split(".")[1] in digests and _is_left(file)]


def find_parts(out: Location) -> Parts:
    """Look into the folder of parts."""
    found = Parts(defaultdict(set), [])
    with explained(out / PARTS, "listed"):
        files = list_files(out / PARTS)
    for location, name in files:
        file, _, part = name.rpartition("/")
        if rows := rows_of(part):
            found.rows[file].add(rows)
        elif name.endswith(".writing") and name.count(".") == 5:
            found.unfinished.append(location)
    return found


def check_output(out: Location, inputs: Sequence[str], sources: Sequence[SourceFile]) -> None:
    """Create the folder `out` and make sure that this job may write there; raises OutputError."""
    for given in inputs:
        _check_apart(out, given)
    places = {identity(source.location) for source in sources}
    for source in sources:
        if (target := identity(final_of(out, source))) in places:
            raise OutputError(
                f"the scores of {source.location} would overwrite the input {target}; choose another --out"
            )
    try:
        if isinstance(out, Path):
            out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=out):
                pass
        else:
            write(out / PROBE, pa.py_buffer(b""), out / PROBE)
            remove_file(out / PROBE)
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise OutputError(f"--out {out} is not a folder that can be written: {reason}") from error


def check_names(file: InputFile, scores: pa.Schema, kind: Kind) -> None:
    """Raise OutputError where a column of the source has the name of a score column."""
    location = file.source.location
    if kind == "append" and file.source.format != "parquet":
        raise OutputError(f"{location}: --output append writes the columns of parquet files; use --output sidecar")
    kept = file.schema.names if kind == "append" else [file.id_column]
    for name in kept:
        if kept.count(name) > 1:
            raise OutputError(f"{location} has {kept.count(name)} columns named {name!r}; use --output sidecar")
        if name in scores.names:
            what = "the id column" if kind == "sidecar" else "a column"
            raise OutputError(f"{location}: {what} {name!r} has the name of a score column; choose other head names")


def is_finished(target: Location, settings: Settings) -> bool:
    """True if `target` is the complete output of this very job; raises OutputError if it is another's."""
    with explained(target, "looked for"):
        if not exists(target):
            return False
    check_settings(target, settings)
    return True


def check_settings(target: Location, settings: Settings) -> None:
    """Raise OutputError where the finished file or part `target` was not written with these `settings`."""
    metadata = _metadata_of(target)
    try:
        found = dict(json.loads(metadata[METADATA_KEY]))
    except (KeyError, TypeError, ValueError) as error:
        raise OutputError(f"{target} exists and was not written by jql-run; move it, or give --overwrite") from error
    if different := [key for key in {**settings, **found} if found.get(key) != settings.get(key)]:
        key = different[0]
        raise OutputError(
            f"{target} exists and was computed with other settings: {key} was {found.get(key)!r}, is now "
            f"{settings.get(key)!r}; choose another --out, or give --overwrite"
        )


def is_written_by_us(file: Location) -> bool:
    """False for what is damaged, or another program's."""
    return METADATA_KEY in _metadata_of(file)


def _metadata_of(target: Location) -> dict[bytes, bytes]:
    """Of a parquet file; empty where it is none."""
    with explained(target, "read"):
        try:
            return dict(read_schema(target).metadata or {})
        except pa.ArrowException:
            return {}
        except OSError:
            if is_remote(target):
                raise
            return {}


def _groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Join consecutive tables up to the size of a row group."""
    together: list[pa.Table] = []
    rows = size = 0
    for table in tables:
        if together and (rows + table.num_rows > GROUP_ROWS or size + table.nbytes > GROUP_BYTES):
            yield pa.concat_tables(together)
            together, rows, size = [], 0, 0
        together.append(table)
        rows, size = rows + table.num_rows, size + table.nbytes
    if together:
        yield pa.concat_tables(together)


@contextmanager
def explained(target: Location, done: str = "written") -> Iterator[None]:
    """What the file system says, as an OutputError."""
    try:
        yield
    except EngineError:
        raise
    except OSError as error:
        place = f" in {tempfile.gettempdir()}" if is_remote(target) else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = f"free some space{place}" if full else "check the folder"
        raise OutputError(f"{target} cannot be {done}: {error.strerror or error}; {advice} and start again") from error
    except Exception as error:  # every file system has errors of its own
        if not is_remote(target):
            raise
        raise OutputError(f"{target} cannot be {done}: {type(error).__name__}: {error}; start again") from error


def _check_apart(out: Location, given: str) -> None:
    """The next run would read this run's output."""
    location = locate(given)
    if is_remote(out) != is_remote(location):
        return
    if isinstance(location, Path):
        given = str(location)
    if not isinstance(out, Path):
        url = fixed_part_of_url(given) if glob.has_magic(given) else given
        inside = f"{out}/".startswith(url.rstrip("/") + "/")
    elif Path(given).is_dir():
        inside = _contains(Path(given), out)
    elif glob.has_magic(given) and not Path(given).exists():
        root = fixed_part(given)
        inside = _contains(root, out) if "**" in given else root.resolve() == out.resolve()
    else:
        inside = False
    if inside:
        raise OutputError(f"--out {out} lies inside of the input {given}; choose a folder outside of it")


def _contains(folder: Path, inner: Path) -> bool:
    return inner.resolve().is_relative_to(folder.resolve())
