"""Find input files, and split them into chunks."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pyarrow as pa
from upath import UPath

from jql_engine.data import Chunk, Segment
from jql_engine.errors import InputError
from jql_engine.names import RelativeName
from jql_engine.storage import Location, locate, retry, version_from, version_of

Format: TypeAlias = Literal["parquet", "jsonl"]
# Names that a folder is searched for. A file that is given by its name is parquet unless it is called like one of the
# others.
SUFFIXES: dict[str, Format] = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".json.gz": "jsonl",
    ".json.zst": "jsonl",
}
# Opening and writing files takes its time: with more of them in a chunk, reading would be over before writing begins.
CHUNK_FILES = 100


@dataclass(frozen=True, slots=True)
class SourceFile:
    """An input file that was found and not opened yet."""

    location: Location
    relative: RelativeName  # of the output file, below the output folder
    size: int  # bytes
    version: str  # changes when the content does

    @property
    def found(self) -> tuple[int, str]:
        """What `storage.version_of` said of it when it was found."""
        return self.size, self.version

    @property
    def format(self) -> Format:
        """By its name."""
        return SUFFIXES.get(self.suffix, "parquet")

    @property
    def suffix(self) -> str:
        """The one of SUFFIXES that its name ends in, empty for any other."""
        return _suffix_of(self.location.name.partition("?")[0])  # of an http URL what follows is its query


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file to score, as its footer (of JSON Lines: one pass over it) describes it."""

    source: SourceFile
    text_column: str
    id_column: str | None
    schema: pa.Schema
    group_rows: tuple[int, ...]
    group_bytes: tuple[int, ...]  # parquet: uncompressed bytes of the text column; JSON Lines: of whole lines
    limit: int | None = None  # where only the first rows are to be scored

    @property
    def n_rows(self) -> int:
        """Rows of all row groups."""
        return sum(self.group_rows)

    @property
    def id_field(self) -> pa.Field | None:
        """The column that goes into the output as it is."""
        return None if self.id_column is None else self.schema.field(self.id_column)

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


def find_files(inputs: Sequence[str]) -> list[SourceFile]:
    """Every file to score that `inputs` name, in a stable order.

    A folder gives all files in it that end in one of SUFFIXES, at their paths inside of it; a glob gives what it
    matches, at the paths below its fixed part; a file gives its name. Raises InputError: nothing there, nothing
    matched, or two inputs that would write one output.
    """
    found: dict[RelativeName, SourceFile] = {}
    for given in inputs:
        for file in _expand(given):
            other = found.setdefault(file.relative, file)
            # Looking a path up takes longer than finding it.
            if other is not file and identity(other.location) != identity(file.location):
                raise InputError(
                    f"{other.location} and {file.location} would both be written to {file.relative}; give their "
                    "common parent folder, or run them into two --out folders"
                )
    return list(found.values())


def check_columns(location: Location, schema: pa.Schema, text_column: str, id_column: str | None) -> str | None:
    """Make sure that the columns can be used; return the id column, `id` if there is one and None is asked for."""
    _check_column(location, schema, text_column, "--text-column")
    _check_text_type(location, text_column, schema.field(text_column).type)
    if id_column is not None:
        _check_column(location, schema, id_column, "--id-column")
    elif schema.names.count("id") == 1:
        return "id"
    return id_column


def split(files: Sequence[InputFile], chunk_rows: int, chunk_bytes: int) -> Iterator[Chunk]:
    """Cut large files into chunks and join small ones, in order.

    A chunk holds at most about `chunk_rows` rows, `chunk_bytes` of text and CHUNK_FILES files; the cut depends on the
    files' footers alone.
    """
    together: list[Segment] = []
    rows = size = 0
    for number, file in enumerate(files):
        pieces = list(_pieces(number, file, chunk_rows, chunk_bytes))
        n_rows, n_bytes = file.n_rows, sum(file.group_bytes)
        full = rows + n_rows > chunk_rows or size + n_bytes > chunk_bytes or len(together) == CHUNK_FILES
        if together and (len(pieces) > 1 or full):
            yield Chunk(tuple(together))
            together, rows, size = [], 0, 0
        if len(pieces) > 1:
            yield from (Chunk((piece,)) for piece in pieces)
        else:
            together += pieces
            rows, size = rows + n_rows, size + n_bytes
    if together:
        yield Chunk(tuple(together))


def _expand(given: str) -> Iterator[SourceFile]:
    location = locate(given)
    return _expand_local(location) if isinstance(location, Path) else _expand_remote(given, location)


def _expand_local(path: Path) -> Iterator[SourceFile]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _is_input(file.relative_to(path)) and file.is_file())
        yield from (_source(file, file.relative_to(path)) for file in _some(path, files))
    elif path.is_file():
        yield _source(path, Path(path.name))
    elif glob.has_magic(str(path)):
        root = fixed_part(str(path))
        matches = sorted(file for file in map(Path, glob.glob(str(path), recursive=True)) if file.is_file())  # noqa: PTH207
        if not matches:
            raise InputError(f"{path} matches no file")
        yield from (_source(file, file.relative_to(root)) for file in matches)
    else:
        raise InputError(f"{path} does not exist; give parquet or JSON Lines files, folders or globs")


def _expand_remote(given: str, location: UPath) -> Iterator[SourceFile]:
    try:
        root, found = retry(location, lambda: _list_remote(location))
    except FileNotFoundError as error:
        raise InputError(f"{given} cannot be found: {error.__cause__ or error}") from error
    except Exception as error:  # every file system has errors of its own
        raise InputError(f"{given} cannot be listed: {type(error).__name__}: {error}") from error
    if not found:
        if _is_pattern(location):
            raise InputError(f"{given} matches no file")
        _some(given, [])
    for name in sorted(found):
        inside = _inside(name, root)
        relative = RelativeName(inside.partition("?")[0] if _is_http(location) else inside)
        yield SourceFile(locate(location.fs.unstrip_protocol(name)), _output_name(relative), *version_from(found[name]))


def _list_remote(location: UPath) -> tuple[str, dict[str, dict[str, Any]]]:
    """What a URL names, by its path on the file system, and the folder that all of it is in."""
    fs, path = location.fs, location.path
    fs.invalidate_cache()  # of what this process saw there before
    if _is_pattern(location):
        root, found = fixed_part_of_url(path), fs.glob(path, detail=True)
    elif not path.endswith("/") and (info := fs.info(path))["type"] == "file":
        root, found = path.partition("?")[0].rpartition("/")[0], {path: info}
    else:
        root, found = path, fs.find(path, detail=True)
        found = {name: info for name, info in found.items() if _is_input(Path(_inside(name, root)))}
    # On object stores an empty object "a/b/" marks the folder a/b.
    return root, {
        name: info for name, info in found.items() if info.get("type", "file") == "file" and not name.endswith("/")
    }


def _is_pattern(location: UPath) -> bool:
    """True for a glob; of an http URL what follows "?" is its query."""
    return glob.has_magic(location.path.replace("?", "") if _is_http(location) else location.path)


def _is_http(location: UPath) -> bool:
    return location.protocol in ("http", "https")


def _inside(name: str, root: str) -> str:
    return name.removeprefix(root.rstrip("/") + "/")


def _some(given: str | Path, files: list[Path]) -> list[Path]:
    if not files:
        raise InputError(f"folder {given} holds no file that ends in {', '.join(SUFFIXES)}")
    return files


def _source(file: Path, relative: Path) -> SourceFile:
    return SourceFile(file, _output_name(RelativeName(relative.as_posix())), *version_of(file))


def _output_name(relative: RelativeName) -> RelativeName:
    """Scores are parquet: a.jsonl.gz gives a.parquet."""
    suffix = _suffix_of(relative.name)
    if not suffix or suffix == ".parquet":
        return relative
    return relative.with_name(relative.name.removesuffix(suffix) + ".parquet")


def _suffix_of(name: str) -> str:
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def _is_input(relative: Path) -> bool:
    """By its name; False for what a writer has not finished: a leading dot or underscore anywhere."""
    return bool(_suffix_of(relative.name)) and not any(part.startswith((".", "_")) for part in relative.parts)


def identity(location: Location) -> str:
    """What two names of one file have in common."""
    return str(location.resolve() if isinstance(location, Path) else location)


def fixed_part(pattern: str) -> Path:
    """The folder of a glob before its first wildcard."""
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:fixed])


def fixed_part_of_url(pattern: str) -> str:
    """The same for a URL or a key."""
    first = next(i for i, character in enumerate(pattern) if character in "*?[")
    return pattern[:first].rpartition("/")[0]


def _check_column(location: Location, schema: pa.Schema, column: str, option: str) -> None:
    if (count := schema.names.count(column)) != 1:
        found = f"{count} columns named" if count else "no column"
        raise InputError(f"{location} has {found} {column!r}; it has {', '.join(schema.names)}: name one with {option}")


def _check_text_type(location: Location, column: str, found: pa.DataType) -> None:
    value = found.value_type if pa.types.is_dictionary(found) else found
    is_bytes = pa.types.is_binary(value) or pa.types.is_large_binary(value) or pa.types.is_binary_view(value)
    is_text = pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)
    if not (is_bytes or is_text or pa.types.is_null(value)):
        raise InputError(f"{location}: column {column!r} is {found}, expected text (a string or UTF-8 binary type)")


def _pieces(number: int, file: InputFile, chunk_rows: int, chunk_bytes: int) -> Iterator[Segment]:
    """Segments of one file: row groups joined while they fit in a chunk, cut where one alone does not."""
    start = stop = size = 0
    for n_rows, n_bytes in zip(file.group_rows, file.group_bytes, strict=True):
        n_parts = min(n_rows, max(1, -(-n_rows // chunk_rows), -(-n_bytes // chunk_bytes)))
        for part in range(n_parts):
            rows = n_rows * (part + 1) // n_parts - n_rows * part // n_parts
            if stop > start and (stop - start + rows > chunk_rows or size + n_bytes // n_parts > chunk_bytes):
                yield Segment(number, start, stop)
                start, size = stop, 0
            stop, size = stop + rows, size + n_bytes // n_parts
    yield Segment(number, start, stop)
