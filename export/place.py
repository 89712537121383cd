"""Where a bundle is written: aside first, and at its place once all went well."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from uuid import uuid4

from jql_engine.bundle import MANIFEST
from jql_engine.errors import BundleError


def check_place(out: Path, overwrite: bool) -> None:
    """Raise BundleError where something is at `out` that an export may not replace."""
    try:
        if not out.exists():
            return
        is_bundle = (out / MANIFEST).is_file()
        if overwrite and out.is_dir() and (is_bundle or not any(out.iterdir())):
            return
    except OSError as error:
        raise BundleError(f"{out} cannot be looked at: {error.strerror}; choose another --out") from error
    what = "a bundle; give --overwrite to replace it" if is_bundle else "no bundle; choose another --out"
    raise BundleError(f"{out} exists and is {what}")


@contextmanager
def written_aside(out: Path, overwrite: bool, report: Callable[[str], None]) -> Iterator[Path]:
    """A folder beside `out` that takes its place once all went well; otherwise `out` is what it was.

    Raises BundleError where it cannot be written, or where something has come to `out` that may not be replaced.
    `report` is told what a killed export has left: it is not removed, for another export may be writing it right now.
    """
    check_place(out, overwrite)
    out = out.resolve()
    own = uuid4().hex  # a process id is not enough: in a container every export may have the same
    aside, replaced = (out.with_name(f".{out.name}.{own}.{state}") for state in ("writing", "replaced"))
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise BundleError(f"{aside} cannot be created: {error.strerror}; choose another --out") from error
    try:
        for left in _left_by_others(out, own):
            report(f"{left} is of another export to {out}; if none is running, it was killed: remove that folder")
        yield aside
        _take_place(aside, out, replaced, overwrite)
    except OSError as error:
        raise BundleError(f"{_failed(error, out)}; what was written is removed") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _failed(error: OSError, out: Path) -> str:
    """What an error during an export says: of its output, or of a file that it reads."""
    reason, name = error.strerror or type(error).__name__, error.filename
    if name is not None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        place = Path(str(name)).absolute()
        if out not in (place, *place.parents) and not any(part.startswith(f".{out.name}.") for part in place.parts):
            return f"{name} cannot be read: {reason}"
    return f"{out} cannot be written: {f'{name}: ' if name else ''}{reason}"


def _left_by_others(out: Path, own: str) -> list[Path]:
    found = (file for state in ("writing", "replaced") for file in out.parent.glob(f".{escape(out.name)}.*.{state}"))
    return sorted(file for file in found if f".{own}." not in file.name)


def _take_place(aside: Path, out: Path, replaced: Path, overwrite: bool) -> None:
    """Rename `aside` to `out`; what is there is renamed to `replaced` first, and removed last."""
    check_place(out, overwrite)  # once more: minutes have passed
    is_replaced = out.exists()
    try:
        if is_replaced:
            out.rename(replaced)
        aside.rename(out)  # fails where a file or a folder that is not empty has come there meanwhile
    finally:
        if is_replaced and not out.exists() and replaced.exists():
            replaced.rename(out)
    if is_replaced:
        shutil.rmtree(replaced, ignore_errors=True)
