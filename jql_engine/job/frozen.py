"""The list of files that all ranks of a job share: created once, by the first, so that every file belongs to one rank.

    OUT/.parts/<key>.<number>.listing                      {id, inputs, files: [[name, bytes], ...]}
    OUT/.parts/<key>.<number>.<id>.<rank>-of-<size>.done   that rank has finished its share
    OUT/.parts/<key>.<number>.<id>.closed                  all have, and one process removes these files

<key> stands for the settings of the job. Ranks may run one after another, days apart: files that have appeared
meanwhile wait for the next listing, which the same command begins once this one is finished.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from uuid import uuid4

import pyarrow as pa

from jql_engine.errors import OutputError, UnsafeNameError
from jql_engine.files.inputs import SourceFile
from jql_engine.files.location import Location
from jql_engine.files.parts import JOB, PARTS, aside_for
from jql_engine.files.storage import list_files, read_file, remove_empty_folders, remove_file
from jql_engine.files.writing import explained, write
from jql_engine.job.ranks import Rank, share
from jql_engine.names import RelativeName
from jql_engine.printing import redact

ATTEMPTS = 8  # to read a listing that others finish and remove
OURS = re.compile(r"([0-9a-f]{12})\.(\d+)\.(?:listing|([0-9a-f]{32})\.(?:closed|(\d+)-of-(\d+)\.done))")


@dataclass(frozen=True, slots=True)
class FrozenFile:
    """An input file as it was when the listing was made."""

    relative: RelativeName
    size: int


@dataclass(frozen=True, slots=True)
class Share:
    """What a rank has to do."""

    sources: list[SourceFile]
    gone: list[FrozenFile]  # files of its share that are no longer there
    n_new: int  # files of all ranks that have appeared since


@dataclass(frozen=True, slots=True)
class FrozenListing:
    """One listing, made by whichever rank came first."""

    out: Location
    key: str  # of the settings of the job
    number: int
    id: str
    inputs: tuple[str, ...]  # as the first rank's command gave them
    files: tuple[FrozenFile, ...]

    def share_of(self, rank: Rank, sources: Sequence[SourceFile]) -> Share:
        """The files of `rank` among `sources`, which it found by itself."""
        found = {source.relative: source for source in sources}
        mine = share(self.files, rank)
        n_new = len(found.keys() - {file.relative for file in self.files})
        there = [found[file.relative] for file in mine if file.relative in found]
        return Share(there, [file for file in mine if file.relative not in found], n_new)

    def finish(self, rank: Rank) -> list[int]:
        """Say that the share of `rank` is finished, and return the ranks that have not said so yet.

        The last of all ranks removes the listing.
        """
        with explained(self.out / PARTS, "read"):
            latest = _read(self.out, self.key, self.number)
        if latest is None or latest.id != self.id:  # all ranks are through, by other processes with these numbers
            return []
        mark = self._mark(rank)
        with explained(mark):
            write(mark, pa.py_buffer(b""), aside_for(self.out, JOB))
            names = _names(self.out)
        if self._is_done(names):
            self.close()
            return []
        return sorted(set(range(rank.world_size)) - self._finished(names).get(rank.world_size, set()))

    def close(self) -> None:
        """Remove all that belongs to this listing; one process alone does, so that none removes what another begins."""
        closed = self.out / PARTS / f"{self._prefix}.{self.id}.closed"
        with explained(closed):
            try:
                # With a content of its own: an object store's writer takes a file of the same content for its own.
                write(closed, pa.py_buffer(uuid4().hex.encode()), aside_for(self.out, JOB), replace=False)
            except FileExistsError:
                return
            # Whoever comes late finds the next listing under this name.
            if (found := _read(self.out, self.key, self.number)) is not None and found.id == self.id:
                remove_file(self.out / PARTS / f"{self._prefix}.listing")
            for name in _names(self.out):
                if name.startswith(f"{self._prefix}.{self.id}."):
                    remove_file(self.out / PARTS / name)
            remove_empty_folders(self.out / PARTS)

    def changed(self, sources: Sequence[SourceFile]) -> RelativeName | None:
        """A file of the listing that is not among `sources` any more, or has another size."""
        sizes = {source.relative: source.size for source in sources}
        return next((file.relative for file in self.files if sizes.get(file.relative) != file.size), None)

    def begin(self, rank: Rank) -> None:
        """Take back what an earlier start of `rank` may have said."""
        mark = self._mark(rank)
        with explained(mark, "removed"):
            remove_file(mark)

    def check_inputs(self, inputs: Sequence[str]) -> None:
        """Raise OutputError where this rank was given other inputs than the first one."""
        if sorted(given := _normal(inputs)) == sorted(self.inputs):
            return
        here, there = (sorted(set(a) - set(b)) for a, b in ((given, self.inputs), (self.inputs, given)))
        place = self.out / PARTS / f"{self._prefix}.listing"
        raise OutputError(
            f"all ranks of a job share one list of files, made from {len(self.inputs)} inputs, and this rank was given "
            f"{len(given)}: only there {_some(there)}, only here {_some(here)}; give all ranks the same inputs, a "
            f"pattern in quotes, so that the shell does not expand it, or remove {place} and start all ranks again"
        )

    @property
    def _prefix(self) -> str:
        return f"{self.key}.{self.number}"

    def _mark(self, rank: Rank) -> Location:
        return self.out / PARTS / f"{self._prefix}.{self.id}.{rank.rank}-of-{rank.world_size}.done"

    def _is_done(self, names: Sequence[str]) -> bool:
        """Whether all ranks, however many they are, have finished their shares.

        Or whether one process had found so, and was killed before it had removed the listing.
        """
        if f"{self._prefix}.{self.id}.closed" in names:
            return True
        return any(ranks >= set(range(size)) for size, ranks in self._finished(names).items())

    def _finished(self, names: Sequence[str]) -> dict[int, set[int]]:
        """The ranks that have finished their shares, by how many there are in all."""
        done: dict[int, set[int]] = {}
        for name in names:
            found = OURS.fullmatch(name)
            if found and name.startswith(f"{self._prefix}.{self.id}.") and found[4]:
                done.setdefault(int(found[5]), set()).add(int(found[4]))
        return done


def is_frozen(out: Location, key: str) -> bool:
    """Whether ranks of the job that `key` stands for are under way, or were stopped."""
    return bool(_numbers(_names(out), key))


def freeze(out: Location, key: str, inputs: Sequence[str], sources: Sequence[SourceFile]) -> FrozenListing:
    """The listing that the ranks of this job share; of `sources`, where it is not made yet or all of it is finished.

    Raises OutputError where the listing was made from other inputs.
    """
    for _ in range(ATTEMPTS):
        names = _names(out)
        number = max(_numbers(names, key), default=-1)
        listing = _read(out, key, number) if number >= 0 else None
        if number < 0 or (listing is not None and listing._is_done(names)):
            listing = _created(out, key, number + 1, inputs, sources)
        if listing is not None:  # else another rank has finished it in this moment
            listing.check_inputs(inputs)
            _remove_before(listing, names)
            return listing
    raise OutputError(f"{out / PARTS}: the listing {key} comes and goes; start the same command again")


def remove_stray(out: Location, key: str, overwrite: bool) -> None:
    """Remove marks of listings that are gone, and with `overwrite` the listings of jobs with other settings."""
    names = _names(out)
    with explained(out / PARTS, "tidied up"):
        for name in names:
            if (found := OURS.fullmatch(name)) is None:
                continue
            is_other = overwrite and found[1] != key
            if is_other or f"{found[1]}.{found[2]}.listing" not in names:
                remove_file(out / PARTS / name)


def _names(out: Location) -> list[str]:
    with explained(out / PARTS, "listed"):
        return [name for _, name in list_files(out / PARTS)]


def _numbers(names: Sequence[str], key: str) -> list[int]:
    return [int(found[1]) for name in names if (found := re.fullmatch(rf"{key}\.(\d+)\.listing", name))]


def _created(
    out: Location, key: str, number: int, inputs: Sequence[str], sources: Sequence[SourceFile]
) -> FrozenListing | None:
    """Listing number `number`: of these files, or what another rank was faster to create."""
    files = [[source.relative.text, source.size] for source in sources]
    content = {"id": uuid4().hex, "inputs": _normal(inputs), "files": files}
    place = out / PARTS / f"{key}.{number}.listing"
    with explained(place), suppress(FileExistsError):
        write(place, pa.py_buffer(json.dumps(content).encode()), aside_for(out, JOB), replace=False)
    return _read(out, key, number)


def _read(out: Location, key: str, number: int) -> FrozenListing | None:
    place = out / PARTS / f"{key}.{number}.listing"
    with explained(place, "read"):
        content = read_file(place)
    if content is None:
        return None
    try:
        fields = json.loads(content)
        files = tuple(FrozenFile(RelativeName(name), int(size)) for name, size in fields["files"])
        inputs = tuple(map(str, fields["inputs"]))
        return FrozenListing(out, key, number, str(fields["id"]), inputs, files)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, UnsafeNameError) as error:
        raise OutputError(f"{place} is damaged ({error!r}); remove it and start all ranks again") from error


def _remove_before(listing: FrozenListing, names: Sequence[str]) -> None:
    """Remove what is left of listings before this one."""
    with explained(listing.out / PARTS, "tidied up"):
        for name in names:
            found = OURS.fullmatch(name)
            if found is None or found[1] != listing.key:
                continue
            is_older = int(found[2]) < listing.number
            if is_older or (int(found[2]) == listing.number and found[3] not in (None, listing.id)):
                remove_file(listing.out / PARTS / name)


def _normal(inputs: Sequence[str]) -> tuple[str, ...]:
    """As they are compared and kept: a URL that was signed anew is the same one."""
    return tuple(redact(given.rstrip("/")) for given in inputs)


def _some(inputs: Sequence[str]) -> str:
    return ", ".join(inputs[:3]) + (", ..." if len(inputs) > 3 else "") if inputs else "none"
