"""Find input files, and what is in them."""

from __future__ import annotations

import glob
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import pyarrow as pa
from fsspec.utils import tokenize
from upath import UPath

from jql_engine.errors import InputError, UnsafeNameError
from jql_engine.files.listing import Found, Pattern, path_on, search
from jql_engine.files.location import Location, locate
from jql_engine.files.retries import retry
from jql_engine.files.versions import UNKNOWN, version_from, version_from_status
from jql_engine.names import RelativeName
from jql_engine.printing import redact
from jql_engine.template import Template

Format: TypeAlias = Literal["parquet", "jsonl"]
READ_BYTES = 4 << 20  # of a file handed out at a time, by what it says of itself
# Names that a folder is searched for. A file that is given by its name is parquet unless it is called like one of the
# others.
SUFFIXES: dict[str, Format] = {  # in any case
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".json.gz": "jsonl",
    ".json.zst": "jsonl",
}
HIDDEN = (".", "_")  # how names begin of what a writer has not finished
IN_FOLDERS = Pattern(("**", "*"), HIDDEN, tuple(SUFFIXES))  # what a folder is searched for


@dataclass(frozen=True, slots=True)
class SourceFile:
    """An input file that was found and not opened yet."""

    location: Location
    relative: RelativeName  # of the output file, below the output folder
    size: int  # bytes
    version: str  # changes when the content does

    @property
    def found(self) -> tuple[int, str]:
        """What `version_of` said of it when it was found."""
        return self.size, self.version

    @property
    def format(self) -> Format:
        """The format, as the file's name gives it."""
        return SUFFIXES.get(self.suffix, "parquet")

    @property
    def is_traceable(self) -> bool:
        """Whether a change shows that keeps the size: False where a server tells neither tag nor time of a file."""
        return self.version != UNKNOWN

    @property
    def suffix(self) -> str:
        """The one of SUFFIXES that its name ends in, empty for any other."""
        return _suffix_of(self.location.name.partition("?")[0])  # of an http URL what follows is its query


@dataclass(frozen=True, slots=True)
class Refused:
    """An input that cannot be scored, whatever is in it."""

    file: str  # fit to be shown
    reason: str


@dataclass(frozen=True, slots=True)
class Listing:
    """The files that inputs name, and what was refused."""

    files: tuple[SourceFile, ...]
    refused: tuple[Refused, ...]


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of an input that are read."""

    text: str = "text"  # the documents
    id: str | None = None  # copied into the output; where none is asked for, `id` if there is one
    group: str | None = None  # copied as well: what decisions are made by, a language for example
    template: Template | None = None  # of a document that is put together from several columns

    @property
    def texts(self) -> tuple[str, ...]:
        """What documents are made of."""
        return tuple(dict.fromkeys((self.text, *(self.template.columns if self.template else ()))))

    @property
    def copied(self) -> tuple[str, ...]:
        """What goes into the output as it is."""
        return tuple(dict.fromkeys(name for name in (self.id, self.group) if name is not None))

    @property
    def needed(self) -> tuple[str, ...]:
        """All that scoring reads."""
        return tuple(dict.fromkeys((*self.texts, *self.copied)))


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file to score, as its footer (of JSON Lines: one pass over it) describes it."""

    source: SourceFile
    columns: Columns
    schema: pa.Schema
    group_rows: tuple[int, ...]
    group_bytes: tuple[int, ...]  # parquet: uncompressed bytes of the texts; JSON Lines: of whole lines
    limit: int | None = None  # where only the first rows are to be scored

    @property
    def n_rows(self) -> int:
        """Rows of all row groups."""
        return sum(self.group_rows)

    @property
    def copied(self) -> list[pa.Field]:
        """The columns that go into the output as they are."""
        return [self.schema.field(name) for name in self.columns.copied]

    def group_of(self, row: int) -> tuple[int, int]:
        """The row group that holds `row`, and the rows before that group."""
        group = before = 0
        while group < len(self.group_rows) and before + self.group_rows[group] <= row:
            before += self.group_rows[group]
            group += 1
        return group, before

    def first(self, n_rows: int) -> InputFile:
        """The same file up to row `n_rows`."""
        group, before = self.group_of(n_rows)
        rows, sizes = [*self.group_rows[:group]], [*self.group_bytes[:group]]
        if n_rows > before:
            rows.append(n_rows - before)
            sizes.append(self.group_bytes[group])
        return replace(self, group_rows=tuple(rows), group_bytes=tuple(sizes), limit=n_rows)


def find_files(inputs: Sequence[str]) -> Listing:
    """Every file to score that `inputs` name, in a stable order, and what has no place below an output folder.

    A folder gives all files in it that end in one of SUFFIXES, at their paths inside of it; a glob gives what it
    matches, at the paths below its fixed part; a file gives its name. Links are followed. Raises InputError: nothing
    there, nothing matched, all refused, a folder that cannot be listed, or two inputs whose outputs exclude each other.
    """
    files: dict[RelativeName, SourceFile] = {}
    places: dict[str, SourceFile] = {}
    refused: dict[str, Refused] = {}
    for given in inputs:
        for file in _expand(given):
            if isinstance(file, Refused):
                refused.setdefault(file.file, file)
                continue
            other = files.setdefault(file.relative, file)
            # Looking a path up takes longer than finding it.
            if other is not file and identity(other.location) != identity(file.location):
                raise InputError(
                    f"{other.location} and {file.location} would both be written to {file.relative}; rename one, give "
                    "their common parent folder where they lie in different ones, or run them into two --out folders"
                )
            if len(inputs) == 1:  # which finds nothing twice
                continue
            place = str(file.location.absolute()) if isinstance(file.location, Path) else identity(file.location)
            if (same := places.setdefault(place, other)).relative != file.relative:
                raise InputError(
                    f"{file.location} is given twice, as {same.relative} and as {file.relative}; leave out the input "
                    "that lies inside of the other"
                )
    _check_folders(list(files.values()))
    if refused and not files:
        raise InputError("; ".join(one.reason for one in list(refused.values())[:3]))
    return Listing(tuple(files.values()), tuple(refused.values()))


def _check_folders(files: Sequence[SourceFile]) -> None:
    """Raise InputError where one output is called like a folder that another one lies in."""
    by_name = {file.relative.text: file for file in files}
    for file in files:
        for folder in file.relative.folders:
            if other := by_name.get(folder):
                raise InputError(
                    f"{other.location} would be written to {folder}, and {file.location} into a folder of that name; "
                    "rename one, or run them into two --out folders"
                )


def with_shared_schemas(files: Sequence[InputFile]) -> list[InputFile]:
    """One object for equal schemas: of a hundred thousand files each would keep half a gigabyte."""
    known: dict[bytes, pa.Schema] = {}
    return [replace(file, schema=known.setdefault(file.schema.serialize().to_pybytes(), file.schema)) for file in files]


def check_columns(location: Location, schema: pa.Schema, columns: Columns) -> Columns:
    """Make sure that the columns can be used; return them with the id column, `id` if there is one and none is asked.

    Raises InputError where one is missing, there twice, or of a type that cannot be used.
    """
    for column in columns.texts:
        advice = "name one with --text-column" if column == columns.text else "the bundle's template needs it"
        _check_column(location, schema, column, advice)
        _check_text_type(location, column, schema.field(column).type)
    if columns.group is not None:
        _check_column(location, schema, columns.group, "name one with --group-column")
        check_group_type(location, columns.group, schema.field(columns.group).type)
    if columns.id is not None:
        _check_column(location, schema, columns.id, "name one with --id-column")
    elif schema.names.count("id") == 1:
        return replace(columns, id="id")
    return columns


def _expand(given: str) -> Iterator[SourceFile | Refused]:
    location = locate(given)
    found = _find_local(location) if isinstance(location, Path) else _find_remote(given, location)
    for one in sorted(found, key=lambda one: one.name.split("/")):
        place = Path(one.path) if isinstance(location, Path) else path_on(location, one.path)
        yield _source(place, one)


def _find_local(path: Path) -> list[Found]:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        if glob.has_magic(str(path)):
            return _search(path, fixed_part(str(path)), path.parts)
        raise InputError(f"{path} does not exist; give parquet or JSON Lines files, folders or globs") from error
    except OSError as error:
        raise InputError(
            f"{path} cannot be looked up: {error.strerror}; check its permissions and those above it"
        ) from error
    if stat.S_ISDIR(status.st_mode):
        return _search_folder(path, path)
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path} is neither a file nor a folder; give parquet or JSON Lines files, folders or globs")
    return [Found(path.name, str(path), *version_from_status(status))]


def _find_remote(given: str, location: UPath) -> list[Found]:
    path = location.path
    try:
        location.fs.invalidate_cache()  # of what this process saw there before
        if _is_pattern(location):
            pattern = path.partition("?")[0] if _is_http(location) else path
            return _search(given, path_on(location, fixed_part_of_url(pattern)), pattern.split("/"))
        if not path.endswith("/") and (info := retry(location, lambda: location.fs.info(path)))["type"] == "file":
            name = (path.partition("?")[0] if _is_http(location) else path).rpartition("/")[2]
            return [Found(name, path, *version_from(info))]
        return _search_folder(given, location)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{given} cannot be found: {error.__cause__ or error}") from error
    except Exception as error:  # every file system has errors of its own
        raise InputError(f"{given} cannot be listed: {type(error).__name__}: {error}") from error


def _search(given: object, root: Location, segments: Sequence[str]) -> list[Found]:
    """What a glob of `segments` matches below its fixed part `root`."""
    fixed = next(i for i, segment in enumerate(segments) if glob.has_magic(segment))
    there = not isinstance(root, Path) or root.exists()  # elsewhere the listing tells
    if there and (found := list(search(root, Pattern(tuple(segments[fixed:]))))):
        return found
    raise InputError(f"{given} matches no file; check the pattern, and put it in quotes")


def _search_folder(given: object, root: Location) -> list[Found]:
    """Hidden is what a writer has not finished: a leading dot or underscore anywhere."""
    if found := list(search(root, IN_FOLDERS)):
        return found
    raise InputError(f"folder {given} holds no file that ends in {', '.join(SUFFIXES)}; name others one by one")


def _source(location: Location, found: Found) -> SourceFile | Refused:
    name = found.name if isinstance(location, Path) or not _is_http(location) else found.name.partition("?")[0]
    shown = redact(str(location))
    if found.fault:
        return Refused(shown, f"{shown} cannot be read: {found.fault}")
    try:
        relative = RelativeName(name)
        str(location).encode()
    except UnsafeNameError as error:
        return Refused(shown, f"{shown}: {error}")
    except UnicodeEncodeError:
        return Refused(shown, f"{shown}: the name of a folder is not UTF-8; rename it")
    return SourceFile(location, _output_name(relative), found.size, found.version)


def _is_pattern(location: UPath) -> bool:
    """True for a glob; of an http URL what follows "?" is its query."""
    return glob.has_magic(location.path.partition("?")[0] if _is_http(location) else location.path)


def _is_http(location: UPath) -> bool:
    return location.protocol in ("http", "https")


def _output_name(relative: RelativeName) -> RelativeName:
    """Scores are parquet, and are called so: a.jsonl.gz gives a.parquet, and part-0 gives part-0.parquet."""
    suffix = _suffix_of(relative.name)
    if suffix == ".parquet":
        return relative
    return relative.with_name(relative.name[: len(relative.name) - len(suffix)] + ".parquet")


def _suffix_of(name: str) -> str:
    return next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")


def identity(location: Location) -> str:
    """What two names of one file have in common."""
    if isinstance(location, Path):
        return str(location.resolve())
    # A host or a user that fsspec takes out of the URL is among the options.
    return f"{location} ({tokenize(location.storage_options)})" if location.storage_options else str(location)


def fixed_part(pattern: str) -> Path:
    """The folder of a glob before its first wildcard."""
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:fixed])


def fixed_part_of_url(pattern: str) -> str:
    """The same for a URL or a key."""
    first = next(i for i, character in enumerate(pattern) if character in "*?[")
    return pattern[:first].rpartition("/")[0]


def _check_column(location: Location, schema: pa.Schema, column: str, advice: str) -> None:
    if (count := schema.names.count(column)) != 1:
        found = f"{count} columns named" if count else "no column"
        raise InputError(f"{location} has {found} {column!r}; it has {', '.join(schema.names)}: {advice}")


def check_group_type(location: Location, column: str, found: pa.DataType) -> None:
    """Raise InputError for a column whose values cannot be names of groups."""
    value = found.value_type if pa.types.is_dictionary(found) else found
    kinds = (
        pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_integer,
        pa.types.is_boolean, pa.types.is_date, pa.types.is_null,
    )  # fmt: skip
    if not any(is_kind(value) for is_kind in kinds):
        raise InputError(f"{location}: column {column!r} is {found}, expected text, integers, booleans or dates")


def _check_text_type(location: Location, column: str, found: pa.DataType) -> None:
    value = found.value_type if pa.types.is_dictionary(found) else found
    is_bytes = pa.types.is_binary(value) or pa.types.is_large_binary(value) or pa.types.is_binary_view(value)
    is_text = pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)
    if not (is_bytes or is_text or pa.types.is_null(value)):
        raise InputError(f"{location}: column {column!r} is {found}, expected text (a string or UTF-8 binary type)")
