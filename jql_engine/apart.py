"""Calls that may crash the process that makes them, made in another one: pyarrow aborts on some damaged files."""

from __future__ import annotations

import ctypes
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

from jql_engine.errors import EngineError
from jql_engine.storage import RetryPolicy, current_retries, set_retries

S = TypeVar("S")
T = TypeVar("T")
TOGETHER = 64  # items of one call
PR_SET_PDEATHSIG = 1  # of prctl(2)
THREADS = 16  # items at once: on a remote file system each waits for the network


class CrashError(EngineError):
    """The process that made a call died of it."""


class Child:
    """A process that makes calls, one at a time; begun with the first, and anew after each that it dies of."""

    def __init__(self) -> None:
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None

    def call(self, function: Callable[..., T], *arguments: object) -> T:
        """What `function` returns or raises; raises CrashError where the process dies. All three must be picklable."""
        if self._connection is None:
            self._start()
        assert self._connection is not None
        try:
            self._connection.send((function, arguments))
            returned, value = self._connection.recv()
        except (EOFError, OSError) as error:
            raise CrashError(f"a process died of it ({self._exit()})") from error
        if returned:
            return value  # type: ignore[no-any-return]  # what `function` returned
        raise value

    def each(
        self, function: Callable[[S], T], items: Sequence[S], crashed: Callable[[S, CrashError], T]
    ) -> Iterator[T]:
        """`function` of each item, in order, several at a time; `crashed` of an item that the process dies of."""
        for start in range(0, len(items), TOGETHER):
            together = items[start : start + TOGETHER]
            try:
                yield from self.call(in_threads, function, together)
            except CrashError:
                for item in together:  # which one?
                    try:
                        yield self.call(function, item)
                    except CrashError as error:
                        yield crashed(item, error)

    def close(self) -> None:
        """End the process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._exit()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        context = get_context("spawn")  # a forked copy of Arrow's threads would hang
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, current_retries()), daemon=True)
        self._process.start()
        theirs.close()

    def _exit(self) -> str:
        assert self._process is not None and self._connection is not None
        self._process.join()
        code, self._process, connection, self._connection = self._process.exitcode or 0, None, self._connection, None
        connection.close()
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def in_threads(function: Callable[[S], T], items: Iterable[S]) -> list[T]:
    """`function` of each item, in order, THREADS at a time; what one raises comes out at once."""
    pool = ThreadPoolExecutor(THREADS)
    try:
        return list(pool.map(function, items))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # one may sleep between two attempts


def die_with_parent() -> None:
    """Let the kernel kill this process with the thread that began it, so that nobody commits for a job that is gone."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux alone; elsewhere the connection ends a little later
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _serve(connection: Connection, retries: RetryPolicy) -> None:
    set_retries(retries)
    die_with_parent()
    for ignored in (signal.SIGINT, signal.SIGTERM):  # the job decides when this process ends
        signal.signal(ignored, signal.SIG_IGN)
    with suppress(EOFError, OSError):  # the job is gone
        while True:
            function, arguments = connection.recv()
            connection.send(_result(function, arguments))
            sys.stderr.flush()


def _result(function: Callable[..., Any], arguments: Sequence[object]) -> tuple[bool, object]:
    try:
        return True, function(*arguments)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return False, EngineError(traceback.format_exc())
        return False, error
