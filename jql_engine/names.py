"""Names of files inside a folder that cannot lead out of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeVar

from jql_engine.errors import UnsafeNameError

if TYPE_CHECKING:
    from upath import UPath

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")  # joined to a remote folder it would lead elsewhere
L = TypeVar("L", "Path", "UPath", "Path | UPath")


@dataclass(frozen=True, slots=True, order=True)
class RelativeName:
    """A path of plain segments, as a listing, a manifest or a hub gives it; the only type that is joined to a folder.

    Raises UnsafeNameError for any other: an absolute path, an empty segment, ".", "..", a NUL, a lone surrogate (what
    Python makes of bytes that are not UTF-8).
    """

    text: str  # segments joined by "/"

    def __post_init__(self) -> None:
        for segment in self.text.split("/"):
            if why := _fault(segment) or ("it begins like a URL" if URL.match(self.text) else None):
                raise UnsafeNameError(
                    f"{self.text!r} cannot be the name of a file inside a folder: {why}; rename the file"
                )

    def __str__(self) -> str:
        return self.text

    @property
    def segments(self) -> tuple[str, ...]:
        """The names of the folders, and that of the file."""
        return tuple(self.text.split("/"))

    @property
    def name(self) -> str:
        """The last segment."""
        return self.segments[-1]

    @property
    def folders(self) -> tuple[str, ...]:
        """Every folder above the file as a path below the root, the nearest first."""
        return tuple(str(parent) for parent in PurePosixPath(self.text).parents)[:-1]

    def with_name(self, name: str) -> RelativeName:
        """The same place under another name."""
        return RelativeName("/".join([*self.segments[:-1], name]))

    def below(self, root: L) -> L:
        """The file in the folder `root`."""
        return root / self.text


def _fault(segment: str) -> str | None:
    if segment in ("", ".", ".."):
        return f"{segment!r} is no plain path segment"
    if "\0" in segment:
        return "it holds a NUL"
    try:
        segment.encode()
    except UnicodeEncodeError:
        return "it is not UTF-8"
    return None
