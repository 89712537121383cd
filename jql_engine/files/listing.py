"""The files in a folder or of a glob: all of them, or an error.

fsspec's own walk and glob, and Python's glob, leave out what they cannot list.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from upath import UPath

from jql_engine.errors import EngineError, InputError
from jql_engine.files.location import OBJECT_STORES, Location
from jql_engine.files.retries import retry
from jql_engine.files.versions import version_from, version_from_status

T = TypeVar("T")
Places: TypeAlias = frozenset[int]  # how far a path has come in a pattern; several where there is a "**"
NOTHING_THERE = "it is a link to nothing; remove it, or mount what it leads to"
NAMELESS = "a folder in it has an empty name and cannot be listed; rename what is in that"
SPECIAL = "it is neither a file nor a folder"
MOST_WAYS = 64  # by links, to one folder
FILE_NAME = re.compile(r"[^.]\.[A-Za-z]\w*\Z")  # a folder may be called v1.0, hardly notes.txt
REMOTE_LINK = "it is a link that is not followed on this file system; give what it leads to as an input"


@dataclass(frozen=True, slots=True)
class Found:
    """A file that a pattern matches; with a fault, what cannot be read and may hide files."""

    name: str  # below the folder that was searched, with "/"
    path: str  # on its file system
    size: int = -1  # bytes
    version: str = ""
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class Pattern:
    """Segments of a glob as Python reads it: "**" stands for any folders; wildcards do not match hidden names."""

    segments: tuple[str, ...]
    hidden: tuple[str, ...] = (".",)  # how hidden names begin
    suffixes: tuple[str, ...] = ("",)  # one of which a file must have

    @property
    def start(self) -> Places:
        """Positions in the pattern at which every path begins."""
        return self._through({0})

    def after(self, places: Places, segment: str) -> Places:
        """Where a path is with one more segment; empty where nothing below can match."""
        reached = set()
        for place in places:
            if place == len(self.segments):
                continue
            if self.segments[place] == "**":
                reached |= set() if self._is_hidden(segment) else {place}
            elif self._matches(self.segments[place], segment):
                reached.add(place + 1)
        return self._through(reached)

    def accepts(self, places: Places, name: str) -> bool:
        """Whether a file `name` that came to `places` is one."""
        return len(self.segments) in places and name.lower().endswith(self.suffixes)

    def matches(self, name: str) -> bool:
        """Whether a path below the folder that the pattern is for matches it."""
        places = self.start
        for segment in name.split("/"):
            places = self.after(places, segment)
        return self.accepts(places, name)

    def may_hide(self, places: Places, name: str) -> bool:
        """Whether a link `name` to nothing, come to `places`, may have led to a file that matches or to a folder."""
        is_folder = self.leads_on(places) and not FILE_NAME.search(name)
        return is_folder or self.accepts(places, name)

    def leads_on(self, places: Places) -> bool:
        """Whether a folder that came to `places` may hold files."""
        return any(place < len(self.segments) for place in places)

    def is_deep(self, places: Places) -> bool:
        """Whether any depth of folders may follow."""
        return any(self.segments[place] == "**" for place in places if place < len(self.segments))

    def _through(self, places: set[int]) -> Places:
        """With those that a "**" for no folder leads to."""
        for place in range(len(self.segments)):
            if place in places and self.segments[place] == "**":
                places = {*places, place + 1}
        return frozenset(places)

    def _matches(self, pattern: str, segment: str) -> bool:
        return fnmatchcase(segment, pattern) and (pattern.startswith(self.hidden) or not self._is_hidden(segment))

    def _is_hidden(self, segment: str) -> bool:
        return segment.startswith(self.hidden) and segment not in (".", "..")  # those are no names at all


def search(folder: Location, pattern: Pattern) -> Iterator[Found]:
    """What `pattern` matches below `folder`, in any order; raises InputError for a folder that cannot be listed."""
    return _search_local(folder, pattern) if isinstance(folder, Path) else _search_remote(folder, pattern)


def _search_local(root: Path, pattern: Pattern) -> Iterator[Found]:
    """Follows links. A folder that is entered again on a way that leads to no other matches is a loop.

    Several ways to one folder that are no loops are as many folders of inputs: its files are found under each name.
    """
    entered: frozenset[tuple[int, int, Places]] = frozenset()
    n_ways: Counter[tuple[int, int, Places]] = Counter()
    left = [(str(root), "", pattern.start, entered)]
    while left:
        folder, inside, places, entered = left.pop()
        try:
            status = Path(folder).stat()
            if (here := (status.st_dev, status.st_ino, places - {len(pattern.segments)})) in entered:
                continue
            n_ways[here] += 1
            if n_ways[here] > MOST_WAYS:  # N folders that link to each other have N! ways through them
                raise InputError(
                    f"{folder} is a folder that more than {MOST_WAYS} ways lead to, by links from folder to folder; "
                    "remove some of the links, or give the folders that they lead to as inputs"
                )
            with os.scandir(folder) as entries:
                for entry in entries:
                    there, name = pattern.after(places, entry.name), inside + entry.name
                    found = _look(entry, name, pattern, there) if there else None
                    if found is not None:
                        yield found
                    elif pattern.leads_on(there) and entry.is_dir():
                        left.append((entry.path, f"{name}/", there, entered | {here}))
        except OSError as error:
            raise InputError(
                f"{error.filename or folder} cannot be listed: {error.strerror}; make it readable, or leave it out"
            ) from error


def _look(entry: os.DirEntry[str], name: str, pattern: Pattern, places: Places) -> Found | None:
    """None for a folder and for what is not matched; raises OSError."""
    accepted = pattern.accepts(places, entry.name)
    if not accepted and not entry.is_symlink():
        return None
    try:
        status = entry.stat()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        return Found(name, entry.path, fault=NOTHING_THERE) if pattern.may_hide(places, entry.name) else None
    if stat.S_ISDIR(status.st_mode) or not accepted:
        return None
    if not stat.S_ISREG(status.st_mode):
        return Found(name, entry.path, fault=SPECIAL)
    return Found(name, entry.path, *version_from_status(status))


def _search_remote(root: UPath, pattern: Pattern) -> Iterator[Found]:
    left = [(_asked(root, root.path, lambda: _own_name(root)), "", pattern.start)]
    while left:
        folder, inside, places = left.pop()
        # Object stores list all names that begin alike, or fail; the find of other file systems omits what fails.
        at_once = root.protocol in OBJECT_STORES and pattern.is_deep(places)
        for info in _list(root, folder, at_once):
            segments = _segments(root, folder, info)
            there = places
            for segment in segments:
                there = pattern.after(there, segment)
            if not segments or not there:
                continue
            name = inside + "/".join(segments)
            if info["type"] != "directory":
                yield from _look_remote(root, name, info, pattern, there)
            elif not segments[-1]:
                yield Found(f"{name}/", info["name"], fault=NAMELESS)
            elif pattern.leads_on(there):
                left.append((info["name"].rstrip("/"), f"{name}/", there))


def _own_name(folder: UPath) -> str:
    """The path of a folder as the names in it begin: the hub's file system has names of its own for revisions."""
    resolve = getattr(folder.fs, "resolve_path", None)
    path: str = resolve(folder.path).unresolve() if resolve else folder.path
    return path.rstrip("/")


def _list(root: UPath, folder: str, at_once: bool) -> list[dict[str, Any]]:
    """What fsspec says of all that is in a folder, or, `at_once`, of all files below it."""
    if at_once:
        return list(_asked(root, folder, lambda: root.fs.find(folder, detail=True)).values())
    return _asked(root, folder, lambda: root.fs.ls(folder, detail=True))


def _segments(root: UPath, folder: str, info: dict[str, Any]) -> list[str]:
    """Where something lies in a folder; empty for the folder itself, and for the objects that mark folders."""
    path: str = info["name"]
    is_folder = info["type"] == "directory"
    itself = path if root.protocol in OBJECT_STORES and is_folder else path.rstrip("/")
    if itself == folder or (path.endswith("/") and not is_folder):
        return []
    name = path.removeprefix(f"{folder}/")
    return (name.removesuffix("/") if is_folder else name).split("/")


def _look_remote(root: UPath, name: str, info: dict[str, Any], pattern: Pattern, places: Places) -> Iterator[Found]:
    path, fault = info["name"], None
    accepted = pattern.accepts(places, name)
    if info["type"] != "file" or (accepted and info.get("size") is None):  # a link; http lists names alone
        try:
            info = _asked(root, path, lambda: root.fs.info(path))
        except FileNotFoundError:
            fault = NOTHING_THERE if pattern.may_hide(places, name) else None
        else:
            fault = {"file": None, "directory": REMOTE_LINK}.get(info["type"], SPECIAL if accepted else None)
    if fault or accepted:
        yield Found(name, path, *version_from(info), fault)


def _asked(root: UPath, path: str, ask: Callable[[], T]) -> T:
    """`ask()`, again after a while where it failed; raises InputError, and FileNotFoundError as it is."""
    try:
        return retry(root, ask)
    except (EngineError, FileNotFoundError):
        raise
    except Exception as error:  # every file system has errors of its own
        raise InputError(f"{path_on(root, path)} cannot be listed: {type(error).__name__}: {error}") from error


def path_on(other: UPath, path: str) -> UPath:
    """A path as its file system gives it, on the file system of `other`."""
    found: UPath = UPath(other.fs.unstrip_protocol(path), **other.storage_options)
    return found
