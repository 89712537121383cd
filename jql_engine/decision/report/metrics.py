"""Speed and bottleneck of a job over time, from the lines that jql-run --metrics appends."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from jql_engine.decision.report.figures import Moment, Speed
from jql_engine.errors import InputError
from jql_engine.fields import decode

MOST_MOMENTS = 40
CHUNKS = 4  # in a moment, at least: fewer would show chunks and not speed


@dataclass(frozen=True, slots=True)
class _Line:
    """What is read of a line; there is more in it."""

    time: str
    rows: int
    tokens: int
    seconds: dict[str, float]  # in which each stage worked
    failures: list[str] = field(default_factory=list)
    memory_bytes: int = 0

    @property
    def end(self) -> float:
        """Seconds since 1970."""
        return datetime.fromisoformat(self.time).timestamp()


def read_speed(file: Path) -> Speed:
    """Raises InputError where the file cannot be read, or holds no line of jql-run.

    A line that was cut off, as a kill or a full disk leaves it, is counted and left out.
    """
    try:
        with file.open(encoding="utf-8", errors="replace") as stream:
            parsed = [_parse(line) for line in stream if line.strip()]
    except OSError as error:
        raise InputError(f"--metrics {file} cannot be read: {error.strerror}") from error
    lines = sorted((line for line in parsed if line is not None), key=lambda line: line.end)
    if not lines:
        raise InputError(f"--metrics {file} holds none of the lines that jql-run --metrics writes")
    start = min(line.end - max(line.seconds.values(), default=0) for line in lines)
    moments = tuple(_moments(lines, start))
    busy = _busy(lines)
    return Speed(
        began=datetime.fromtimestamp(start, UTC).isoformat(timespec="seconds"),
        ended=datetime.fromtimestamp(lines[-1].end, UTC).isoformat(timespec="seconds"),
        minutes=(lines[-1].end - start) / 60,
        chunks=len(lines),
        damaged_lines=len(parsed) - len(lines),
        documents=sum(line.rows for line in lines),
        tokens=sum(line.tokens for line in lines),
        failures=sum(len(line.failures) for line in lines),
        memory_bytes=max(line.memory_bytes for line in lines),
        bottleneck=max(busy, key=lambda name: busy[name], default=None),
        moments=moments,
    )


def _parse(line: str) -> _Line | None:
    try:
        found: _Line = decode(_Line, json.loads(line), "a line")
        _ = found.end
    except (ValueError, RecursionError):
        return None
    return found


def _moments(lines: Sequence[_Line], start: float) -> Iterator[Moment]:
    """Equal stretches of time; a chunk counts when it was finished."""
    n_moments = min(MOST_MOMENTS, -(-len(lines) // CHUNKS))
    length = max(lines[-1].end - start, 1e-3) / n_moments
    by_moment: list[list[_Line]] = [[] for _ in range(n_moments)]
    for line in lines:
        by_moment[min(int((line.end - start) / length), n_moments - 1)].append(line)
    for number, own in enumerate(by_moment):
        busy = _busy(own)
        total = sum(busy.values())
        shares = {name: seconds / total for name, seconds in busy.items()} if total else {}
        yield Moment(
            start=number * length / 60,
            documents_per_second=sum(line.rows for line in own) / length,
            tokens_per_second=sum(line.tokens for line in own) / length,
            busy=shares,
            bottleneck=max(shares, key=lambda name: shares[name], default=None),
        )


def _busy(lines: Sequence[_Line]) -> dict[str, float]:
    """Seconds that each stage worked."""
    busy: dict[str, float] = {}
    for line in lines:
        for name, seconds in line.seconds.items():
            busy[name] = busy.get(name, 0.0) + seconds
    return busy
