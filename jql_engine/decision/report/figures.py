"""All figures of a report: what the page shows and what --json writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from jql_engine.decision.ranks import Weight
from jql_engine.decision.rules import Rule

FORMAT = 1
QUANTILES = (0.5, 0.6, 0.7, 0.8, 0.9)
MOST_LISTED = 200  # groups in tables, the largest; the others are summed
MOST_PLOTTED = 24  # groups with a histogram of their own
MOST_PAIRS = 15  # of heads with a plot


@dataclass(frozen=True, slots=True)
class Scope:
    """What figures are about: all documents, those of a group, or those of all groups that are not shown."""

    kind: Literal["all", "group", "others"]
    group: str | None  # of a group; None is the null
    n_groups: int


@dataclass(frozen=True, slots=True)
class Kept:
    """What a rule keeps at a quantile."""

    rule: Rule
    quantile: float
    documents: int
    document_share: float | None  # of those with scores; None where there are none
    tokens: int | None
    token_share: float | None


@dataclass(frozen=True, slots=True)
class Part:
    """Counts, thresholds, and what is kept by them."""

    scope: Scope
    is_pooled: bool  # whether the thresholds are those of all documents
    documents: int
    scored: int  # with finite scores of all heads
    null: int  # of the others each counts once: as null, or as NaN, or as infinite
    nan: int
    infinite: int
    tokens: int | None  # of documents with scores; None where the files do not tell
    truncated: int | None
    thresholds: tuple[tuple[float, ...], ...]  # [judged][quantiles]; none of groups that are summed
    kept: tuple[Kept, ...]


@dataclass(frozen=True, slots=True)
class Histogram:
    """Documents by a head's score, in the head's bins."""

    scope: Scope
    documents: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """A document that is shown."""

    file: str
    row: int  # from 0
    id: str | None
    group: str | None
    scores: tuple[float, ...]  # of each head
    n_tokens: int | None
    excerpt: str | None  # where a corpus is given


@dataclass(frozen=True, slots=True)
class Head:
    """One head's scores, whatever the others are."""

    head: str
    finite: int
    null: int
    nan: int
    infinite: int
    least: float | None
    median: float  # of the documents with scores of all heads, by the weight that was asked for
    greatest: float | None
    edges: tuple[float, ...]  # of the bins
    histograms: tuple[Histogram, ...]
    best: tuple[Example, ...]
    middle: tuple[Example, ...]  # whose scores are nearest to the median
    worst: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class Hexagons:
    """Documents by the scores of two heads, in hexagons; those with none are left out."""

    centres: tuple[tuple[float, float], ...]
    documents: tuple[int, ...]
    width: float  # of a hexagon
    height: float  # of two rows of them


@dataclass(frozen=True, slots=True)
class Pair:
    """How two heads agree."""

    first: str
    second: str
    spearman: float | None  # None where all scores of one are equal
    hexagons: Hexagons | None  # of the first MOST_PAIRS


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of a uniform sample of rows."""

    drawn: int
    compared: int  # rows drawn that have scores of all heads
    pairs: tuple[Pair, ...]


@dataclass(frozen=True, slots=True)
class Band:
    """Documents with scores that have from `least` to `most` tokens."""

    least: int
    most: int
    documents: int
    tokens: int
    truncated: int | None


@dataclass(frozen=True, slots=True)
class Moment:
    """A stretch of time of a job."""

    start: float  # minutes since the first line
    documents_per_second: float
    tokens_per_second: float
    busy: dict[str, float]  # share of each stage in the time that the stages worked
    bottleneck: str | None  # the busiest; None where no chunk was finished


@dataclass(frozen=True, slots=True)
class Speed:
    """What the lines of --metrics say."""

    began: str
    ended: str
    minutes: float
    chunks: int
    damaged_lines: int
    documents: int
    tokens: int
    failures: int
    memory_bytes: int  # the most of a process
    bottleneck: str | None
    moments: tuple[Moment, ...]


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where the scores come from."""

    inputs: tuple[str, ...]
    files: int
    settings: Mapping[str, Any]  # of the job; empty where jql-run did not write the files
    without_scores: tuple[str, ...]  # input files that the job has ended without; no part of any figure
    corpus: tuple[str, ...]
    certificate: Mapping[str, Any] | None  # of the bundle that was given


@dataclass(frozen=True, slots=True)
class Figures:
    """All figures of one report, as the page shows them."""

    weight: Weight
    min_group: int
    group_column: str | None
    rules: tuple[Rule, ...]
    quantiles: tuple[float, ...]
    judged: tuple[str, ...]  # what has thresholds: the heads, and their mean where there are several
    whole: Part
    groups: tuple[Part, ...]  # the largest first; empty without a group column
    pooled_groups: int  # also of those that are not listed
    heads: tuple[Head, ...]
    agreement: Agreement
    lengths: tuple[Band, ...]  # empty where the files do not tell
    speed: Speed | None
    provenance: Provenance

    def to_json(self) -> dict[str, Any]:
        """As --json writes it."""
        return {"format": FORMAT, **asdict(self)}
