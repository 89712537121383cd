"""Workers, each in a process of its own with its own device or cores, so that the job outlives whatever they die of.

A worker keeps to one file while that has chunks left, then takes a file that nobody has, then helps with the file that
has the most left. A worker that dies is replaced, and what it had in hand is done again, one chunk at a time, so that
a second death names its chunk; that chunk has failed, its file stays unfinished.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
import traceback
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Protocol, TypeAlias

from jql_engine.errors import EngineError
from jql_engine.files.chunks import Chunk, ChunkDone, Failure, Task
from jql_engine.files.output import OutputFile
from jql_engine.files.retries import RetryPolicy, current_retries, set_retries
from jql_engine.job.apart import die_with_parent, start
from jql_engine.printing import counted

IN_FLIGHT = 4  # tasks a worker holds, so that each of its stages has one
DEATHS = 2  # of workers on one chunk, after which it has failed
PROGRESS_SECONDS = 0.5
POLL_SECONDS = 0.2  # between looks at `stop` while no worker says anything


class Spec(Protocol):
    """What a worker process needs to begin; picklable."""

    @property
    def device(self) -> str:
        """The device, cpu or cuda:N, for messages."""
        ...

    def open(
        self,
        outputs: Mapping[int, OutputFile],
        stop: threading.Event,
        executed: Callable[[int, int, int], None],
        say: Callable[[str], None],
    ) -> Callable[[Iterable[Task]], Generator[ChunkDone]]:
        """Get ready; returns what turns tasks into committed chunks.

        `outputs` are those of the tasks in hand; once `stop` is set no other chunk is begun; `executed` is told of
        documents, tokens and padding as they are computed, `say` of what takes minutes, a sentence each.
        """
        ...


@dataclass(frozen=True, slots=True)
class Executed:
    """What a worker has computed since it last said so."""

    documents: int
    tokens: int
    padding: int


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker has loaded its graph."""


@dataclass(frozen=True, slots=True)
class Said:
    """Start-up status message from a worker."""

    line: str


@dataclass(frozen=True, slots=True)
class Order:
    """A task, and the outputs of its files; a worker has no others, however many files the job has."""

    task: Task
    outputs: dict[int, OutputFile]


Message: TypeAlias = Ready | Said | Executed | ChunkDone | EngineError


class Handout:
    """The tasks that are left, in the order in which workers should get them."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._left: dict[int, deque[Task]] = defaultdict(deque)
        for task in tasks:
            self._left[_file(task)].append(task)
        self._suspects: deque[Task] = deque()  # their worker died; each is to be done alone

    def __len__(self) -> int:
        return len(self._suspects) + sum(map(len, self._left.values()))

    def take(self, current: int | None, busy: set[int | None]) -> Task | None:
        """For a worker that is at file `current`, while others are at the files `busy`."""
        untouched = (file for file in self._left if file not in busy)
        file = current if current in self._left else next(untouched, None)
        if file is None:
            file = max(self._left, key=lambda file: len(self._left[file]), default=None)
        if file is None:
            return None
        task = self._left[file].popleft()
        if not self._left[file]:
            del self._left[file]
        return task

    def take_suspect(self) -> Task | None:
        """For a worker that has nothing in hand."""
        return self._suspects.popleft() if self._suspects else None

    def put_back(self, tasks: Iterable[Task]) -> None:
        """A worker died with these in hand."""
        self._suspects.extend(tasks)

    def drop(self, file: int) -> None:
        """Nothing more of a file that cannot be read, unless a chunk is shared with others."""
        rest = deque(task for task in self._left.pop(file, ()) if len(task.chunk.segments) > 1)
        if rest:
            self._left[file] = rest


@dataclass(slots=True)
class _Process:
    """One worker process, as the job sees it."""

    spec: Spec
    process: SpawnProcess
    connection: Connection
    in_hand: dict[int, Task] = field(default_factory=dict)
    alone: bool = False  # has one suspect chunk in hand and gets nothing beside it
    file: int | None = None
    ready: bool = False

    @property
    def name(self) -> str:
        return f"worker on {self.spec.device} (process {self.process.pid})"


class Pool:
    """Runs tasks on several worker processes and yields what they have done."""

    def __init__(
        self,
        specs: Sequence[Spec],
        outputs: Sequence[OutputFile],
        stop: threading.Event,
        executed: Callable[[Executed], None] = lambda _: None,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        """One process for each of `specs`; `report` is told of deaths, one sentence each."""
        self._specs, self._outputs, self._stop, self._executed, self._report = specs, outputs, stop, executed, report
        self._deaths: Counter[int] = Counter()
        self._numbers = count()  # of chunks to come
        self._stillborn = 0  # deaths in a row of workers that were not ready

    def run(self, tasks: Sequence[Task]) -> Generator[ChunkDone]:
        """Yield each task once it is done or has failed; raises an EngineError that a worker could not go on after."""
        handout = Handout(tasks)
        self._numbers = count(max((task.number for task in tasks), default=0) + 1)
        workers = [_start(spec) for spec in self._specs[: len(tasks)]]
        told_to_stop = False
        try:
            while workers and (any(worker.in_hand for worker in workers) or (len(handout) and not told_to_stop)):
                if self._stop.is_set() and not told_to_stop:
                    told_to_stop = True
                    workers = [worker for worker in workers if _send(worker, "stop") and worker.in_hand]
                if not told_to_stop:
                    self._feed(workers, handout)
                ready = wait([worker.connection for worker in workers], POLL_SECONDS)
                for worker in [worker for worker in workers if worker.connection in ready]:
                    yield from self._receive(worker, workers, handout, told_to_stop)
        finally:
            for worker in workers:
                worker.process.kill()
                worker.process.join()

    def _feed(self, workers: Sequence[_Process], handout: Handout) -> None:
        for worker in workers:
            if not worker.in_hand:
                worker.alone = False
                if suspect := handout.take_suspect():
                    worker.alone = True
                    self._give(worker, suspect)
            while not worker.alone and len(worker.in_hand) < IN_FLIGHT:
                busy = {other.file for other in workers if other is not worker and other.in_hand}
                task = handout.take(worker.file, busy)
                if task is None:
                    break
                self._give(worker, task)

    def _receive(
        self, worker: _Process, workers: list[_Process], handout: Handout, told_to_stop: bool
    ) -> Iterator[ChunkDone]:
        try:
            message: Message = worker.connection.recv()
        except (EOFError, OSError):
            workers.remove(worker)
            if not told_to_stop:
                yield from self._requeue_or_fail(worker, handout)
                workers.append(_start(worker.spec))
            return
        if isinstance(message, EngineError):
            raise message
        if isinstance(message, Ready):
            worker.ready, self._stillborn = True, 0
            return
        if isinstance(message, Said):
            self._report(f"{worker.name}: {message.line}")
            return
        if isinstance(message, Executed):
            self._executed(message)
            return
        del worker.in_hand[message.task.number]
        for failure in message.failures:
            handout.drop(failure.segment.file)
        yield message

    def _requeue_or_fail(self, worker: _Process, handout: Handout) -> Iterator[ChunkDone]:
        """Report a death, put back what the worker had in hand, fail a chunk that crashed two workers."""
        worker.process.join()
        how = f"{worker.name} died with exit code {worker.process.exitcode}"
        self._stillborn += not worker.ready
        if self._stillborn > len(self._specs) + DEATHS:
            raise EngineError(
                f"{how} before it was ready, as those before it did; its own messages are above. Where memory is "
                "short, lower --workers"
            )
        for task in worker.in_hand.values():
            self._deaths[task.number] += worker.ready
        lost = [task for task in worker.in_hand.values() if self._deaths[task.number] >= DEATHS and worker.alone]
        where = ", ".join(self._describe(task) for task in worker.in_hand.values()) or "nothing"
        self._report(f"{how} with {where} in hand; another takes its place")
        handout.put_back(task for task in worker.in_hand.values() if task not in lost)
        for task in lost:
            if len(task.chunk.segments) > 1:
                handout.put_back(self._one_by_one(task))
                continue
            reason = f"{DEATHS} workers died on {self._describe(task)}; it is left out and its file unfinished"
            yield ChunkDone(task, tuple(Failure(segment, reason) for segment in task.chunk.segments))

    def _one_by_one(self, task: Task) -> Iterator[Task]:
        """A chunk of several files as one of each, to be failed by one more death: a single file is to blame."""
        for segment in task.chunk.segments:
            number = next(self._numbers)
            self._deaths[number] = DEATHS - 1
            yield Task(number, Chunk((segment,)))

    def _describe(self, task: Task) -> str:
        first, *others = task.chunk.segments
        location = self._outputs[first.file].file.source.location
        more = f" and {counted(len(others), 'more file')}" if others else ""
        return f"{location} rows {first.start} to {first.stop}{more}"

    def _give(self, worker: _Process, task: Task) -> None:
        worker.in_hand[task.number], worker.file = task, _file(task)
        _send(worker, Order(task, {s.file: self._outputs[s.file] for s in task.chunk.segments}))


def _file(task: Task) -> int:
    return task.chunk.segments[0].file


def _start(spec: Spec) -> _Process:
    context = get_context("spawn")  # a forked copy of Arrow's and ONNX Runtime's threads would hang
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, spec, current_retries()), daemon=True)
    start(process)
    theirs.close()
    return _Process(spec, process, ours)


def _send(worker: _Process, message: object) -> bool:
    try:
        worker.connection.send(message)
    except OSError:
        return False  # it has died; receiving will tell
    return True


def work(connection: Connection, spec: Spec, retries: RetryPolicy) -> None:
    """The main function of a worker process."""
    set_retries(retries)
    die_with_parent()
    tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
    outputs = _Held()
    stop, sending = threading.Event(), threading.Lock()
    threading.Thread(target=_listen, args=(connection, tasks, outputs, stop), daemon=True).start()

    def send(message: Message) -> None:
        with sending:
            connection.send(message)

    try:
        progress = _Progress(send)
        run = spec.open(outputs, stop, progress.executed, lambda line: send(Said(line)))
        send(Ready())
        for done in run(iter(tasks.get, None)):
            progress.flush()
            outputs.release(done.task)
            send(done)
    except EngineError as error:
        send(error)
    except BaseException:
        send(EngineError(f"a worker on {spec.device} failed:\n{traceback.format_exc()}"))
    finally:
        sys.stdout.flush()
        connection.close()
        os._exit(0)  # a thread may be in the middle of an execution that nobody waits for


def _listen(
    connection: Connection, tasks: queue.SimpleQueue[Task | None], outputs: _Held, stop: threading.Event
) -> None:
    while True:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            os._exit(1)  # the job is gone
        if message == "stop":
            stop.set()
            tasks.put(None)
        else:
            outputs.hold(message)
            tasks.put(message.task)


class _Held(dict[int, OutputFile]):
    """The outputs of the tasks that a worker has in hand."""

    def __init__(self) -> None:
        super().__init__()
        self._users: Counter[int] = Counter()
        self._lock = threading.Lock()

    def hold(self, order: Order) -> None:
        with self._lock:
            for number, output in order.outputs.items():
                self.setdefault(number, output)  # the same object: its file is read on where the last chunk ended
            self._users.update(list(order.outputs))

    def release(self, task: Task) -> None:
        with self._lock:
            for file in {segment.file for segment in task.chunk.segments}:
                self._users[file] -= 1
                if not self._users[file]:
                    del self[file], self._users[file]


class _Progress:
    """Adds up batches and sends the sum now and then."""

    def __init__(self, send: Callable[[Message], None]) -> None:
        self._send, self._sent = send, time.monotonic()
        self._sum = Executed(0, 0, 0)

    def executed(self, documents: int, tokens: int, padding: int) -> None:
        s = self._sum
        self._sum = Executed(s.documents + documents, s.tokens + tokens, s.padding + padding)
        if time.monotonic() - self._sent >= PROGRESS_SECONDS:
            self.flush()

    def flush(self) -> None:
        done, self._sum, self._sent = self._sum, Executed(0, 0, 0), time.monotonic()
        if done.documents:
            self._send(done)
