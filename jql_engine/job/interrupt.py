"""SIGINT and SIGTERM: the chunk in hand is finished if that takes seconds, and whatever is committed stays."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from jql_engine.errors import EngineError

# Schedulers send SIGKILL some time after SIGTERM, Docker after 10 s; tidying up takes up to 2 s of these.
GRACE_SECONDS = 6.0


class StopError(EngineError):
    """The user or a scheduler asked this process to stop."""


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; a second one, or GRACE_SECONDS, raise StopError here.

    Raises StopError at the end of the block too where the event was set. For the main thread.
    """
    stop = threading.Event()

    def ask(number: int, _: FrameType | None) -> None:
        if stop.is_set():
            raise StopError("stopped at once; start the same command again to continue")
        stop.set()
        signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)
        name = signal.Signals(number).name
        print(f"\njql: {name}: finishing what is in hand; once more to stop at once", file=sys.stderr, flush=True)  # noqa: T201

    def late(_: int, __: FrameType | None) -> None:
        raise StopError("stopped; what is committed stays: start the same command again to continue")

    handlers = {signal.SIGINT: ask, signal.SIGTERM: ask, signal.SIGALRM: late}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield stop
        if stop.is_set():
            raise StopError("interrupted; start the same command again to continue")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
