"""Before a job begins: may it write to its output folder, and do its columns have names of their own?"""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from jql_engine.errors import InputError, OutputError
from jql_engine.files.inputs import (
    HIDDEN,
    IN_FOLDERS,
    InputFile,
    Listing,
    Refused,
    SourceFile,
    fixed_part,
    fixed_part_of_url,
    identity,
)
from jql_engine.files.listing import Pattern
from jql_engine.files.location import Location, is_remote, locate
from jql_engine.files.output import Kind
from jql_engine.files.parts import PARTS
from jql_engine.files.storage import remove_file
from jql_engine.files.writing import write
from jql_engine.printing import redact

NAME_BYTES = 255  # of a file's or folder's name, on every usual file system
PROBE = ".jql-run"  # always the same name: where a run is killed beside it, the next one removes it


def check_output(out: Location, sources: Sequence[SourceFile]) -> None:
    """Create the folder `out` and make sure that the scores of `sources` may be written there; raises OutputError."""
    for source in sources:
        if source.relative.segments[0] == PARTS:
            raise OutputError(
                f"the scores of {source.location} would lie in {PARTS}, where unfinished scores are; give the folder "
                "that it is in as an input"
            )
    places = {identity(source.location) for source in sources}
    for source in sources:
        if (target := identity(source.relative.below(out))) in places:
            raise OutputError(
                f"the scores of {source.location} would overwrite the input {target}; choose another --out"
            )
    try:
        if isinstance(out, Path):
            out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=out):
                pass
        else:
            write(out / PROBE, pa.py_buffer(b""), out / f"{PROBE}.aside")
            remove_file(out / PROBE)
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise OutputError(f"--out {out} is not a folder that can be written: {reason}") from error


def with_usable_names(listed: Listing, out: Location) -> Listing:
    """The same, files refused whose outputs could not have their names, or would not be found under them."""
    refused = list(listed.refused)
    files = []
    for file in listed.files:
        segments = file.relative.segments
        why = None
        if any(segment.startswith(HIDDEN) for segment in segments):
            why = "a hidden name, as unfinished files have, which no command that follows would find"
        elif isinstance(out, Path) and any(len(segment.encode()) > NAME_BYTES for segment in segments):
            why = f"a name of over {NAME_BYTES} bytes, which folders cannot hold"
        if why is None:
            files.append(file)
        else:
            shown = redact(str(file.location))
            refused.append(Refused(shown, f"{shown} would be written to {why}; rename it"))
    if not files:
        raise InputError("; ".join(one.reason for one in refused[:3]))
    return Listing(tuple(files), tuple(refused))


def check_names(file: InputFile, scores: pa.Schema, kind: Kind) -> None:
    """Raise OutputError where a column of the source has the name of a score column."""
    location = file.source.location
    if kind == "append" and file.source.format != "parquet":
        raise OutputError(f"{location}: --output append writes the columns of parquet files; use --output sidecar")
    kept = file.schema.names if kind == "append" else list(file.columns.copied)
    for name in kept:
        if kept.count(name) > 1:
            raise OutputError(f"{location} has {kept.count(name)} columns named {name!r}; use --output sidecar")
        if name in scores.names:
            what = "the copied column" if kind == "sidecar" else "a column"
            raise OutputError(f"{location}: {what} {name!r} has the name of a score column; choose other head names")


def check_apart(out: Location, given: str) -> None:
    """Raise OutputError where the folder `out` lies inside of the input `given`, which the next run would read."""
    location = locate(given)
    if is_remote(out) != is_remote(location):
        return
    if isinstance(location, Path):
        given = str(location)
    if not isinstance(out, Path):
        assert not isinstance(location, Path)
        above = locate(fixed_part_of_url(given)) if glob.has_magic(given) else location
        # A wildcard in the name of the bucket leaves no folder to compare.
        inside = (
            not isinstance(above, Path)
            and out.fs == above.fs
            and f"{out.path}/".startswith(above.path.rstrip("/") + "/")
        )
    elif Path(given).is_dir():
        inside = _contains(Path(given), out)
    elif glob.has_magic(given) and not Path(given).exists():
        root = fixed_part(given)
        inside = _contains(root, out) if "**" in given else root.resolve() == out.resolve()
    else:
        inside = False
    if inside:
        raise OutputError(f"--out {out} lies inside of the input {given}; choose a folder outside of it")


def would_find(given: str | Location, file: Path) -> bool:
    """Whether a search of the folder or glob `given` finds a local file."""
    location = locate(given)
    if not isinstance(location, Path):
        return False
    root, pattern = location, IN_FOLDERS
    if glob.has_magic(str(location)) and not location.exists():
        root = fixed_part(str(location))
        pattern = Pattern(location.parts[len(root.parts) :])
    inner, outer = file.resolve(), root.resolve()
    return inner.is_relative_to(outer) and pattern.matches(inner.relative_to(outer).as_posix())


def _contains(folder: Path, inner: Path) -> bool:
    return inner.resolve().is_relative_to(folder.resolve())
