"""Which job may write to an output folder: the one whose settings its record names.

    OUT/.parts/job.json    the settings of the job that is under way

The record is created where there is none, never replaced but by --overwrite, and read again before every commit: where
jobs with different settings meet, the one that it does not name ends at its next commit. Jobs with the same
settings share it. It names no process and no machine: a job that was killed goes on by the same command.

The record saves work; it is not what keeps scores apart. That is done by the names of parts and by score files that are
created, never replaced (jql_engine.files.output), whatever happens between reading the record and a commit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from jql_engine.errors import OutputError
from jql_engine.files.location import Location
from jql_engine.files.parts import JOB, PARTS, Settings, aside_for, find_leftovers, key_of
from jql_engine.files.settings import differences, shown
from jql_engine.files.storage import exists, read_file, remove_empty_folders, remove_file
from jql_engine.files.writing import explained, write
from jql_engine.names import RelativeName

RECORD = "job.json"
COMMIT_SECONDS = 1.0  # from reading the record to the commit: a small file's; one that is assembled takes less
ATTEMPTS = 8  # to create a record that others remove, as ending jobs do


@dataclass(frozen=True, slots=True)
class Claim:
    """The right of a job with `settings` to write to `out`."""

    out: Location
    settings: Settings

    @property
    def record(self) -> Location:
        """The file that names the settings of the job that is under way."""
        return self.out / PARTS / RECORD

    def take(self, replace: bool = False) -> None:
        """Write the record, with `replace` over another job's; raises OutputError where another job has the folder.

        A job that loses the folder may have read its own record just before: its commit is waited for.
        """
        with explained(self.record):
            if replace:
                evicted = read_file(self.record) not in (None, self._content.to_pybytes())
                write(self.record, self._content, aside_for(self.out, JOB))
                time.sleep(COMMIT_SECONDS if evicted else 0)
            else:
                self._create()

    def confirm(self) -> None:
        """Raise OutputError unless no other job has had the folder since this one took it."""
        with explained(self.record, "read"):
            found = read_file(self.record)
        if found is None:
            raise OutputError(f"{self.record} is gone: another job has ended here; start the same command again")
        self._compare(found)

    def check(self) -> None:
        """Raise OutputError where another job has taken the folder meanwhile."""
        with explained(self.record, "read"):
            found = read_file(self.record)
            if found is None:  # another job has ended: one with the same settings, or what it left stops this one
                self._create()
            else:
                self._compare(found)

    def release(self, names: Iterable[RelativeName]) -> None:
        """Remove the record where nothing is left that it is needed for.

        That is a list of files that the ranks of this job share, and parts of the files called `names` that are not
        finished; parts of others, which nobody may ever join, keep nobody out.
        """
        with explained(self.record, "removed"):
            left = find_leftovers(self.out)
            begun = any(name.text in left.parts and not exists(name.below(self.out)) for name in names)
            shared = any(name.startswith(key_of(self.settings)) for name in left.listings)
            if not (begun or shared) and read_file(self.record) == self._content.to_pybytes():
                remove_file(self.record)
                remove_empty_folders(self.out / PARTS)

    @property
    def _content(self) -> pa.Buffer:
        return pa.py_buffer(json.dumps(dict(self.settings), sort_keys=True, indent=1).encode())

    def _create(self) -> None:
        for _ in range(ATTEMPTS):
            try:
                write(self.record, self._content, aside_for(self.out, JOB), replace=False)
                return
            except FileExistsError:
                if (found := read_file(self.record)) is not None:
                    self._compare(found)
                    return
        raise OutputError(f"{self.record} comes and goes; start the same command again")

    def _compare(self, found: bytes) -> None:
        try:
            other: dict[str, Any] = dict(json.loads(found))
        except (ValueError, TypeError) as error:
            raise OutputError(f"{self.record} is damaged ({error}); give --overwrite to start over") from error
        if not (different := differences(self.settings, other)):
            return
        key = different[0]
        raise OutputError(
            f"{self.out} belongs to a job with other settings that is under way, or was stopped: "
            f"{shown(key, other.get(key))} there, {shown(key, self.settings.get(key))} here; finish that job with its "
            "own command, choose another --out, or start over with --overwrite"
        )
