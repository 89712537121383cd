"""Stages in threads of their own, joined by bounded queues, each timed: working, waiting for input, waiting for room.

Reading, tokenizing, executing and writing release the interpreter's lock, so threads are enough. The queues are
short, so memory does not grow with the input, and the times tell which stage the others wait for.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from jql_engine.files.chunks import StageSeconds

T = TypeVar("T")
Stage: TypeAlias = Callable[[Iterator[Any]], Iterable[Any]]

CAPACITY = 2  # items between two stages
_END = object()
JOIN_SECONDS = 0.5  # for a thread that is in the middle of something when the pipeline is abandoned


class StageTime:
    """How one stage spends its time; may be read while it does."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._began = self._ended = 0.0
        self._spent = {"starved": 0.0, "blocked": 0.0}
        self._waiting: tuple[str, float] | None = None  # for what, and since when

    @contextmanager
    def working(self) -> Iterator[None]:
        """From the first item to the last."""
        self._began = time.monotonic()
        try:
            yield
        finally:
            self._ended = time.monotonic()

    @contextmanager
    def waiting(self, kind: Literal["starved", "blocked"]) -> Iterator[None]:
        """For input, or for room."""
        self._waiting = kind, time.monotonic()
        try:
            yield
        finally:
            self._spent[kind] += time.monotonic() - self._waiting[1]
            self._waiting = None

    def seconds(self) -> StageSeconds:
        """How the stage has spent its time so far."""
        now = self._ended or time.monotonic()
        spent, waiting = dict(self._spent), self._waiting
        if waiting is not None:
            spent[waiting[0]] += max(0.0, now - waiting[1])
        busy = now - self._began - sum(spent.values()) if self._began else 0.0
        return StageSeconds(max(0.0, busy), **spent)


class _AbandonedError(Exception):
    """The consumer of a channel wants no more."""


class _Channel(Generic[T]):
    """A bounded queue that ends, with or without an error, and that its consumer can abandon."""

    def __init__(self, capacity: int) -> None:
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._capacity, self._ended, self._abandoned = capacity, False, False
        self._error: BaseException | None = None

    def put(self, item: T) -> None:
        with self._changed:
            self._changed.wait_for(lambda: len(self._items) < self._capacity or self._abandoned)
            if self._abandoned:
                raise _AbandonedError
            self._items.append(item)
            self._changed.notify_all()

    def end(self, error: BaseException | None = None) -> None:
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def abandon(self) -> None:
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._ended or self._abandoned)
                if self._abandoned:
                    raise _AbandonedError
                if not self._items:
                    break
                item = self._items.popleft()
                self._changed.notify_all()
            yield item
        if self._error is not None:
            raise self._error


def pipeline(
    items: Iterable[Any], stages: Sequence[tuple[StageTime, Stage]], capacity: int = CAPACITY
) -> Generator[Any]:
    """Yield what the last of `stages` makes of `items`, every stage at work at once.

    A stage is a generator function over its input. What a stage raises comes out here, after all results before it;
    closing the generator ends the threads.
    """
    channels: list[_Channel[Any]] = [_Channel(capacity) for _ in stages]
    sources: list[Iterable[Any]] = [items, *channels[:-1]]
    threads = [
        threading.Thread(target=_work, args=(stage, clock, source, channel), name=clock.name, daemon=True)
        for (clock, stage), source, channel in zip(stages, sources, channels, strict=True)
    ]
    for thread in threads:
        thread.start()
    try:
        yield from channels[-1]
    finally:
        for channel in channels:
            channel.abandon()
        for thread in threads:
            thread.join(JOIN_SECONDS)


def in_laps(items: Iterable[Any], stages: Mapping[str, Stage]) -> Generator[tuple[Any, dict[str, StageSeconds]]]:
    """The same, of stages by name, each result with how they spent their time since the one before."""
    clocks = [StageTime(name) for name in stages]
    lap = dict.fromkeys(stages, StageSeconds(0, 0, 0))
    for item in pipeline(items, list(zip(clocks, stages.values(), strict=True))):
        now = {clock.name: clock.seconds() for clock in clocks}
        yield item, {name: now[name] - lap[name] for name in stages}
        lap = now


def _work(stage: Stage, clock: StageTime, source: Iterable[Any], target: _Channel[Any]) -> None:
    with clock.working():
        results: Iterable[Any] = ()
        try:
            results = stage(_timed(source, clock))
            for result in results:
                with clock.waiting("blocked"):
                    target.put(result)
            target.end()
        except _AbandonedError:
            pass
        except BaseException as error:  # whatever it is, the consumer must see it
            target.end(error)
        finally:
            if isinstance(source, _Channel):
                source.abandon()
            if isinstance(results, Generator):
                results.close()


def _timed(source: Iterable[T], clock: StageTime) -> Iterator[T]:
    items = iter(source)
    while True:
        with clock.waiting("starved"):
            item = next(items, _END)
        if item is _END:
            return
        yield item  # type: ignore[misc]  # not _END
