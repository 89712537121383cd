"""The live line on stderr and the final summary."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import TextIO

from jql_engine.data import Batch

TERMINAL_SECONDS = 0.5
LOG_SECONDS = 30.0  # between lines where stderr is a file


@dataclass(slots=True)
class Counts:
    """What a run has done so far."""

    documents: int = 0  # rows read, scored or not
    null_documents: int = 0  # rows without a text, invalid UTF-8 included
    invalid_utf8: int = 0
    truncated: int = 0
    tokens: int = 0
    padding: int = 0
    files: int = 0
    skipped_files: int = 0  # finished by an earlier run


@dataclass(slots=True)
class Summary:
    """The last line of stdout, as JSON."""

    documents: int
    null_documents: int
    invalid_utf8: int
    truncated: int
    tokens: int
    seconds: float
    documents_per_second: float
    tokens_per_second: float
    padding_share: float
    files: int
    skipped_files: int
    variant: str
    bundle: str

    def to_dict(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)


@dataclass(slots=True)
class Meter:
    """Counts documents and tokens and tells how it goes."""

    total: int  # documents to come
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    counts: Counts = field(default_factory=Counts)
    started: float = field(default_factory=time.monotonic)
    _executed: int = 0
    _shown: float = field(default_factory=time.monotonic)

    def executed(self, batch: Batch) -> None:
        """Count a batch."""
        self._executed += len(batch.rows)
        self.counts.tokens += batch.n_tokens
        self.counts.padding += batch.n_padding
        now = time.monotonic()
        if now - self._shown >= (TERMINAL_SECONDS if self.stream.isatty() else LOG_SECONDS):
            self._shown = now
            self._show()

    def _show(self) -> None:
        seconds = max(1e-9, time.monotonic() - self.started)
        done = self._executed + self.counts.null_documents
        rate = done / seconds
        left = timedelta(seconds=round((self.total - done) / rate)) if rate else "?"
        line = (
            f"{done:,} of {self.total:,} documents, {rate:,.1f} documents/s, "
            f"{self.counts.tokens / seconds:,.0f} tokens/s, ETA {left}"
        )
        if self.stream.isatty():
            self.stream.write(f"\r\x1b[K{line}")
        else:
            self.stream.write(f"{line}\n")
        self.stream.flush()

    def close(self) -> None:
        """Leave the live line complete on the terminal."""
        if self.stream.isatty():
            self._show()
            self.stream.write("\n")

    def summary(self, variant: str, bundle: str) -> Summary:
        """The figures of the whole run."""
        c, seconds = self.counts, time.monotonic() - self.started
        computed = c.tokens + c.padding
        return Summary(
            c.documents, c.null_documents, c.invalid_utf8, c.truncated, c.tokens, round(seconds, 3),
            round(c.documents / seconds, 3), round(c.tokens / seconds, 1),
            round(c.padding / computed, 4) if computed else 0.0, c.files, c.skipped_files, variant, bundle,
        )  # fmt: skip
