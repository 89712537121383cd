"""What there is of score files before they are finished: parts, and files that a run was writing when it was killed.

    OUT/.parts/a/b.parquet/<key>.<start>-<stop>.parquet    rows [start, stop) of the scores of the input a/b.parquet
    OUT/.parts/.<owner>.<host>.<process>.<random>.writing  not complete yet; <owner> stands for what it will be
    OUT/.parts/job.json                                    see jql_engine.job.claim
    OUT/.parts/*.run                                       see jql_engine.job.unfinished
    OUT/.parts/*.listing, *.done, *.closed                 see jql_engine.job.frozen

A part names the settings that made it: <key> is a hash of them. Files are assembled from parts of one key alone, so
jobs that meet on one output by mistake never mix their scores.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from uuid import uuid4

from jql_engine.files.location import Location
from jql_engine.files.storage import list_files
from jql_engine.files.versions import modified
from jql_engine.names import RelativeName

PARTS = ".parts"
LISTING = ".listing"  # how the names of lists of files that several ranks share end
JOB = ".job"  # owner of what is written aside for the job's own records
OTHER_HOST_SECONDS = 24 * 3600.0
PART = re.compile(r"([0-9a-f]{12})\.(\d{12})-(\d{12})\.parquet")
Settings: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True, order=True)
class Part:
    """Rows [start, stop) of a score file, computed with the settings that `key` stands for."""

    key: str
    start: int
    stop: int

    @property
    def name(self) -> str:
        """The file name; names of one key sort as rows do."""
        return f"{self.key}.{self.start:012}-{self.stop:012}.parquet"

    @property
    def rows(self) -> tuple[int, int]:
        """First row, and the row after the last."""
        return self.start, self.stop

    @classmethod
    def parse(cls, name: str) -> Part | None:
        """The part of a file name; None for any other file."""
        found = PART.fullmatch(name)
        return None if found is None else cls(found[1], int(found[2]), int(found[3]))


@dataclass(frozen=True, slots=True)
class Leftovers:
    """Content of the folder of parts."""

    parts: dict[str, set[Part]]  # by the name of the file below the output folder
    unfinished: list[Location]  # files that a run was writing when it was killed, or is writing
    listings: list[str]  # names of the lists of files that several ranks share

    def left_by(self, owners: Iterable[str]) -> list[Location]:
        """The unfinished files of these owners (names of files, JOB) whose writers are gone."""
        digests = {_digest(owner) for owner in owners}
        return [file for file in self.unfinished if file.name.split(".")[1] in digests and _is_left(file)]


def find_leftovers(out: Location) -> Leftovers:
    """Look into the folder of parts."""
    found = Leftovers(defaultdict(set), [], [])
    for location, name in list_files(out / PARTS):
        file, _, last = name.rpartition("/")
        if part := Part.parse(last):
            found.parts[file].add(part)
        elif name.endswith(".writing") and name.count(".") == 5:
            found.unfinished.append(location)
        elif name.endswith(LISTING):
            found.listings.append(name)
    return found


def parts_folder(out: Location, name: RelativeName) -> Location:
    """The folder of the parts of a score file."""
    return name.below(out / PARTS)


def key_of(settings: Settings) -> str:
    """What the names of parts say of the settings that made them."""
    return hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()[:12]


def aside_for(out: Location, owner: str) -> Location:
    """A new name for what is not complete yet; `Leftovers.left_by` finds it after a kill."""
    return out / PARTS / f".{_digest(owner)}.{_host()}.{os.getpid()}-{_started(os.getpid())}.{uuid4().hex}.writing"


def _digest(owner: str) -> str:
    return hashlib.sha256(owner.encode()).hexdigest()[:16]


def _host() -> str:
    """Of the processes that see each other: containers may share a name, and each counts its processes anew."""
    name = socket.gethostname()
    with suppress(OSError):
        name += str(Path("/proc/self/ns/pid").readlink())
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def _started(process: int) -> str | None:
    """When a process of this machine began, in ticks since it was switched on; None where there is none any more.

    The number alone would not do: another process, or a thread of one, may have it by now.
    """
    try:
        status = Path("/proc", str(process), "stat").read_text(encoding="utf-8")
    except OSError:
        return None
    state, *fields = status.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]  # fields 3 and 22 of proc(5); a zombie writes no more


def _is_left(file: Location) -> bool:
    """Whether whoever was writing `file` is gone: on this machine as it is, on another after a day."""
    _, _, host, process, *_ = file.name.split(".")
    number, _, started = process.partition("-")
    if host == _host() and number.isdigit():
        return _started(int(number)) != started
    changed = modified(file)
    return changed is not None and time.time() - changed > OTHER_HOST_SECONDS
