"""The live line on stderr, the run log, and the final summary."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TextIO

from jql_engine.errors import OutputError
from jql_engine.files.chunks import ChunkDone, StageSeconds
from jql_engine.files.location import Location
from jql_engine.job.check import would_find
from jql_engine.printing import redact, show

TERMINAL_SECONDS = 0.5
LOG_SECONDS = 30.0  # between lines where stderr is a file


@dataclass(slots=True)
class Meter:
    """Counts what is done and tells how it goes."""

    total: int  # documents to come
    n_workers: int = 1
    stream: TextIO | None = field(default_factory=lambda: sys.stderr)  # None: it was closed
    documents: int = 0
    null_documents: int = 0
    invalid_utf8: int = 0
    truncated: int = 0
    tokens: int = 0
    padding: int = 0
    overflowed: int = 0
    stages: dict[str, StageSeconds] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    _live: list[int] = field(
        default_factory=lambda: [0, 0, 0]
    )  # documents, tokens, padding of batches, ahead of chunks
    _shown: float = field(default_factory=time.monotonic)

    def executed(self, documents: int, tokens: int, padding: int = 0) -> None:
        """A batch was computed."""
        for i, count in enumerate((documents, tokens, padding)):
            self._live[i] += count
        now = time.monotonic()
        if now - self._shown >= (TERMINAL_SECONDS if self._is_live else LOG_SECONDS):
            self._shown = now
            self._show()

    def record(self, done: ChunkDone) -> None:
        """A chunk is committed."""
        for name in ("documents", "null_documents", "invalid_utf8", "truncated", "tokens", "padding", "overflowed"):
            setattr(self, name, getattr(self, name) + getattr(done, name))
        for name, seconds in done.stages.items():
            self.stages[name] = self.stages.get(name, StageSeconds(0, 0, 0)) + seconds

    @property
    def seconds(self) -> float:
        """Seconds since the run began."""
        return max(1e-9, time.monotonic() - self.started)

    @property
    def _is_live(self) -> bool:
        return self.stream is not None and not self.stream.closed and self.stream.isatty()

    def shares(self) -> dict[str, dict[str, float]]:
        """How each stage spent the time of all workers, as shares of it."""
        total = self.seconds * self.n_workers
        return {
            name: {kind: round(value / total, 3) for kind, value in asdict(seconds).items()}
            for name, seconds in dict(self.stages).items()  # another thread may add one
        }

    @property
    def bottleneck(self) -> str | None:
        """The stage that the others wait for: the one that worked longest."""
        return max(self.stages, key=lambda name: self.stages[name].busy, default=None)

    def _show(self, end: str = "") -> None:
        done = self._live[0] + self.null_documents
        rate = done / self.seconds
        left = timedelta(seconds=round(max(0, self.total - done) / rate)) if rate else "?"
        line = (
            f"{done:,} of {self.total:,} documents, {rate:,.1f} documents/s, "
            f"{self._live[1] / self.seconds:,.0f} tokens/s, padding {self._live[2] / max(1, sum(self._live[1:])):.1%}, "
            f"ETA {left}"
        )
        if name := self.bottleneck:
            line += f", bottleneck {name} ({self.shares()[name]['busy']:.0%} busy)"
        show(self.stream, line, end if self._is_live else "\n")

    def say(self, line: str) -> None:
        """A sentence of its own, below the live line."""
        show(self.stream, line)

    def close(self) -> None:
        """Leave the live line complete on the terminal."""
        if self._is_live:
            self._show("\n")

    def figures(self) -> dict[str, Any]:
        """What the summary says of the work done."""
        computed = self.tokens + self.padding
        return {
            "documents": self.documents,
            "null_documents": self.null_documents,
            "invalid_utf8": self.invalid_utf8,
            "truncated": self.truncated,
            "overflowed": self.overflowed,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "documents_per_second": round(self.documents / self.seconds, 3),
            "tokens_per_second": round(self.tokens / self.seconds, 1),
            "padding_share": round(self.padding / computed, 4) if computed else 0.0,
            "stages": self.shares(),
            "bottleneck": self.bottleneck,
        }


@dataclass(slots=True)
class RunLog:
    """Appends one line of JSON for every chunk to a file, until that fails; the job goes on without it."""

    file: Path | None
    failure: str | None = None  # why no more lines are written

    def check(self, folders: Sequence[str | Location] = ()) -> None:
        """Raise OutputError where the file cannot be written, or would be taken for data in one of `folders`."""
        for given in folders:
            if self.file is not None and would_find(given, self.file):
                raise OutputError(
                    f"--metrics {self.file} lies in {given}, where it would be taken for documents or scores; choose "
                    "another folder, or a name that ends in .log"
                )
        try:
            if self.file is not None:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                self.file.open("a").close()
        except OSError as error:
            raise OutputError(f"--metrics {self.file} cannot be written: {error.strerror}") from error

    def record(self, done: ChunkDone, names: list[str]) -> None:
        """Write the line of a chunk of the files `names`."""
        if self.file is None or self.failure is not None:
            return
        segments = [
            {"file": name, "start": segment.start, "stop": segment.stop}
            for name, segment in zip(names, done.task.chunk.segments, strict=True)
        ]
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "chunk": done.task.number,
            "segments": segments,
            "rows": done.documents,
            "tokens": done.tokens,
            "padding": done.padding,
            "truncated": done.truncated,
            "overflowed": done.overflowed,
            "seconds": {name: round(seconds.busy, 4) for name, seconds in done.stages.items()},
            "failures": [failure.message for failure in done.failures],
            "memory_bytes": done.memory_bytes,
        }
        try:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(redact(json.dumps(line, ensure_ascii=False)) + "\n")
        except OSError as error:
            self.failure = (
                f"--metrics {self.file} cannot be written: {error.strerror}; free some space: lines are missing from "
                f"{line['time']} on, the scores are not affected"
            )
