"""Calls that may crash the process that makes them, made in another one: pyarrow aborts on some damaged files."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

from jql_engine.errors import EngineError
from jql_engine.files.retries import RetryPolicy, current_retries, set_retries
from jql_engine.printing import say

S = TypeVar("S")
T = TypeVar("T")
TOGETHER = 64  # items of one call
PR_SET_PDEATHSIG = 1  # of prctl(2)
PATIENCE_SECONDS = 60.0
THREADS = 16  # items at once: on a remote file system each waits for the network


class CrashError(EngineError):
    """The process that made a call died of it."""


class Child:
    """A process that makes calls, one at a time; begun with the first, and anew after each that it dies of."""

    def __init__(self) -> None:
        self._running: tuple[SpawnProcess, Connection] | None = None
        self._starting = threading.Lock()
        self._closed = False

    def call(self, function: Callable[..., T], *arguments: object) -> T:
        """What `function` returns or raises; raises CrashError where the process dies. All three must be picklable."""
        process, connection = self._started()
        try:
            connection.send((function, arguments))
            returned, value = connection.recv()
        except (EOFError, OSError) as error:
            process.join()
            connection.close()
            code = process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise CrashError(f"a process died of it ({how})") from error
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
        """End the process, whatever it is doing, for good; a call that another thread is making raises CrashError."""
        with self._starting:
            self._closed, running = True, self._running
        if running is not None:
            process, _ = running
            process.kill()
            process.join()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _started(self) -> tuple[SpawnProcess, Connection]:
        with self._starting:
            if self._closed:
                raise CrashError("the process that would have done it was ended")
            if self._running is None or not self._running[0].is_alive():
                context = get_context("spawn")  # a forked copy of Arrow's threads would hang
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, current_retries()), daemon=True)
                start(process)
                theirs.close()
                self._running = process, ours
            return self._running


def start(process: SpawnProcess) -> None:
    """Start a process that SIGINT and SIGTERM do not reach: the job decides when it ends.

    Ctrl-C goes to every process of a terminal, and one that is still loading cannot ignore it by itself.
    """
    resource_tracker.ensure_running()  # which the first start would begin, and lift what is blocked
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})  # which it inherits
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def in_threads(function: Callable[[S], T], items: Sequence[S]) -> list[T]:
    """`function` of each item, in order, THREADS at a time; what one raises comes out at once.

    Every minute stderr names those that still wait, for a server that is gone, say.
    """
    pool = ThreadPoolExecutor(THREADS)
    try:
        futures = [pool.submit(function, item) for item in items]
        began = time.monotonic()
        while left := wait(futures, PATIENCE_SECONDS, FIRST_EXCEPTION).not_done:
            for future in futures:
                if future.done():
                    future.result()  # raises what it raised
            names = [
                str(getattr(item, "location", item)) for item, f in zip(items, futures, strict=True) if f.running()
            ]
            after = time.monotonic() - began
            say(f"jql: after {after:.0f} s still {len(left)} to go; waiting for {', '.join(names[:4])}")
        return [future.result() for future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # one may sleep between two attempts


def die_with_parent() -> None:
    """Let the kernel kill this process with the thread that began it, so that nobody commits for a job that is gone."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux alone; elsewhere the connection ends a little later
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it was gone before the kernel knew
        os._exit(1)


def _serve(connection: Connection, retries: RetryPolicy) -> None:
    set_retries(retries)
    die_with_parent()
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
