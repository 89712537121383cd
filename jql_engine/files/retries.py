"""Remote file systems that fail in a way that may pass are asked again, with growing pauses."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa

from jql_engine.errors import EngineError
from jql_engine.files.location import Location, is_remote
from jql_engine.printing import say

T = TypeVar("T")
# Waiting changes none of these. A ValueError is not among them: what network libraries raise where half an answer came,
# JSONDecodeError for one, is one too.
FINAL = (
    FileExistsError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError,
    ImportError, TypeError, AttributeError, AssertionError, pa.ArrowInvalid, EngineError,
)  # fmt: skip
# Nor these, of libraries that are not imported for a local job. FileExpired is s3fs's: the object is another one now;
# opened again it would give rows of that.
FINAL_NAMES = {
    "FileExpired", "NoCredentialsError", "PartialCredentialsError", "GatedRepoError", "RepositoryNotFoundError",
    "RevisionNotFoundError",
}  # fmt: skip
DENIED = (401, 403)  # statuses of http


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """For how long a remote file system that fails is asked again."""

    minutes: float = 10.0
    first: float = 1.0  # seconds to the second attempt; every pause is twice as long as the one before
    longest: float = 32.0

    def pauses(self) -> Iterator[float]:
        """Seconds to wait before each attempt, drawn from half a pause to all of it, until the time is over."""
        end, pause = time.monotonic() + 60 * self.minutes, self.first
        while (left := end - time.monotonic()) > 0:
            yield min(left, pause * random.uniform(0.5, 1))
            pause = min(2 * pause, self.longest)


# Of this process. Where a retry is needed nobody knows of the command line, and every call would hand it through.
_retries = RetryPolicy()


def set_retries(policy: RetryPolicy) -> None:
    """Let `retry` follow `policy` in this process; for the beginning of a process."""
    global _retries
    _retries = policy


def current_retries() -> RetryPolicy:
    """The policy of this process, for those that it starts."""
    return _retries


def retry(location: Location, function: Callable[[], T]) -> T:
    """`function()`, again after a while where a remote file system failed in a way that may pass."""
    pauses = _retries.pauses() if is_remote(location) else iter(())
    while True:
        try:
            return function()
        except Exception as error:  # every file system has errors of its own
            seconds = None if _is_final(error) else next(pauses, None)
            if seconds is None:
                raise
            report_wait(location, error, seconds)
            time.sleep(seconds)


def report_wait(location: Location, error: Exception, seconds: float) -> None:
    """Say on stderr what went wrong and when it is tried again."""
    what = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
    say(f"jql: {location}: {what}; again in {seconds:.2g} s")


def _is_final(error: Exception) -> bool:
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and type(cause).__module__.startswith("aiohttp"):
        # fsspec's http says of whatever happens that the file was not found.
        return 400 <= getattr(cause, "status", 0) < 500
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, FINAL) or not names.isdisjoint(FINAL_NAMES) or _status_of(error) in DENIED


def _status_of(error: Exception) -> object:
    """Of an error of http: aiohttp's know it, the hub's know the answer."""
    return getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
