"""Two sets of scores of the same documents: how far apart they are, and how many documents they decide differently.

What a faster graph costs is not a difference of scores but documents that change sides: kept by one set at a cut
and not by the other. Each set has its own thresholds, as each would be used: a shift of all scores changes nothing.

Memory. The scores of both sets are held, 8 bytes a document and head, and as much again while they are ranked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from jql_engine.decision.interval import share_interval
from jql_engine.decision.result import MIN_GROUP
from jql_engine.decision.rules import RULES, Rule, join, judged_scores
from jql_engine.errors import InputError

CUTS = (0.5, 0.6, 0.7, 0.8, 0.9)
Cut: TypeAlias = tuple[str, bool, float]  # a head or a rule by its name, whether it is a rule, and the quantile
QUANTILES = (0.5, 0.9, 0.99, 0.999)  # of the absolute difference
BANDS = (128, 512, 2_048)  # tokens up to which a band of lengths goes; the last band has no end


@dataclass(frozen=True, slots=True)
class Paired:
    """Scores of the same documents from two sets."""

    heads: tuple[str, ...]
    first: NDArray[np.float32]  # [H, n]; NaN where there is no score
    second: NDArray[np.float32]  # [H, n]
    n_tokens: NDArray[np.int64]  # [n]
    groups: NDArray[np.int64]  # [n], numbers of `names`
    names: tuple[str | None, ...]

    def __post_init__(self) -> None:
        assert self.first.shape == self.second.shape == (len(self.heads), len(self.groups))
        assert self.n_tokens.shape == self.groups.shape

    def where(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> Paired:
        """Some of the documents."""
        first, second = self.first[:, chosen], self.second[:, chosen]
        return Paired(self.heads, first, second, self.n_tokens[chosen], self.groups[chosen], self.names)


@dataclass(frozen=True, slots=True)
class Difference:
    """Of one head's scores in the two sets."""

    head: str
    greatest: float
    quantiles: tuple[float, ...]  # QUANTILES of the absolute difference
    spearman: float | None  # correlation of ranks; None where all scores of one set are equal


@dataclass(frozen=True, slots=True)
class Flips:
    """Documents that change sides at one cut."""

    what: str  # a head by its name, or a rule
    is_rule: bool
    cut: float
    documents: int
    share: float
    interval: tuple[float, float]  # of the share in documents like these, with 95 % confidence


@dataclass(frozen=True, slots=True)
class Slice:
    """All documents, those of a group, of a band of lengths, or of both."""

    group: str | None  # None: of all groups
    has_group: bool
    tokens: tuple[int, int | None] | None  # least and most tokens; None: of any length
    is_pooled: bool  # whether a group's documents are judged by the thresholds of all groups together
    documents: int
    differences: tuple[Difference, ...]
    flips: tuple[Flips, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two sets of scores, compared."""

    heads: tuple[str, ...]
    documents: int
    compared: int  # documents whose scores are finite in both sets
    only_first: int  # documents with scores in the first set alone
    only_second: int
    slices: tuple[Slice, ...]

    @property
    def whole(self) -> Slice:
        """All documents."""
        return self.slices[0]

    def to_json(self) -> dict[str, Any]:
        """As it is written: everything that the page shows."""
        return {**asdict(self), "quantiles": QUANTILES, "cuts": CUTS}


def compare(paired: Paired, min_group: int = MIN_GROUP) -> Comparison:
    """Compare all documents, then each group, each band of lengths, and each band of each group.

    Thresholds are those of the documents that have scores in both sets; a document without is counted and left out.
    Raises InputError where no document has scores in both.
    """
    in_first, in_second = (np.asarray(np.isfinite(one).all(axis=0)) for one in (paired.first, paired.second))
    chosen = paired.where(np.asarray(in_first & in_second))
    if not len(chosen.groups):
        raise InputError(f"none of the {len(paired.groups):,} documents has finite scores in both sets")
    return Comparison(
        paired.heads,
        len(paired.groups),
        len(chosen.groups),
        int((in_first & ~in_second).sum()),
        int((in_second & ~in_first).sum()),
        tuple(_slices(chosen, _sides(chosen, min_group), min_group)),
    )


def _slices(paired: Paired, sides: Mapping[Cut, NDArray[np.bool_]], min_group: int) -> Iterator[Slice]:
    """The slices in their order; documents are sorted by group and band once, so that each slice is a part of them."""
    n_bands, names = len(BANDS) + 1, paired.names
    bands = np.searchsorted(BANDS, paired.n_tokens, side="left")
    cells = paired.groups * n_bands + bands
    counts = np.bincount(cells, minlength=len(names) * n_bands).reshape(len(names), n_bands)
    flips = np.stack([np.bincount(cells[flipped], minlength=counts.size) for flipped in sides.values()])
    flips = flips.reshape(len(sides), *counts.shape)
    by_group, by_band = (np.argsort(keys, kind="stable") for keys in (cells, bands))
    limits = [(least + 1, most) for least, most in zip((0, *BANDS), (*BANDS, None), strict=True)]
    ends = np.cumsum(counts.ravel()).reshape(counts.shape)

    def part(number: int | None, band: int | None, n_flips: NDArray[np.int64], rows: Paired) -> Slice:
        group, is_pooled = None, False
        if number is not None:
            group, is_pooled = names[number], int(counts[number].sum()) < min_group
        tokens = None if band is None else limits[band]
        found = [_flips(cut, int(n), len(rows.groups)) for cut, n in zip(sides, n_flips, strict=True)]
        n_docs = len(rows.groups)
        return Slice(group, number is not None, tokens, is_pooled, n_docs, _differences(rows), tuple(found))

    yield part(None, None, flips.sum(axis=(1, 2)), paired)
    in_bands = counts.sum(axis=0)
    for band in _shown(in_bands):
        stop = int(in_bands[: band + 1].sum())
        rows = paired.where(by_band[stop - int(in_bands[band]) : stop])
        yield part(None, band, flips[:, :, band].sum(axis=1), rows)
    if len(names) == 1:
        return
    scored = np.flatnonzero(counts.any(axis=1)).tolist()  # in both sets, at least one document
    for number in sorted(scored, key=lambda number: (names[number] is None, names[number] or "")):
        stop = int(ends[number, -1])
        rows = paired.where(by_group[stop - int(counts[number].sum()) : stop])
        yield part(number, None, flips[:, number].sum(axis=1), rows)
        for band in _shown(counts[number]):
            stop = int(ends[number, band])
            rows = paired.where(by_group[stop - int(counts[number, band]) : stop])
            yield part(number, band, flips[:, number, band], rows)


def _shown(counts: NDArray[np.int64]) -> list[int]:
    """Bands that have documents, unless one has all of them."""
    bands = np.flatnonzero(counts).tolist()
    return bands if len(bands) > 1 else []


def _flips(cut: Cut, n_flips: int, n_docs: int) -> Flips:
    share = n_flips / n_docs if n_docs else 0.0
    return Flips(*cut, n_flips, share, share_interval(n_flips, n_docs))


def _differences(rows: Paired) -> tuple[Difference, ...]:
    return tuple(_difference(*one) for one in zip(rows.heads, rows.first, rows.second, strict=True))


def _difference(head: str, first: NDArray[np.float32], second: NDArray[np.float32]) -> Difference:
    apart = np.abs(first.astype(np.float64) - second)
    quantiles = np.quantile(apart, QUANTILES, method="inverted_cdf")
    return Difference(head, float(apart.max()), tuple(map(float, quantiles)), spearman(first, second))


def spearman(first: NDArray[np.float32], second: NDArray[np.float32]) -> float | None:
    """Pearson's correlation of the ranks, equal scores sharing the mean of theirs; None where all of one are equal."""
    a, b = (_ranks(scores) for scores in (first, second))
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return None if scale == 0 else float(a @ b) / scale


def _ranks(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    means: NDArray[np.float64] = np.cumsum(counts) - (counts - 1) / 2
    return means[places]


def _sides(paired: Paired, min_group: int) -> dict[Cut, NDArray[np.bool_]]:
    """Which documents [n] change sides, by head or rule and cut."""
    slots = _slots(paired.groups, len(paired.names), min_group)
    changed = {}
    for cut in CUTS:
        first, second = (_reached(scores, slots, cut) for scores in (paired.first, paired.second))
        for head, one, other in zip(paired.heads, first, second, strict=True):
            changed[head, False, cut] = one != other
        for rule in RULES if len(paired.heads) > 1 else ():
            kept = [_kept(rule, scores, slots, cut) for scores in (paired.first, paired.second)]
            changed[rule, True, cut] = kept[0] != kept[1]
    return changed


def _slots(groups: NDArray[np.int64], n_groups: int, min_group: int) -> NDArray[np.int64]:
    """The group of each document whose thresholds judge it; -1: those of all documents."""
    counts = np.bincount(groups, minlength=n_groups)
    return np.where(counts[groups] >= min_group, groups, -1)


def _kept(rule: Rule, scores: NDArray[np.float32], slots: NDArray[np.int64], cut: float) -> NDArray[np.bool_]:
    return join(rule, _reached(judged_scores(rule, scores), slots, cut))


def _reached(scores: NDArray[np.float32], slots: NDArray[np.int64], cut: float) -> NDArray[np.bool_]:
    """Whether each score [J, n] is at or above the quantile `cut` of its slot."""
    reached = np.zeros(scores.shape, np.bool_)
    order = np.argsort(slots, kind="stable")
    _, starts = np.unique(slots[order], return_index=True)
    for rows in np.split(order, starts[1:]):
        for one, found in zip(scores, reached, strict=True):
            own = one if slots[rows[0]] < 0 else one[rows]
            found[rows] = one[rows] >= np.quantile(own, [cut], method="inverted_cdf")[0]
    return reached


def flips_at(slice_: Slice, cut: float, rules: Sequence[str] = ("all",)) -> list[Flips]:
    """The flips of a slice at one cut, of every head alone and under `rules`."""
    return [one for one in slice_.flips if one.cut == cut and (not one.is_rule or one.what in rules)]
