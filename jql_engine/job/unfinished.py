"""What a command has not finished, so that nobody decides by the rest without knowing.

    OUT/.parts/<key>.<command>.<rank>-of-<size>.run    {names: [...] or null, unfinished: [{file, reason, name}]}

<key> is a hash of the job's settings, <command> one of the inputs and the limit that a command was given. The file is
there from before the first score is written until all files of the command are finished. `names` are the outputs that
it set out to write, null once it has come to its end; `unfinished` are files that it could not score. An output that is
there, whoever wrote it, counts as finished whatever stands here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa

from jql_engine.errors import OutputError
from jql_engine.files.location import Location, locate
from jql_engine.files.output import OutputFile
from jql_engine.files.parts import JOB, PARTS, Settings, aside_for, find_leftovers, key_of, parts_folder
from jql_engine.files.settings import OF_SCORES, OF_SOURCE, differences, stored_settings
from jql_engine.files.storage import list_files, read_file, remove_empty_folders, remove_file
from jql_engine.files.writing import explained, write
from jql_engine.job.ranks import Rank
from jql_engine.names import RelativeName
from jql_engine.printing import redact

RUN_NAME = re.compile(r"(?P<key>[0-9a-f]{12})\.(?P<command>[0-9a-f]{12})\.\d+-of-(?P<size>\d+)\.run")


@dataclass(frozen=True, slots=True)
class Unfinished:
    """An input file without a finished output, and why."""

    file: str
    reason: str
    name: str | None = None  # of the output, below the output folder; None where it can have none


@dataclass(frozen=True, slots=True)
class Run:
    """What a command, or one rank of it, has left to do."""

    names: tuple[str, ...] | None  # of the outputs to be written; None: it has come to its end
    unfinished: tuple[Unfinished, ...]

    @classmethod
    def parse(cls, location: Location, content: bytes) -> Run:
        """Raises OutputError for what cannot have been written here."""
        try:
            fields = json.loads(content)
            names = None if fields["names"] is None else tuple(map(str, fields["names"]))
            return cls(names, tuple(Unfinished(**one) for one in fields["unfinished"]))
        except (ValueError, TypeError, KeyError) as error:
            raise OutputError(f"{location} is damaged ({error!r}); remove it, and start its job again") from error


@dataclass(frozen=True, slots=True)
class RunFile:
    """The file of one command, or of one rank of it."""

    out: Location
    key: str  # of the settings
    command: str
    rank: Rank

    @classmethod
    def of(cls, out: Location, settings: Settings, inputs: Sequence[str], rank: Rank) -> RunFile:
        """That of a command with these `inputs`; its limit, if it has one, is among the `settings`.

        Scores of jobs that differ in the limit alone are decided on together: they share the key.
        """
        places = [locate(one) for one in inputs]
        given = sorted(str(one.absolute() if isinstance(one, Path) else one) for one in places)
        command = json.dumps([given, settings.get("limit")])
        key = key_of({name: value for name, value in settings.items() if name != "limit"})
        return cls(out, key, hashlib.sha256(command.encode()).hexdigest()[:12], rank)

    def read(self) -> Run | None:
        """What is there of an earlier start; raises OutputError."""
        with explained(self._place, "read"):
            content = read_file(self._place)
        return None if content is None else Run.parse(self._place, content)

    def read_ended(self) -> set[str]:
        """The outputs that commands with these settings and any inputs have ended without; raises OutputError."""
        ended: set[str] = set()
        with explained(self.out / PARTS, "read"):
            for location, name in list_files(self.out / PARTS):
                if self._is_of(name) and (content := read_file(location)) is not None:
                    ended |= {one.name for one in Run.parse(location, content).unfinished if one.name is not None}
        return ended

    def remove_others(self) -> None:
        """Remove the files of jobs with other settings; raises OutputError."""
        with explained(self.out / PARTS, "tidied up"):
            for location, name in list_files(self.out / PARTS):
                if RUN_NAME.fullmatch(name) and not self._is_of(name):
                    remove_file(location)

    def begin(self, names: Iterable[str], unfinished: Iterable[Unfinished]) -> None:
        """Say what is to be done before it is; raises OutputError."""
        self.write(Run(tuple(names), tuple(unfinished)))

    def end(self, unfinished: Sequence[Unfinished]) -> None:
        """Say what could not be done, nothing more being left to do; raises OutputError."""
        if unfinished:
            self.write(Run(None, tuple(unfinished)))
        with explained(self.out / PARTS, "tidied up"):
            for location, name in list_files(self.out / PARTS):
                if self._is_over(name, bool(unfinished)):
                    remove_file(location)
            remove_empty_folders(self.out / PARTS)

    def write(self, run: Run | None) -> None:
        """Write what is left to do; None: nothing. Raises OutputError."""
        with explained(self._place):
            if run is None:
                remove_file(self._place)
            else:
                # As it may be shown: whatever reads it shows it.
                content = redact(json.dumps(asdict(run), ensure_ascii=False))
                write(self._place, pa.py_buffer(content.encode()), aside_for(self.out, JOB))

    @property
    def _place(self) -> Location:
        return self.out / PARTS / self._name

    @property
    def _name(self) -> str:
        return f"{self.key}.{self.command}.{self.rank.rank}-of-{self.rank.world_size}.run"

    def _is_of(self, name: str) -> bool:
        found = RUN_NAME.fullmatch(name)
        return found is not None and found["key"] == self.key

    def _is_over(self, name: str, is_left: bool) -> bool:
        """Whether a file is of this command, and of this rank or of ranks that were counted otherwise."""
        found = RUN_NAME.fullmatch(name)
        if found is None or (found["key"], found["command"]) != (self.key, self.command):
            return False
        return int(found["size"]) != self.rank.world_size or (name == self._name and not is_left)


@contextmanager
def begun(
    run_file: RunFile,
    outputs: Sequence[OutputFile],
    unreadable: Sequence[Unfinished],
    there: set[str],
    overwrite: bool,
) -> Iterator[None]:
    """Say what this start will do before anything is removed; where it does nothing, what was said before holds.

    `there`: the outputs of all files that were found.
    """
    earlier, ended = run_file.read(), run_file.read_ended()
    gone = {one.name for one in earlier.unfinished if one.name is not None} - there if earlier else set()
    run_file.begin([output.file.source.relative.text for output in outputs], unreadable)
    try:
        if overwrite:
            run_file.remove_others()
        else:
            _remove_parts(run_file.out, ended, gone, outputs)
        yield
    except BaseException:
        if not overwrite:
            run_file.write(earlier)
        raise


def _remove_parts(out: Location, ended: set[str], gone: set[str], outputs: Sequence[OutputFile]) -> None:
    """Remove the parts of files that an earlier start has `ended` without, and that are `gone` now, or mended."""
    if not ended:
        return
    mended = {output.file.source.relative.text: output for output in outputs}
    with explained(out / PARTS, "tidied up"):
        for name, parts in find_leftovers(out).parts.items():
            for place in (parts_folder(out, RelativeName(name)) / part.name for part in parts if name in ended):
                if name in gone or (name in mended and _is_of_another_source(mended[name], place)):
                    remove_file(place)


def _is_of_another_source(output: OutputFile, place: Location) -> bool:
    """Whether a part was computed with the settings of `output`, of what its source was before."""
    different = set(differences(stored_settings(place), output.settings))
    return bool(different) and different <= OF_SOURCE | OF_SCORES
