"""What libraries written in Rust raise -> errors of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from jql_engine.errors import EngineError


@contextmanager
def rust_errors(kind: type[EngineError], what: str) -> Iterator[None]:
    """Raise a `kind` that begins with `what` where a library panics inside, or raises a bare Exception.

    pyo3 makes a panic an exception that is no Exception and that nothing exports, so that it passes every handler.
    `tokenizers` raises all its errors as Exception itself.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise kind(f"{what}: {error}") from error
