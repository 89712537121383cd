"""What is asked for, and what is answered: thresholds with what they keep; the content of thresholds.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from jql_engine.decision.ranks import Weight
from jql_engine.decision.rules import Rule

FORMAT = 1  # of thresholds.json
MIN_GROUP = 1_000


@dataclass(frozen=True, slots=True)
class Request:
    """What to keep; one of `quantile`, `keep` and `keep_tokens` is given."""

    rule: Rule
    weight: Weight = "documents"
    quantile: float | None = None
    keep: float | None = None  # share of the scored documents, or of their tokens by `weight`
    keep_tokens: int | None = None
    min_group: int = MIN_GROUP  # documents with scores; groups with fewer take the threshold of all groups

    def __post_init__(self) -> None:
        assert sum(one is not None for one in (self.quantile, self.keep, self.keep_tokens)) == 1
        assert self.quantile is None or 0 <= self.quantile <= 1
        assert self.keep is None or 0 < self.keep <= 1
        assert self.keep_tokens is None or self.keep_tokens > 0

    @property
    def kept_weight(self) -> Weight:
        """In which what is kept is counted."""
        return self.weight if self.keep_tokens is None else "tokens"


@dataclass(frozen=True, slots=True)
class HeadThreshold:
    """The score from which on documents are kept.

    Between the two ends lies, with 95 % confidence, the threshold of all documents that the scored ones are a uniform
    sample of; null where the sample is too small to tell. Tokens count as a sample of Kish's effective size.
    """

    head: str
    threshold: float
    interval: tuple[float | None, float | None]
    share: float  # of the weight that it is taken from, at or above it: where scores are equal, more than asked for


@dataclass(frozen=True, slots=True)
class Counts:
    """Documents, and tokens of those with scores; None where the files do not tell."""

    documents: int
    scored: int
    null: int  # a score is null, NaN or infinite: dropped
    nan: int
    infinite: int
    tokens: int | None
    kept_documents: int
    kept_tokens: int | None


@dataclass(frozen=True, slots=True)
class GroupResult:
    """Thresholds of one group, and what they keep."""

    group: str | None  # None: the null, or all documents where there is no group column
    is_pooled: bool  # whether the thresholds are those of all groups together
    thresholds: tuple[HeadThreshold, ...]
    counts: Counts


@dataclass(frozen=True, slots=True)
class Target:
    """How much was to be kept, in documents or tokens, and how much is.

    Documents that stop being kept at the same quantile, those with equal scores among them, are kept together.
    """

    unit: Weight
    asked: int
    kept: int
    excess: int


@dataclass(frozen=True, slots=True)
class Decision:
    """All thresholds, and what they keep."""

    request: Request
    quantile: float  # common to all heads and groups
    target: Target | None  # where a share or a number of tokens was asked for
    group_column: str | None
    score_columns: tuple[str, ...]
    settings: dict[str, Any]  # of the job that wrote the scores
    without_scores: tuple[str, ...]  # input files that it has ended without; no part of the counts
    counts: Counts
    groups: tuple[GroupResult, ...]

    def to_json(self) -> dict[str, Any]:
        """The content of thresholds.json."""
        return {"format": FORMAT, **asdict(self)}
