"""The bulk job: what is there to do, who does it, and what is finished by it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa

from jql_engine.bundle import Bundle
from jql_engine.data import Chunk, ChunkDone, Task, embedding_type, score_schema
from jql_engine.dataset import InputFile, SourceFile, find_files, split
from jql_engine.errors import BundleError, InputError, UnreadableError
from jql_engine.formats import open_file
from jql_engine.output import (
    PARTS,
    Kind,
    Parts,
    Target,
    check_names,
    check_output,
    check_settings,
    explained,
    final_of,
    find_parts,
    is_finished,
    part_name,
    parts_of,
)
from jql_engine.progress import Meter, RunLog
from jql_engine.ranks import Rank, share
from jql_engine.storage import Location, locate, remove_file, remove_folder, remove_if_empty

S = TypeVar("S")
T = TypeVar("T")
CHUNK_ROWS = 20_000
OPENERS = 16  # files looked into at once: on a remote file system each waits for the network
LIBRARIES = ("jql-engine", "onnxruntime", "onnxruntime-gpu", "tokenizers", "tokie")


@dataclass(frozen=True, slots=True)
class Job:
    """What to score, and where to."""

    inputs: tuple[str, ...]
    out: Location | str
    text_column: str = "text"
    id_column: str | None = None
    overwrite: bool = False
    output: Kind = "sidecar"
    embeddings: Literal["fp16", "fp32"] | None = None
    limit: int | None = None  # score the first documents only
    chunk_rows: int = CHUNK_ROWS
    rank: Rank = field(default_factory=Rank)

    @property
    def embedding_dtype(self) -> np.dtype[Any] | None:
        """The type in which vectors are kept."""
        return None if self.embeddings is None else np.dtype({"fp16": "float16", "fp32": "float32"}[self.embeddings])


@dataclass(frozen=True, slots=True)
class Unfinished:
    """An input file without a finished output, and why."""

    file: str
    reason: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it."""

    n_files: int  # finished by this run
    unfinished: list[Unfinished]


@dataclass(frozen=True, slots=True)
class Work:
    """What is left to do of a job."""

    targets: list[Target]
    tasks: list[Task]
    n_finished: int  # files
    unreadable: list[Unfinished]

    @property
    def n_docs(self) -> int:
        """Documents left to score."""
        return sum(task.chunk.n_docs for task in self.tasks)


def prepare(job: Job, bundle: Bundle, variant: str, chunk_bytes: int) -> Work:
    """Find and check all inputs and the output folder before anything is computed.

    Raises InputError, OutputError, and BundleError where the bundle has nothing to compute for this job.
    """
    if not bundle.heads and job.embeddings is None:
        raise BundleError(f"{bundle.path} has no heads, only embeddings; give --embeddings fp16 or fp32 to keep those")
    out = locate(job.out)
    sources = share(find_files(job.inputs), job.rank)
    settings = _settings(job, bundle, variant, chunk_bytes)
    scores = _score_schema(job, bundle)
    finished = set() if job.overwrite or job.limit else _finished(out, sources, settings)
    files, unreadable = _open_all(job, [source for source in sources if source not in finished])
    targets = [Target(out, file, scores, job.output, _of_source(settings, file)) for file in files]
    for target in targets:
        check_names(target.file, scores, job.output)
    check_output(out, job.inputs, sources)
    if job.limit and not job.overwrite:
        targets = [target for target in targets if not is_finished(target.final, target.settings)]
    parts = find_parts(out)
    _tidy(out, sources, finished if not job.overwrite else set(sources), parts)
    tasks = list(_tasks(job, targets, chunk_bytes, {} if job.overwrite else parts.rows))
    return Work(targets, tasks, len(sources) - len(targets) - len(unreadable), unreadable)


def run(work: Work, chunks_done: Iterable[ChunkDone], meter: Meter, log: RunLog) -> Outcome:
    """Follow the tasks of `work` as `chunks_done` says, and finish every file whose chunks are all done.

    Raises OutputError where nothing can be written.
    """
    ledger = _Ledger(work.targets, work.tasks, meter)
    with _Assembly() as assembly:
        for number in ledger.all_there():
            assembly.begin(number, work.targets[number])
        for done in chunks_done:
            meter.record(done)
            log.record(done, [ledger.name(segment.file) for segment in done.task.chunk.segments])
            for number in ledger.record(done):
                assembly.begin(number, work.targets[number])
        for number, reason in assembly.failures():
            ledger.fail(number, reason)
    for out in {target.out for target in work.targets}:
        remove_if_empty(out / PARTS)
    return Outcome(ledger.n_files_done(), [*work.unreadable, *ledger.failed.values()])


class _Ledger:
    """What is left of each file."""

    def __init__(self, targets: Sequence[Target], tasks: Sequence[Task], meter: Meter) -> None:
        self._targets, self._meter = targets, meter
        self._left = Counter(segment.file for task in tasks for segment in task.chunk.segments)
        self.failed: dict[int, Unfinished] = {}

    def name(self, number: int) -> str:
        return str(self._targets[number].file.source.location)

    def all_there(self) -> list[int]:
        """Files whose parts are all done by a run that ended before it could join them."""
        return [number for number in range(len(self._targets)) if number not in self._left]

    def record(self, done: ChunkDone) -> Iterator[int]:
        """Strike out what is done; yield the files whose parts are all there now."""
        failed = {failure.segment for failure in done.failures}
        for failure in done.failures:
            self.fail(failure.segment.file, failure.message)
        for segment in done.task.chunk.segments:
            self._left[segment.file] -= segment not in failed
            if not self._left[segment.file] and not self._targets[segment.file].is_whole(segment):
                yield segment.file

    def fail(self, number: int, reason: str) -> None:
        if number not in self.failed:
            self.failed[number] = Unfinished(self.name(number), reason)
            self._meter.say(f"jql-run: {reason}; going on with the other files")

    def n_files_done(self) -> int:
        undone = {number for number, count in self._left.items() if count} | self.failed.keys()
        return len(self._targets) - len(undone)


class _Assembly:
    """Finishes files beside the work on others, one at a time."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="assemble")
        self._running: list[tuple[int, Future[None]]] = []

    def begin(self, number: int, target: Target) -> None:
        self._running.append((number, self._pool.submit(target.assemble)))

    def failures(self) -> Iterator[tuple[int, str]]:
        """Wait for all; raises OutputError."""
        for number, future in self._running:
            try:
                future.result()
            except InputError as error:
                yield number, str(error)

    def __enter__(self) -> _Assembly:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._pool.shutdown(wait=kind is None, cancel_futures=True)


def open_inputs(job: Job) -> tuple[list[InputFile], list[Unfinished]]:
    """The files of `job` that can be read, and those that cannot; raises InputError."""
    return _open_all(job, share(find_files(job.inputs), job.rank))


def _finished(out: Location, sources: Sequence[SourceFile], settings: dict[str, Any]) -> set[SourceFile]:
    def check(source: SourceFile) -> bool:
        return is_finished(final_of(out, source), settings | _source_settings(source, None))

    return {source for source, done in zip(sources, _in_threads(check, sources), strict=True) if done}


def _open_all(job: Job, sources: Sequence[SourceFile]) -> tuple[list[InputFile], list[Unfinished]]:
    """The files that can be read; raises InputError where one has not the columns, or none can be read."""

    def look(source: SourceFile) -> InputFile | UnreadableError:
        try:
            return open_file(source, job.text_column, job.id_column)
        except UnreadableError as error:
            return error

    files, errors, unreadable = [], [], []
    for source, result in zip(sources, _in_threads(look, sources), strict=True):
        if isinstance(result, InputFile):
            files.append(result)
        else:
            errors.append(result)
            unreadable.append(Unfinished(str(source.location), str(result)))
    if errors and not files:
        raise errors[0]
    return list(_first(files, job.limit)) if job.limit else files, unreadable


def _in_threads(function: Callable[[S], T], items: Sequence[S]) -> list[T]:
    with ThreadPoolExecutor(OPENERS) as pool:
        return list(pool.map(function, items))


def _first(files: Iterable[InputFile], n_docs: int) -> Iterator[InputFile]:
    for file in files:
        if n_docs <= 0:
            return
        yield file if file.n_rows <= n_docs else file.first(n_docs)
        n_docs -= file.n_rows


def _tidy(out: Location, sources: Sequence[SourceFile], done: set[SourceFile], parts: Parts) -> None:
    """Remove what killed runs left of `sources`: files they were writing, and parts of those that are `done` with."""
    with explained(out / PARTS, "tidied up"):
        for file in parts.left_by(sources):
            remove_file(file)
        for source in done:
            if source.relative.as_posix() in parts.rows:
                remove_folder(parts_of(out, source), out / PARTS)


def _tasks(
    job: Job, targets: Sequence[Target], chunk_bytes: int, parts: Mapping[str, set[tuple[int, int]]]
) -> Iterator[Task]:
    """Chunks that are not done; raises OutputError for parts of another job."""
    done: dict[int, set[tuple[int, int]]] = {}
    for number, target in enumerate(targets):
        if found := parts.get(target.file.source.relative.as_posix()):
            _in_threads(partial(_check_part, target), sorted(found))
            done[number] = found
    chunks = split([target.file for target in targets], job.chunk_rows, chunk_bytes)
    for number, chunk in enumerate(chunks):
        left = tuple(s for s in chunk.segments if (s.start, s.stop) not in done.get(s.file, ()))
        if left:
            yield Task(number, Chunk(left))


def _check_part(target: Target, rows: tuple[int, int]) -> None:
    check_settings(target.parts / part_name(*rows), target.settings)


def _score_schema(job: Job, bundle: Bundle) -> pa.Schema:
    dtype = job.embedding_dtype
    kept = None if dtype is None else embedding_type(bundle.manifest.encoder.hidden_size, dtype)
    return score_schema(bundle.heads, kept)


def _settings(job: Job, bundle: Bundle, variant: str, chunk_bytes: int) -> dict[str, Any]:
    """What decides about the scores; written into every output."""
    return {
        "bundle": bundle.hash,
        "encoder": bundle.encoder_hash,
        "variant": variant,
        "precision": bundle.manifest.variants[variant].precision,
        "heads": list(bundle.heads),
        "output": job.output,
        "embeddings": job.embeddings,
        "text_column": job.text_column,
        "id_column": job.id_column,
        "chunk_rows": job.chunk_rows,
        "chunk_bytes": chunk_bytes,
        **{name: found for name in LIBRARIES if (found := _version(name))},
    }


def _source_settings(source: SourceFile, rows: int | None) -> dict[str, Any]:
    return {"source_bytes": source.size, "source_version": source.version, "limit": rows}


def _of_source(settings: dict[str, Any], file: InputFile) -> dict[str, Any]:
    return settings | _source_settings(file.source, file.limit)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
