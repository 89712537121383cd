"""The bulk job: what is there to do, who does it, and what is finished by it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa

from jql_engine.bundle import Bundle
from jql_engine.data import Chunk, ChunkDone, Task, embedding_type, score_schema
from jql_engine.dataset import InputFile, SourceFile, find_files, split
from jql_engine.errors import BundleError, InputError, PartsError, UnreadableError
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
    is_written_by_us,
    part_name,
    parts_of,
    settings_of,
)
from jql_engine.progress import Meter, RunLog
from jql_engine.ranks import Rank, share
from jql_engine.storage import Location, locate, remove_empty_folders, remove_file, remove_folder

S = TypeVar("S")
T = TypeVar("T")
CHUNK_ROWS = 20_000
ASSEMBLERS = 4  # files finished at once
OPENERS = 16  # files looked into at once: on a remote file system each waits for the network
LIBRARIES = ("jql-engine", "tokenizers")
COMPUTE = {  # by the provider of the variant
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "tensorrt-rtx-cu13-libs", "onnxruntime-gpu"),
}


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
    out, settings = locate(job.out), _settings(job, bundle, variant, chunk_bytes)
    sources, finished = find_files(job.inputs), set()
    if job.limit is None:
        sources = share(sources, job.rank)
        finished = set() if job.overwrite else _finished(out, sources, settings)
    files, unreadable = _open(job, sources, finished)
    sources = sources if job.limit is None else [file.source for file in files]
    targets = [Target(out, file, _score_schema(job, bundle), job.output, settings) for file in files]
    for target in targets:
        check_names(target.file, target.scores, job.output)
    check_output(out, job.inputs, sources)
    if job.limit is not None and not job.overwrite:
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
            for number, reason in assembly.failures(wait=False):
                ledger.fail(number, reason)
        for number, reason in assembly.failures(wait=True):
            ledger.fail(number, reason)
    # Again: the workers of a killed run live on for a moment, in which this run had begun already.
    done_with = {target.file.source for target in ledger.done()}
    for out in {target.out for target in work.targets}:
        _tidy(out, [target.file.source for target in work.targets], done_with, find_parts(out))
    return Outcome(len(done_with), [*work.unreadable, *ledger.failed.values()])


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

    def done(self) -> list[Target]:
        """Files that this run has finished, once it is through."""
        undone = {number for number, count in self._left.items() if count} | self.failed.keys()
        return [target for number, target in enumerate(self._targets) if number not in undone]


class _Assembly:
    """Finishes files beside the work on others, a few at a time."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(ASSEMBLERS, thread_name_prefix="assemble")
        self._running: list[tuple[int, Future[None]]] = []

    def begin(self, number: int, target: Target) -> None:
        self._running.append((number, self._pool.submit(target.assemble)))

    def failures(self, wait: bool) -> Iterator[tuple[int, str]]:
        """Files that could not be finished, of those that are through, or, with `wait`, of all; raises OutputError."""
        through = [(number, future) for number, future in self._running if wait or future.done()]
        self._running = [running for running in self._running if running not in through]
        for number, future in through:
            try:
                future.result()
            except (InputError, PartsError) as error:
                yield number, str(error)

    def __enter__(self) -> _Assembly:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._pool.shutdown(wait=kind is None, cancel_futures=True)


def open_inputs(job: Job) -> tuple[list[InputFile], list[Unfinished]]:
    """The files of `job` that can be read, and those that cannot; raises InputError."""
    sources = find_files(job.inputs)
    return _open(job, sources if job.limit else share(sources, job.rank), set())


def _finished(out: Location, sources: Sequence[SourceFile], settings: dict[str, Any]) -> set[SourceFile]:
    def check(source: SourceFile) -> bool:
        return is_finished(final_of(out, source), settings_of(settings, source))

    return {source for source, done in zip(sources, _in_threads(check, sources), strict=True) if done}


def _open(
    job: Job, sources: Sequence[SourceFile], finished: set[SourceFile]
) -> tuple[list[InputFile], list[Unfinished]]:
    """Open `sources` but those `finished`; with a limit this rank's of the first that hold so many documents.

    Raises InputError where a file has not the columns, or none can be read.
    """
    files: list[InputFile] = []
    errors: list[tuple[SourceFile, UnreadableError]] = []
    wanted = [source for source in sources if source not in finished]
    step = len(wanted) if job.limit is None else OPENERS
    for start in range(0, len(wanted), max(1, step)):
        group = wanted[start : start + step]
        for source, found in zip(group, _in_threads(partial(_look, job), group), strict=True):
            files += [found] if isinstance(found, InputFile) else []
            errors += [(source, found)] if isinstance(found, UnreadableError) else []
        if job.limit is not None and sum(file.n_rows for file in files) >= job.limit:
            break
    if errors and not files:
        raise errors[0][1]
    if job.limit is not None:
        files = list(_first(files, job.limit))
        mine = set(share([file.source for file in files], job.rank))
        files = [file for file in files if file.source in mine]
    return _with_shared_schemas(files), [Unfinished(str(source.location), str(error)) for source, error in errors]


def _look(job: Job, source: SourceFile) -> InputFile | UnreadableError:
    try:
        return open_file(source, job.text_column, job.id_column)
    except UnreadableError as error:
        return error


def _with_shared_schemas(files: Sequence[InputFile]) -> list[InputFile]:
    """One object for equal schemas: of a hundred thousand files each would keep half a gigabyte."""
    known: dict[bytes, pa.Schema] = {}
    return [replace(file, schema=known.setdefault(file.schema.serialize().to_pybytes(), file.schema)) for file in files]


def _in_threads(function: Callable[[S], T], items: Sequence[S]) -> list[T]:
    pool = ThreadPoolExecutor(OPENERS)
    try:
        return list(pool.map(function, items))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # one may sleep between two attempts


def _first(files: Iterable[InputFile], n_docs: int) -> Iterator[InputFile]:
    for file in files:
        if n_docs <= 0:
            return
        yield file if file.n_rows <= n_docs else file.first(n_docs)
        n_docs -= file.n_rows


def _tidy(out: Location, sources: Sequence[SourceFile], done: set[SourceFile], parts: Parts) -> None:
    """Remove what killed runs left of `sources`: files they were writing, parts of those `done`, empty folders."""
    with explained(out / PARTS, "tidied up"):
        for file in parts.left_by(sources):
            remove_file(file)
        for source in done:
            if source.relative.text in parts.rows:
                remove_folder(parts_of(out, source), out / PARTS)
        remove_empty_folders(out / PARTS)


def _tasks(
    job: Job, targets: Sequence[Target], chunk_bytes: int, parts: Mapping[str, set[tuple[int, int]]]
) -> Iterator[Task]:
    """Chunks that are not done; raises OutputError for parts of another job."""
    done: dict[int, set[tuple[int, int]]] = {}
    for number, target in enumerate(targets):
        if found := parts.get(target.file.source.relative.text):
            usable = _in_threads(partial(_is_usable, target), sorted(found))
            done[number] = {rows for rows, fine in zip(sorted(found), usable, strict=True) if fine}
    chunks = split([target.file for target in targets], job.chunk_rows, chunk_bytes)
    for number, chunk in enumerate(chunks):
        left = tuple(s for s in chunk.segments if (s.start, s.stop) not in done.get(s.file, ()))
        if left:
            yield Task(number, Chunk(left))


def _is_usable(target: Target, rows: tuple[int, int]) -> bool:
    """Whether a part can be read; removes one that cannot. Raises OutputError where it is another job's."""
    part = target.parts / part_name(*rows)
    if not is_written_by_us(part):
        remove_file(part)
        return False
    check_settings(part, target.settings)
    return True


def _score_schema(job: Job, bundle: Bundle) -> pa.Schema:
    dtype = job.embedding_dtype
    kept = None if dtype is None else embedding_type(bundle.manifest.encoder.hidden_size, dtype)
    return score_schema(bundle.heads, kept)


def _settings(job: Job, bundle: Bundle, variant: str, chunk_bytes: int) -> dict[str, Any]:
    """What decides about the scores; written into every output."""
    compute = COMPUTE.get(bundle.manifest.variants[variant].provider, ("onnxruntime", "onnxruntime-gpu"))
    return {
        "bundle": bundle.hash,
        "encoder": bundle.encoder_hash,
        "variant": variant,
        "precision": bundle.manifest.variants[variant].precision,
        "heads": list(bundle.heads),
        "tokenizer": bundle.manifest.tokenizer.fast or "tokenizers",
        "output": job.output,
        "embeddings": job.embeddings,
        "text_column": job.text_column,
        "id_column": job.id_column,
        "chunk_rows": job.chunk_rows,
        "chunk_bytes": chunk_bytes,
        **{name: found for name in (*LIBRARIES, *compute) if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
