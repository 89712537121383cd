"""The list of files that all ranks of a job share: created once, by the first, so that every file belongs to one rank.

    OUT/.parts/<inputs>.<number>.listing                          {id, files: [[name, bytes], ...]}
    OUT/.parts/<inputs>.<number>.<id>.<rank>-of-<size>.done       that rank has finished its share
    OUT/.parts/<inputs>.<number>.<id>.closed                      all have, and somebody removes these files

<inputs> stands for the inputs as the command names them. Ranks may run one after another, days apart: files that have
appeared meanwhile wait for the next listing, which the same command begins once this one is finished.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from uuid import uuid4

import pyarrow as pa

from jql_engine.dataset import SourceFile
from jql_engine.errors import OutputError, UnsafeNameError
from jql_engine.names import RelativeName
from jql_engine.output import explained
from jql_engine.parts import JOB, PARTS, aside_for
from jql_engine.ranks import Rank, share
from jql_engine.storage import Location, list_files, read_file, remove_empty_folders, remove_file, write


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
    inputs: str  # hash of the inputs' names
    number: int  # counts the listings of these inputs
    id: str
    files: tuple[FrozenFile, ...]

    def share_of(self, rank: Rank, sources: Sequence[SourceFile]) -> Share:
        """The files of `rank` among `sources`, which it found by itself."""
        found = {source.relative: source for source in sources}
        mine = share(self.files, rank)
        n_new = len(found.keys() - {file.relative for file in self.files})
        there = [found[file.relative] for file in mine if file.relative in found]
        return Share(there, [file for file in mine if file.relative not in found], n_new)

    def finish(self, rank: Rank) -> None:
        """Say that the share of `rank` is finished; the last of all ranks removes the listing."""
        mark = self.out / PARTS / f"{self._prefix}.{self.id}.{rank.rank}-of-{rank.world_size}.done"
        with explained(mark):
            write(mark, pa.py_buffer(b""), aside_for(self.out, JOB))
            names = [name for _, name in list_files(self.out / PARTS)]
            if _is_done(self, names):
                self._close(names)

    def close_if_all(self, finished: set[str]) -> None:
        """The same where every file of the listing is among those `finished`, whichever ranks have said so."""
        if all(file.relative.text in finished for file in self.files):
            self._close([name for _, name in list_files(self.out / PARTS)])

    @property
    def _prefix(self) -> str:
        return f"{self.inputs}.{self.number}"

    def _close(self, names: Sequence[str]) -> None:
        """Remove what belongs to this listing; one process alone, so that none removes what another begins anew."""
        closed = self.out / PARTS / f"{self._prefix}.{self.id}.closed"
        try:
            # With a content of its own: an object store's writer takes a file of the same content for its own.
            write(closed, pa.py_buffer(uuid4().hex.encode()), aside_for(self.out, JOB), replace=False)
        except FileExistsError:
            return
        remove_file(self.out / PARTS / f"{self._prefix}.listing")
        for name in names:
            if name.startswith(f"{self._prefix}.{self.id}."):
                remove_file(self.out / PARTS / name)
        remove_file(closed)
        remove_empty_folders(self.out / PARTS)


def freeze(out: Location, inputs: Sequence[str], sources: Sequence[SourceFile]) -> FrozenListing:
    """The listing that the ranks of this job share; of `sources`, where it is not made yet or all of it is finished."""
    key = hashlib.sha256(json.dumps([given.rstrip("/") for given in inputs]).encode()).hexdigest()[:12]
    with explained(out / PARTS, "listed"):
        names = [name for _, name in list_files(out / PARTS)]
    numbers = [int(found[1]) for name in names if (found := re.fullmatch(rf"{key}\.(\d+)\.listing", name))]
    if not numbers:
        return _created(out, key, 0, sources)
    latest = _read(out, key, max(numbers))
    if latest is None or _is_done(latest, names):
        following = _created(out, key, max(numbers) + 1, sources)
        _remove_before(out, key, following.number, names)
        return following
    return latest


def _is_done(listing: FrozenListing, names: Sequence[str]) -> bool:
    """Whether all ranks, however many they are, have finished their shares."""
    pattern = re.compile(rf"{listing.inputs}\.{listing.number}\.{listing.id}\.(\d+)-of-(\d+)\.done")
    done: dict[int, set[int]] = {}
    for name in names:
        if found := pattern.fullmatch(name):
            done.setdefault(int(found[2]), set()).add(int(found[1]))
    return any(ranks >= set(range(size)) for size, ranks in done.items())


def _created(out: Location, key: str, number: int, sources: Sequence[SourceFile]) -> FrozenListing:
    """Listing number `number`: of these files, or what another rank was faster to create."""
    files = [[source.relative.text, source.size] for source in sources]
    content = json.dumps({"id": uuid4().hex, "files": files}, ensure_ascii=False).encode()
    place = out / PARTS / f"{key}.{number}.listing"
    with explained(place), suppress(FileExistsError):
        write(place, pa.py_buffer(content), aside_for(out, JOB), replace=False)
    if (found := _read(out, key, number)) is None:
        raise OutputError(f"{place} is gone: another rank has finished it; start the same command again")
    return found


def _read(out: Location, key: str, number: int) -> FrozenListing | None:
    place = out / PARTS / f"{key}.{number}.listing"
    with explained(place, "read"):
        content = read_file(place)
    if content is None:
        return None
    try:
        fields = json.loads(content)
        files = tuple(FrozenFile(RelativeName(name), int(size)) for name, size in fields["files"])
        return FrozenListing(out, key, number, str(fields["id"]), files)
    except (ValueError, KeyError, TypeError, AttributeError, UnsafeNameError) as error:
        raise OutputError(f"{place} is damaged ({error!r}); remove it and start all ranks again") from error


def _remove_before(out: Location, key: str, number: int, names: Sequence[str]) -> None:
    for name in names:
        if (found := re.match(rf"{key}\.(\d+)\.", name)) and int(found[1]) < number:
            remove_file(out / PARTS / name)
