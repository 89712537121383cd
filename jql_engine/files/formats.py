"""Input files of any format: what they hold, and their rows from any row on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import pyarrow as pa

from jql_engine.errors import EngineError, UnreadableError
from jql_engine.files.inputs import SUFFIXES, Columns, InputFile, SourceFile
from jql_engine.files.json_lines import describe_lines, line_batches
from jql_engine.files.parquet import READ_ROWS, describe_parquet, parquet_batches
from jql_engine.files.retries import retry

T = TypeVar("T")


def open_file(source: SourceFile, columns: Columns) -> InputFile:
    """Look into an input file and check its columns; raises InputError."""
    describe = describe_parquet if source.format == "parquet" else describe_lines
    return look(source, lambda: describe(source, columns))


def look(source: SourceFile, describe: Callable[[], T]) -> T:
    """What `describe` finds in an input file, tried again where the network failed; raises UnreadableError."""
    with unreadable(f"{source.location} cannot be read", f"{_found(source)} is not a complete {source.format} file"):
        return retry(source.location, describe)


@contextmanager
def unreadable(failed: str, damaged: str) -> Iterator[None]:
    """Raise whatever a file system, pyarrow or Python raises inside as an UnreadableError.

    What damage leads to cannot be foreseen: a footer's names alone give UnicodeDecodeError in places of pyarrow that
    differ between its releases. Not our own beliefs, and not a machine out of memory; an allocation that pyarrow
    refuses is mostly a length that was damaged.
    """
    try:
        yield
    except (EngineError, AssertionError):
        raise
    except (pa.ArrowException, OSError, EOFError) as error:
        reason = " ".join(str(error).split())  # pyarrow's may have several lines
        raise UnreadableError(f"{damaged}: {reason}") from error
    except UnicodeDecodeError as error:
        raise UnreadableError(f"{damaged}: {error.object!r} is a name in it, and no UTF-8") from error
    except MemoryError:
        raise
    except Exception as error:
        raise UnreadableError(f"{failed}: {type(error).__name__}: {error}") from error


def _found(source: SourceFile) -> str:
    if source.suffix:
        return str(source.location)
    return f"{source.location} has a name that ends in none of {', '.join(SUFFIXES)}; it was taken for parquet, and"


def batches(
    file: InputFile, start: int, columns: Sequence[str] | None, read_rows: int = READ_ROWS
) -> Iterator[pa.RecordBatch]:
    """Rows of `file` from `start` to its end, a few at a time; `columns` None gives all of a parquet file.

    `read_rows`: the most at a time, of parquet.

    Text may come as a dictionary where `columns` are given. Whatever the file system or pyarrow raises comes out as it
    is; InputError where the file was changed since it was found.
    """
    if start >= file.n_rows:
        return
    group, before = file.group_of(start)
    skip, left = start - before, file.n_rows - start
    is_parquet = file.source.format == "parquet"
    for batch in parquet_batches(file, group, columns, read_rows) if is_parquet else line_batches(file, group, columns):
        passed = min(skip, batch.num_rows)
        batch = batch.slice(passed, left)
        skip, left = skip - passed, left - batch.num_rows
        if batch.num_rows:
            yield batch
        if not left:
            break
