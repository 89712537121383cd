"""Whether the output folder of jql-run that scores are read from is finished: thresholds of a part would be biased."""

from __future__ import annotations

import glob
from pathlib import Path

from jql_engine.errors import InputError
from jql_engine.files.formats import unreadable
from jql_engine.files.inputs import fixed_part, fixed_part_of_url
from jql_engine.files.location import Location, locate
from jql_engine.files.parts import PARTS, find_leftovers
from jql_engine.files.storage import exists
from jql_engine.job.claim import RECORD


def check_finished(given: str) -> None:
    """Raise InputError where an input is a folder, or a glob below one, whose job is under way or was stopped.

    A file that is named is finished: it appears complete or not at all.
    """
    folder = _folder_of(given)
    if folder is None:
        return
    with unreadable(failed := f"{folder} cannot be looked at", failed):
        left = find_leftovers(folder)
        begun = [name for name in left.parts if not exists(folder / name)]
        record = next((place for place in (folder, *folder.parents) if exists(place / PARTS / RECORD)), None)
    if begun:
        found = f"{folder / PARTS} holds parts of {begun[0]}" + (f" and {len(begun) - 1} more" if begun[1:] else "")
    elif left.listings or record is not None:
        found = f"{(record or folder) / PARTS} names a job that is under way, or was stopped"
    else:
        return
    raise InputError(
        f"the scores in {given} are not finished: {found}; let that job finish, by its own command if it was stopped, "
        "or give finished files by their names"
    )


def _folder_of(given: str) -> Location | None:
    """The folder that an input is searched in; None for a file."""
    location = locate(given)
    if isinstance(location, Path):
        if location.is_dir():
            return location
        return fixed_part(given) if glob.has_magic(given) and not location.exists() else None
    if location.protocol in ("http", "https"):  # where nobody writes scores to
        return None
    return locate(fixed_part_of_url(given)) if glob.has_magic(given) else location
