"""A job while it runs: follow what its workers have done, and finish files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

from jql_engine.errors import InputError, PartsError, UnreadableError
from jql_engine.files.chunks import ChunkDone, Task
from jql_engine.files.inputs import SourceFile
from jql_engine.files.location import Location
from jql_engine.files.output import OutputFile
from jql_engine.files.parts import Leftovers, find_leftovers
from jql_engine.files.storage import exists
from jql_engine.files.writing import explained
from jql_engine.job.apart import Child, CrashError
from jql_engine.job.claim import Claim
from jql_engine.job.plan import Work, tidy
from jql_engine.job.progress import Meter, RunLog
from jql_engine.job.unfinished import Unfinished

ASSEMBLERS = 2  # processes that finish files, each one file at a time


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result: finished and unfinished files."""

    n_files: int  # finished by this run
    unfinished: list[Unfinished]
    is_through: bool  # whether there is nothing left that the same command would go on with


def run(work: Work, chunks_done: Iterable[ChunkDone], meter: Meter, log: RunLog) -> Outcome:
    """Follow the tasks of `work` as `chunks_done` says, and finish every file whose chunks are all done.

    Raises OutputError where nothing can be written, or another job has taken the output folder.
    """
    ledger = _Ledger(work.outputs, work.tasks, meter)
    with _Assembly(work.claim) as assembly:
        for number in ledger.all_there():
            assembly.begin(number, work.outputs[number])
        for done in chunks_done:
            meter.record(done)
            _log(log, done, ledger, meter)
            for number in ledger.record(done):
                assembly.begin(number, work.outputs[number])
            for number, error in assembly.failures(wait=False):
                ledger.fail(number, error)
        for number, error in assembly.failures(wait=True):
            ledger.fail(number, error)
    if work.outputs:
        work.claim.check()
        # Again: the workers of a killed run live on for a moment, in which this run had begun already.
        leftovers = find_leftovers(work.claim.out)
        with explained(work.claim.out, "looked at"):
            stale = list(_useless_parts(ledger.done(), leftovers))
        tidy(work.claim.out, [output.file.source for output in work.outputs], stale, leftovers)
    unfinished = [*work.unreadable, *ledger.failed.values(), *(work.listing.gone if work.listing else ())]
    # A run that was stopped has files that are neither done nor failed. Those that cannot be read are in the next
    # listing as well; they do not keep the others from being made.
    is_through = len(ledger.done()) + len(ledger.failed) == len(work.outputs)
    if is_through and not ledger.again:
        work.run_file.end(unfinished)
    if work.listing is not None and is_through:
        waiting = work.listing.finish()
        if waiting:
            ranks = f"{', '.join(map(str, waiting[:8]))}{', ...' if len(waiting) > 8 else ''}"
            meter.say(f"jql: this rank is through; of {work.listing.rank.world_size}, not yet: {ranks}")
    unfinished += [Unfinished(str(log.file), log.failure)] if log.failure else []
    return Outcome(len(ledger.done()), unfinished, is_through and not ledger.again)


def _useless_parts(done: Sequence[OutputFile], leftovers: Leftovers) -> Iterator[Location]:
    """Parts of finished files, also those that a job which lost the folder wrote last.

    Whoever takes the folder over removes a finished file before it writes parts of it: while that is there, parts that
    were found before are nobody's.
    """
    for output in done:
        parts = leftovers.parts.get(output.file.source.relative.text, ())
        if parts and exists(output.final):
            yield from (output.parts / part.name for part in parts)


def _log(log: RunLog, done: ChunkDone, ledger: _Ledger, meter: Meter) -> None:
    failed = log.failure
    log.record(done, [ledger.name(segment.file) for segment in done.task.chunk.segments])
    if log.failure != failed:
        meter.say(f"jql: {log.failure}")


class _Ledger:
    """What is left of each file."""

    def __init__(self, outputs: Sequence[OutputFile], tasks: Sequence[Task], meter: Meter) -> None:
        self._outputs, self._meter = outputs, meter
        self._left = Counter(segment.file for task in tasks for segment in task.chunk.segments)
        self.failed: dict[int, Unfinished] = {}
        self.again: set[int] = set()  # of those, what the same command must make

    def name(self, number: int) -> str:
        return str(self._source(number).location)

    def all_there(self) -> list[int]:
        """Files whose parts are all done by a run that ended before it could join them."""
        return [number for number in range(len(self._outputs)) if number not in self._left]

    def record(self, done: ChunkDone) -> Iterator[int]:
        """Strike out what is done; yield the files whose parts are all there now."""
        failed = {failure.segment for failure in done.failures}
        for failure in done.failures:
            self.fail(failure.segment.file, InputError(failure.message))
        for segment in done.task.chunk.segments:
            self._left[segment.file] -= segment not in failed
            if not self._left[segment.file] and not self._outputs[segment.file].is_whole(segment):
                yield segment.file

    def fail(self, number: int, error: InputError | PartsError) -> None:
        if number not in self.failed:
            self.failed[number] = Unfinished(self.name(number), str(error), self._source(number).relative.text)
            self._meter.say(f"jql: {error}; going on with the other files")
        if isinstance(error, PartsError):
            self.again.add(number)

    def done(self) -> list[OutputFile]:
        """Files that this run has finished, once it is through."""
        undone = {number for number, count in self._left.items() if count} | self.failed.keys()
        return [output for number, output in enumerate(self._outputs) if number not in undone]

    def _source(self, number: int) -> SourceFile:
        return self._outputs[number].file.source


class _Assembly:
    """Finishes files beside the work on others, in processes of their own: reading a damaged file may crash one."""

    def __init__(self, claim: Claim) -> None:
        self._claim = claim
        self._free: SimpleQueue[Child] = SimpleQueue()
        self._children = [Child() for _ in range(ASSEMBLERS)]
        for child in self._children:
            self._free.put(child)
        self._pool = ThreadPoolExecutor(ASSEMBLERS, thread_name_prefix="assemble")
        self._running: list[tuple[int, Future[None]]] = []

    def begin(self, number: int, output: OutputFile) -> None:
        self._running.append((number, self._pool.submit(self._assemble, output)))

    def failures(self, wait: bool) -> Iterator[tuple[int, InputError | PartsError]]:
        """Files that could not be finished, of those that are through, or, with `wait`, of all; raises OutputError."""
        through = [(number, future) for number, future in self._running if wait or future.done()]
        self._running = [running for running in self._running if running not in through]
        for number, future in through:
            try:
                future.result()
            except (InputError, PartsError) as error:
                yield number, error

    def _assemble(self, output: OutputFile) -> None:
        child = self._free.get()
        try:
            child.call(output.assemble, self._claim.check)
        except CrashError as error:
            raise UnreadableError(f"{output.file.source.location} or its scores cannot be read: {error}") from error
        finally:
            self._free.put(child)

    def __enter__(self) -> _Assembly:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:  # a file that is being put together is left as it is, and no other begun
            self._pool.shutdown(wait=False, cancel_futures=True)
            for child in self._children:
                child.close()
        self._pool.shutdown(wait=True)
        for child in self._children:
            child.close()
