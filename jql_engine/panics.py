"""A panic of a library written in Rust -> an error of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from jql_engine.errors import EngineError


@contextmanager
def panic_is(error: type[EngineError], what: str) -> Iterator[None]:
    """Raise `error`, beginning with `what`, where a library panics inside.

    pyo3 makes a panic an exception that is no Exception and that nothing exports, so that it passes every handler.
    """
    try:
        yield
    except BaseException as panic:
        if type(panic).__name__ != "PanicException":
            raise
        raise error(f"{what}: the library panicked: {panic}") from panic
