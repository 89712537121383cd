"""Whether the output folder of a job that scores or vectors are read from is finished, and what it was left without."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from jql_engine.errors import InputError
from jql_engine.files.formats import unreadable
from jql_engine.files.inputs import fixed_part, fixed_part_of_url
from jql_engine.files.listing import Pattern
from jql_engine.files.location import Location, locate
from jql_engine.files.parts import LISTING, PARTS, Part
from jql_engine.files.storage import exists, list_files, read_file
from jql_engine.job.claim import RECORD
from jql_engine.job.unfinished import RUN_NAME, Run, Unfinished


def check_finished(given: str) -> list[Unfinished]:
    """What the jobs that wrote `given`, a folder or a glob below one, have ended without, by their names below it.

    Raises InputError where one is under way or was stopped: thresholds of a part would be biased. A file that is named
    is finished: it appears complete or not at all.
    """
    searched = _searched(given)
    if searched is None:
        return []
    folder, pattern = searched
    with unreadable(failed := f"{folder} cannot be looked at", failed):
        found = _Found.of(folder, pattern)
        ended = [one for one in found.ended if one.name is None or found.lacks(one.name)]
        excused = {one.name for one in ended}
        stopped = next((name for name in found.to_do if found.lacks(name)), None)
        begun = next((name for name in found.begun if name not in excused and found.lacks(name)), None)
    if stopped is not None:
        what = f"{found.to_do[stopped]} says that {stopped} is to be written"
    elif begun is not None:
        what = f"{found.begun[begun]} is a part of {begun}"
    elif found.records and found.finished:  # without any it is a remote file, or nothing
        what = f"{found.records[0]} names a job"
    else:
        return sorted({(one.file, one.name): one for one in ended}.values(), key=lambda one: one.file)
    raise InputError(
        f"the files in {given} are not finished: {what}; let that job, which is under way or was stopped, finish by "
        "its own command, remove that file if nobody wants the rest, or give finished files by their names"
    )


@dataclass(frozen=True, slots=True)
class _Found:
    """What is in a folder, and in the folders of parts above it and in it; names are those below the folder."""

    folder: Location
    pattern: Pattern | None  # which the names match
    finished: set[str] = field(default_factory=set)
    to_do: dict[str, Location] = field(default_factory=dict)  # outputs, and who says so
    begun: dict[str, Location] = field(default_factory=dict)  # outputs, and a part of each
    ended: list[Unfinished] = field(default_factory=list)
    records: list[Location] = field(default_factory=list)  # of jobs that nothing else is known of

    @classmethod
    def of(cls, folder: Location, pattern: Pattern | None) -> _Found:
        found = cls(folder, pattern)
        for location, name in _list(folder):
            inner, is_hidden, rest = f"/{name}".partition(f"/{PARTS}/")
            if is_hidden:
                found._add(location, rest, f"{inner}/".removeprefix("/"), "")
            else:
                found.finished.add(name)
        for start, inner in [(folder, ""), *_links(folder)]:
            for above, below in _above(start):
                for location, rest in _list_parts(above):
                    found._add(location, rest, inner, below)
        return found

    def lacks(self, name: str) -> bool:
        """Whether there is no output of that name, also none below a link."""
        return name not in self.finished and not exists(self.folder / name)

    def _add(self, location: Location, rest: str, inner: str, outer: str) -> None:
        """`rest` is the name in a folder of parts, whose outputs are `inner` below the folder, or `outer` above it."""

        def named(names: Sequence[str]) -> Iterator[str]:
            mine = (inner + name.removeprefix(outer) for name in names if name.startswith(outer))
            return (name for name in mine if self.pattern is None or self.pattern.matches(name))

        file, _, last = rest.rpartition("/")
        if Part.parse(last):
            self.begun.update(dict.fromkeys(named([file]), location))
        elif rest.endswith(LISTING) or (rest == RECORD and not _has_runs(location.parent)):
            self.records.append(location)
        elif RUN_NAME.fullmatch(rest) and (content := read_file(location)) is not None:
            run = Run.parse(location, content)
            given_up = {one.name for one in run.unfinished}
            to_do = [name for name in run.names or () if name not in given_up]
            self.to_do.update(dict.fromkeys(named(to_do), location))
            for one in run.unfinished:
                mine = [one] if one.name is None else [replace(one, name=name) for name in named([one.name])]
                self.ended.extend(mine)


def _has_runs(parts: Location) -> bool:
    return any(RUN_NAME.fullmatch(name) for _, name in list_files(parts))


def _list(folder: Location) -> Iterator[tuple[Location, str]]:
    """Every file below a folder, as search() finds them: through links."""
    if not isinstance(folder, Path):
        yield from list_files(folder)
        return
    for parent, _, names in _walk(folder):
        yield from ((Path(parent, name), Path(parent, name).relative_to(folder).as_posix()) for name in names)


def _links(folder: Location) -> Iterator[tuple[Location, str]]:
    """Links to folders below one, and their names below it, with a "/": each may lead into the output of a job."""
    if isinstance(folder, Path):
        links = (Path(parent, name) for parent, folders, _ in _walk(folder) for name in folders)
        yield from ((link, f"{link.relative_to(folder).as_posix()}/") for link in links if link.is_symlink())


def _walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Folders with the names of the folders and files in them, through links, each once."""
    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield parent, folders, names


def _list_parts(folder: Location) -> list[tuple[Location, str]]:
    """The files in the folder of parts of one that the user has not named, and may not be allowed to read."""
    with suppress(PermissionError if isinstance(folder, Path) else Exception):
        return list_files(folder / PARTS)
    return []


def _above(folder: Location) -> Iterator[tuple[Location, str]]:
    """The folders above one, as it is named and as links lead to it, and its name below each, with a "/"."""
    starts = {folder, folder.resolve()} if isinstance(folder, Path) else {folder}
    for inner in starts:
        below = ""
        while inner.parent != inner:
            below = f"{inner.name}/{below}" if inner.name else below  # else it was given with a "/" at its end
            inner = inner.parent
            yield inner, below


def _searched(given: str) -> tuple[Location, Pattern | None] | None:
    """The folder that an input is searched in, and for what; None for a file."""
    location = locate(given)
    if isinstance(location, Path):
        if location.is_dir():
            return location.absolute(), None
        if not glob.has_magic(given) or location.exists():
            return None
        root = fixed_part(str(location))
        return root.absolute(), Pattern(location.parts[len(root.parts) :])
    if location.protocol in ("http", "https"):  # where nobody writes scores to
        return None
    if not glob.has_magic(given):
        return location, None
    url = fixed_part_of_url(given)
    return locate(url), Pattern(tuple(given.removeprefix(f"{url}/").split("/")))
