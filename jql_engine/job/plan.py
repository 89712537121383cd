"""A job before it runs: what is there to do, and who does it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np

from jql_engine.bundle import Bundle
from jql_engine.errors import EngineError, OutputError, UnreadableError
from jql_engine.files.chunks import Chunk, Task, split
from jql_engine.files.inputs import Columns, InputFile, SourceFile, find_files, with_shared_schemas
from jql_engine.files.location import Location
from jql_engine.files.output import Kind, OutputFile
from jql_engine.files.parts import JOB, PARTS, Leftovers, Part, aside_for, find_leftovers, key_of, parts_folder
from jql_engine.files.settings import check_settings, is_finished, is_written_by_us
from jql_engine.files.storage import list_files, remove_empty_folders, remove_file, remove_files
from jql_engine.files.versions import version_of
from jql_engine.files.writing import explained, remove_version
from jql_engine.job.apart import Child, CrashError, in_threads
from jql_engine.job.check import check_apart, check_output, with_usable_names
from jql_engine.job.claim import Claim
from jql_engine.job.frozen import FrozenListing, freeze, is_frozen, remove_stray
from jql_engine.job.ranks import Rank, share
from jql_engine.job.unfinished import RunFile, Unfinished, begun
from jql_engine.names import RelativeName

CHUNK_ROWS = 20_000
FIRST = 16  # files looked into at a time where only the first documents are to be scored
Versions: TypeAlias = Mapping[str, tuple[int, str]]  # sizes and versions of files, by their names
# At an input file, in another process: what is in it, why it cannot be read, or None where its scores are finished.
Look: TypeAlias = Callable[[SourceFile], InputFile | UnreadableError | None]


@dataclass(frozen=True, slots=True)
class Job:
    """What to score, and where to."""

    inputs: tuple[str, ...]
    out: Location | str
    text_column: str = "text"
    id_column: str | None = None
    group_column: str | None = None
    overwrite: bool = False
    output: Kind = "sidecar"
    embeddings: Literal["fp16", "fp32"] | None = None
    limit: int | None = None  # score the first documents only
    chunk_rows: int = CHUNK_ROWS
    rank: Rank = field(default_factory=Rank)
    assume_unchanged: bool = False  # go on with sources of which nothing tells whether they have changed

    def columns(self, bundle: Bundle) -> Columns:
        """The columns of an input that scoring with `bundle` reads."""
        return Columns(self.text_column, self.id_column, self.group_column, bundle.template)

    @property
    def embedding_dtype(self) -> np.dtype[Any] | None:
        """The type in which vectors are kept."""
        return None if self.embeddings is None else np.dtype({"fp16": "float16", "fp32": "float32"}[self.embeddings])


@dataclass(frozen=True, slots=True)
class Work:
    """What is left to do of a job."""

    claim: Claim
    outputs: list[OutputFile]
    tasks: list[Task]
    n_finished: int  # files
    unreadable: list[Unfinished]
    run_file: RunFile
    listing: Shared | None = None  # where several ranks share the files

    def release(self, ended: Iterable[Unfinished] = ()) -> None:
        """Give the output folder back, where nothing is left that this job must go on with.

        It need not go on with what it has `ended` without; the parts of such a file stay, for a start that may read it.
        """
        names = {one.name for one in ended}
        mine = (output.file.source.relative for output in self.outputs)
        self.claim.release(name for name in mine if name.text not in names)

    @property
    def n_docs(self) -> int:
        """Documents left to score."""
        return sum(task.chunk.n_docs for task in self.tasks)


@dataclass(frozen=True, slots=True)
class Shared:
    """The share of one rank."""

    listing: FrozenListing
    rank: Rank
    gone: list[Unfinished]  # files of the share that are no longer there
    n_new: int  # files that have appeared since the ranks began
    everything: Sequence[SourceFile]  # files of all ranks
    look: Look | None  # at one of them; None where what is there may be of an earlier job

    def finish(self) -> list[int]:
        """Say that the share is finished, and return the ranks that have yet to finish theirs."""
        waiting = self.listing.finish(self.rank)
        if waiting and self.look is not None and self._is_everything_finished(self.look):
            self.listing.close()
            return []
        return waiting

    def _is_everything_finished(self, look: Look) -> bool:
        """Whether all ranks' files are, as where one rank of a finished job was started once more."""
        with explained(self.listing.out, "listed"):
            there = {name for _, name in list_files(self.listing.out)}
        if not all(file.relative.text in there for file in self.listing.files):
            return False
        with Child() as child:
            try:
                return all(found is None for found in child.each(look, self.everything, crashed))
            except EngineError:  # its own rank will say so
                return False


def plan(
    job: Job,
    claim: Claim,
    look: Look,
    output_of: Callable[[InputFile], OutputFile],
    chunk_bytes: int,
    unfinished: Sequence[Unfinished] = (),
    description: Location | None = None,
) -> Work:
    """Claim the output folder, and find the chunks that are not done of the files that `look` does not find finished.

    `unfinished`: what the inputs lack already, as a job before this one has left it. `description`: a file that is
    written once all outputs are there, and says what they are; what is there of it goes before the first is written.

    Raises InputError; OutputError where another job has the folder, or has left parts there.
    """
    listed = with_usable_names(find_files(job.inputs), claim.out)
    for given in job.inputs:
        check_apart(claim.out, given)
    run_file = RunFile.of(claim.out, claim.settings, job.inputs, job.rank)
    refused = [Unfinished(one.file, one.reason) for one in listed.refused]
    # A run alone goes on with the listing of ranks that were stopped.
    is_shared = job.rank.world_size > 1 or is_frozen(claim.out, key_of(claim.settings))
    try:
        before: Versions = {}
        if is_shared:
            if job.rank.world_size > 1 and not is_frozen(claim.out, key_of(claim.settings)):
                _check_first(job, listed.files, look, output_of)
            before = _take(claim, job, listed.files)
        sources, shared = _share(job, claim, listed.files, look) if is_shared else (listed.files, None)
        with Child() as child:
            seen = look_into(job, child, sources, look)
            outputs = [output_of(file) for file in seen.files]
            finished = seen.finished
            if job.limit is not None and not job.overwrite:
                finished = [output.file.source for output in outputs if is_finished(output.final, output.settings)]
                outputs = [output for output in outputs if output.file.source not in set(finished)]
            if not is_shared:  # only now: where an input cannot be used, nothing is written
                before = _take(claim, job, [*(output.file.source for output in outputs), *finished, *seen.damaged])
            names = {source.relative.text for source in listed.files}
            lacking = [replace(one, name=None) if one.name in names else one for one in unfinished]
            unreadable = [*lacking, *refused, *seen.unreadable]
            with begun(run_file, outputs, unreadable, names, job.overwrite):
                if description is not None and outputs:
                    with explained(description, "removed"):
                        remove_file(description)
                _remove_earlier(claim.out, [*(output.file.source for output in outputs), *seen.damaged], before)
                tasks = _tasks_left(job, claim, outputs, finished, chunk_bytes, child)
    except BaseException:
        claim.release(source.relative for source in listed.files)
        raise
    return Work(claim, outputs, tasks, len(finished), unreadable, run_file, shared)


def _check_first(
    job: Job, sources: Sequence[SourceFile], look: Look, output_of: Callable[[InputFile], OutputFile]
) -> None:
    """Raise what is wrong with the command before the first rank makes a listing that others would be bound to."""
    with Child() as child:
        for file in look_into(job, child, sources if job.limit else share(sources, job.rank), look).files:
            output_of(file)


def _take(claim: Claim, job: Job, sources: Sequence[SourceFile]) -> Versions:
    """Take the folder; with --overwrite returns the scores of `sources` that are there, all of them of earlier jobs."""
    check_output(claim.out, sources)
    claim.take(job.overwrite)
    remove_stray(claim.out, key_of(claim.settings), job.overwrite)
    names = [source.relative for source in sources] if job.overwrite else []
    with explained(claim.out, "looked at"):
        found = in_threads(partial(_version_in, claim.out), names)
    if job.overwrite:
        claim.confirm()  # else there may be files of a later job among them
    return {name.text: version for name, version in zip(names, found, strict=True) if version is not None}


def _version_in(out: Location, name: RelativeName) -> tuple[int, str] | None:
    try:
        return version_of(name.below(out))
    except FileNotFoundError:
        return None


def _share(
    job: Job, claim: Claim, sources: Sequence[SourceFile], look: Look
) -> tuple[Sequence[SourceFile], Shared | None]:
    """The input files of this rank: its share of one listing, see jql_engine.job.frozen."""
    listing = freeze(claim.out, key_of(claim.settings), job.inputs, sources)
    listing.begin(job.rank)
    everything = listing.share_of(Rank(), sources)
    # With a limit, the first of all files are taken before they are shared, by each rank: it must find the same.
    if job.limit is not None and (changed := listing.changed(sources)):
        raise OutputError(
            f"{changed} was changed or removed since the first rank began; with --limit all ranks must find the same "
            "files: start all ranks over with --overwrite"
        )
    found = everything if job.limit is not None else listing.share_of(job.rank, sources)
    reason = "was there when the ranks of this job began, and is gone"
    gone = [Unfinished(name.text, f"{name} {reason}", name.text) for name in (file.relative for file in found.gone)]
    known = None if job.overwrite or job.limit else look
    return found.sources, Shared(listing, job.rank, gone, found.n_new, everything.sources, known)


def _tasks_left(
    job: Job,
    claim: Claim,
    outputs: Sequence[OutputFile],
    finished: Sequence[SourceFile],
    chunk_bytes: int,
    child: Child,
) -> list[Task]:
    """Chunks that are not done. With --overwrite none is: what is there of `outputs` is removed."""
    mine = [output.file.source for output in outputs]
    with explained(claim.out / PARTS, "listed"):
        leftovers = find_leftovers(claim.out)
    if not (job.overwrite or job.assume_unchanged):
        begun = [source for source in mine if source.relative.text in leftovers.parts]
        _check_traceable([*finished, *begun])
    through = [*finished, *(mine if job.overwrite else ())]
    stale = [
        parts_folder(claim.out, source.relative) / part.name
        for source in through
        for part in leftovers.parts.get(source.relative.text, ())
    ]
    tidy(claim.out, [*mine, *finished], stale, leftovers)
    return list(_tasks(job, outputs, chunk_bytes, {} if job.overwrite else leftovers.parts, child))


def _remove_earlier(out: Location, sources: Sequence[SourceFile], before: Versions) -> None:
    """Remove the finished files of earlier jobs; what is not as it was `before` is a later job's."""

    def remove(name: RelativeName) -> None:
        with suppress(FileNotFoundError):
            remove_version(name.below(out), before[name.text], aside_for(out, name.text))

    with explained(out, "tidied up"):
        in_threads(remove, [source.relative for source in sources if source.relative.text in before])


def _check_traceable(sources: Sequence[SourceFile]) -> None:
    """Raise OutputError where what was scored before may be another content by now."""
    for source in sources:
        if not source.is_traceable:
            raise OutputError(
                f"{source.location} was scored before, wholly or in part, and its server tells neither an entity tag "
                "nor a time of it, so whether it has changed is not known; give --assume-unchanged if it has not, or "
                "--overwrite to start over"
            )


@dataclass(frozen=True, slots=True)
class Seen:
    """What was found in input files."""

    files: list[InputFile]  # to be scored
    finished: list[SourceFile]
    damaged: list[SourceFile]
    unreadable: list[Unfinished]  # the same, and why


def look_into(job: Job, child: Child, sources: Sequence[SourceFile], look: Look) -> Seen:
    """Look at `sources`; with a limit open this rank's of the first with so many documents.

    Raises InputError where a file has not the columns, or none can be read.
    """
    files: list[InputFile] = []
    finished: list[SourceFile] = []
    errors: list[tuple[SourceFile, UnreadableError]] = []
    step = max(1, len(sources)) if job.limit is None else FIRST
    for start in range(0, len(sources), step):
        group = sources[start : start + step]
        for source, found in zip(group, child.each(look, group, crashed), strict=True):
            if found is None:
                finished.append(source)
            elif isinstance(found, UnreadableError):
                errors.append((source, found))
            else:
                files.append(found)
        if job.limit is not None and sum(file.n_rows for file in files) >= job.limit:
            break
    if errors and len(errors) == len(sources) and job.rank.world_size == 1:  # a rank's share may be one bad file
        raise errors[0][1]
    if job.limit is not None:
        files = list(_first(files, job.limit))
        mine = set(share([file.source for file in files], job.rank))
        files = [file for file in files if file.source in mine]
    unreadable = [Unfinished(str(source.location), str(error), source.relative.text) for source, error in errors]
    return Seen(with_shared_schemas(files), finished, [source for source, _ in errors], unreadable)


def crashed(source: SourceFile, error: CrashError) -> UnreadableError:
    """What to say of a file that a process died of."""
    return UnreadableError(f"{source.location} cannot be looked into: {error}; it is damaged, or takes more memory")


def _first(files: Iterable[InputFile], n_docs: int) -> Iterator[InputFile]:
    for file in files:
        if n_docs <= 0:
            return
        yield file if file.n_rows <= n_docs else file.first(n_docs)
        n_docs -= file.n_rows


def tidy(out: Location, sources: Sequence[SourceFile], stale: Sequence[Location], leftovers: Leftovers) -> None:
    """Remove what killed runs left of `sources`: files that they were writing, `stale` parts, empty folders."""
    with explained(out / PARTS, "tidied up"):
        remove_files([*leftovers.left_by([JOB, *(source.relative.text for source in sources)]), *stale])
        remove_empty_folders(out / PARTS)


def _tasks(
    job: Job, outputs: Sequence[OutputFile], chunk_bytes: int, parts: Mapping[str, set[Part]], child: Child
) -> Iterator[Task]:
    """Chunks that are not done; raises OutputError for parts of another job."""
    done: dict[int, set[tuple[int, int]]] = {}
    for number, output in enumerate(outputs):
        if found := sorted(parts.get(output.file.source.relative.text, ())):
            usable = child.each(partial(_is_usable, output), found, partial(_remove_part, output))
            done[number] = {part.rows for part, fine in zip(found, usable, strict=True) if fine}
    chunks = split([output.file for output in outputs], job.chunk_rows, chunk_bytes)
    for number, chunk in enumerate(chunks):
        left = tuple(s for s in chunk.segments if (s.start, s.stop) not in done.get(s.file, ()))
        if left:
            yield Task(number, Chunk(left))


def _remove_part(output: OutputFile, part: Part, _: CrashError) -> bool:
    remove_file(output.parts / part.name)
    return False


def _is_usable(output: OutputFile, part: Part) -> bool:
    """Whether a part can be read; removes one that cannot. Raises OutputError where it is another job's."""
    place = output.parts / part.name
    if not is_written_by_us(place):
        remove_file(place)
        return False
    check_settings(place, output.settings)
    return True
