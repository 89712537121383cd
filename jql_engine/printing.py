"""What is shown of names and messages: no secrets, and nothing that a terminal or a JSON reader cannot take."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from typing import TextIO

CLEARED = "\r\x1b[K"  # to the start of the line, and what is in it
# What stands before the "@" of these names no user but a container or a repository.
PLACES = {"abfs", "abfss", "az", "wasb", "wasbs", "github"}
# A password may hold any sign, though it should not: after a colon that no port follows, up to the first "@".
USER = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]*)://(?:[^\s/?#\"\\]*|(?!arn:)[^\s/?#\"\\:@\[]*:(?!\d+[/?#])[^\s\"\\@]*)@")
# To the next blank or quotation mark, without the punctuation of the sentence around it.
QUERY = re.compile(r"\b(https?://[^\s?#\"\\]*\?)[^\s\"\\]*[^\s\"\\:;,.)'\]>]", re.IGNORECASE)


def redact(text: str) -> str:
    """`text` as it may be shown: without users and passwords of URLs and the queries of http; lone surrogates escaped.

    For whole lines, JSON included, so that messages of other libraries are covered. A pre-signed URL keeps its "?".
    """
    text = text.encode("utf-8", "backslashreplace").decode()
    return QUERY.sub(r"\1…", USER.sub(_without_user, text))


def counted(n: int, thing: str) -> str:
    """`n` of a thing, in words: "1 file", "2,000 files"."""
    return f"{n:,} {thing}" if n == 1 else f"{n:,} {thing}s"


def say(line: str) -> None:
    """Write a line to stderr, over the live line where there is one."""
    show(sys.stderr, line)


def show(stream: TextIO | None, line: str, end: str = "\n") -> None:
    """Write a line over the live line of a terminal; where that cannot be written, as on a full disk, nothing fails."""
    with suppress(OSError, ValueError):  # ValueError: it was closed
        if stream is not None:
            stream.write(f"{CLEARED if stream.isatty() else ''}{redact(line)}{end}")
            stream.flush()


def _without_user(found: re.Match[str]) -> str:
    return found[0] if found[1].lower() in PLACES else f"{found[1]}://…@"
