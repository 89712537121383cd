"""From score files to the figures of a report: six passes over the needed columns, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from jql_engine.decision.census import Census, take_census
from jql_engine.decision.histogram import Histograms, count_in_bins
from jql_engine.decision.ranks import Weight
from jql_engine.decision.report.agreement import agreement_of
from jql_engine.decision.report.examples import Corpus, read_examples
from jql_engine.decision.report.extremes import Ends, Smallest
from jql_engine.decision.report.figures import (
    MOST_LISTED,
    MOST_PLOTTED,
    QUANTILES,
    Agreement,
    Band,
    Example,
    Head,
    Histogram,
    Kept,
    Part,
    Scope,
)
from jql_engine.decision.report.lengths import TRUNCATED, Lengths, has_truncated, limits
from jql_engine.decision.report.levels import Levels, count_levels
from jql_engine.decision.report.sampling import ScoreSample
from jql_engine.decision.rules import Rule
from jql_engine.decision.scores import Rows, ScoreFiles

MEDIAN = QUANTILES.index(0.5)


@dataclass(frozen=True, slots=True)
class Measured:
    """The part of a report that is about scores."""

    judged: tuple[str, ...]
    rules: tuple[Rule, ...]
    whole: Part
    groups: tuple[Part, ...]
    n_pooled: int  # groups, also those that are not listed, that take the thresholds of all documents
    heads: tuple[Head, ...]
    agreement: Agreement
    lengths: tuple[Band, ...]


def measure(files: ScoreFiles, corpus: Corpus | None, weight: Weight, min_group: int) -> Measured:
    """Read everything; raises InputError."""
    census = take_census(files)
    lengths, sample, ends = Lengths(), ScoreSample(files.n_rows, len(files.heads)), Ends.empty(len(files.heads))
    knows_truncated = has_truncated(files)
    for rows in (replace(files, extra_columns=(TRUNCATED,)) if knows_truncated else files).read():
        for watching in (lengths, sample, ends):
            watching.add(rows)
    histograms = count_in_bins(files, census)
    middle = [Smallest() for _ in files.heads]

    def look(rows: Rows, levels: Levels) -> None:
        chosen = np.flatnonzero(rows.is_scored)
        for scores, nearest, median in zip(rows.scores, middle, _medians(levels), strict=False):
            nearest.add(np.abs(scores[chosen] - median), rows, chosen)

    levels = count_levels(files, census, weight, min_group, QUANTILES, look)
    counting = _Counting(files, census, lengths.of_groups(census.n_groups) if knows_truncated else None, levels)
    examples = [(b.places, m.places, w.places) for b, m, w in zip(ends.best, middle, ends.worst, strict=True)]
    return Measured(
        judged=levels.population.heads,
        rules=levels.rules,
        whole=counting.part(Scope("all", None, census.n_groups), slice(None)),
        groups=counting.groups() if files.group_column is not None else (),
        n_pooled=int((levels.population.slots == levels.whole).sum()) if census.n_groups > 1 else 0,
        heads=_heads(counting, histograms, examples, corpus),
        agreement=agreement_of(files.heads, sample.scores, sample.n_drawn),
        lengths=_bands(lengths, knows_truncated) if files.has_tokens else (),
    )


def _medians(levels: Levels) -> NDArray[np.float64]:
    """Of every head, of all documents."""
    return levels.thresholds[levels.whole, :, MEDIAN].astype(np.float64)


@dataclass(frozen=True, slots=True)
class _Counting:
    """What was counted by group, from which parts are put together."""

    files: ScoreFiles
    census: Census
    truncated: NDArray[np.int64] | None  # [G]; None where the files do not tell
    levels: Levels

    @property
    def by_size(self) -> NDArray[np.int64]:
        """Numbers of the groups, those with the most documents first."""
        return np.argsort(-self.census.documents, kind="stable")

    def groups(self) -> tuple[Part, ...]:
        """The largest groups, and the sum of the others."""
        scopes = self.scopes(MOST_LISTED)
        return tuple(self.part(scope, numbers) for scope, numbers in scopes)

    def scopes(self, most: int) -> list[tuple[Scope, NDArray[np.int64]]]:
        """The `most` largest groups and the others, with their numbers."""
        large, small = self.by_size[:most], self.by_size[most:]
        names = self.files.groups.names
        scopes = [(Scope("group", names[number], 1), np.array([number])) for number in large.tolist()]
        return scopes if not len(small) else [*scopes, (Scope("others", None, len(small)), small)]

    def part(self, scope: Scope, groups: NDArray[np.int64] | slice) -> Part:
        """Of the groups with these numbers."""
        census, levels = self.census, self.levels
        null, nan, infinite = (int(one[groups].sum()) for one in census.faulty)
        slot = {"all": levels.whole, "others": None}.get(scope.kind, int(levels.population.slots[groups][0]))
        return Part(
            scope=scope,
            is_pooled=scope.kind == "group" and census.n_groups > 1 and slot == levels.whole,
            documents=int(census.documents[groups].sum()),
            scored=int(census.scored[groups].sum()),
            null=null,
            nan=nan,
            infinite=infinite,
            tokens=int(census.tokens[groups].sum()) if self.files.has_tokens else None,
            truncated=None if self.truncated is None else int(self.truncated[groups].sum()),
            thresholds=() if slot is None else tuple(map(tuple, levels.thresholds[slot].tolist())),
            kept=self._kept(groups),
        )

    def _kept(self, groups: NDArray[np.int64] | slice) -> tuple[Kept, ...]:
        scored, tokens = int(self.census.scored[groups].sum()), int(self.census.tokens[groups].sum())
        kept = []
        for number, rule in enumerate(self.levels.rules):
            for at, quantile in enumerate(self.levels.at):
                n_docs = int(self.levels.documents[number, at, groups].sum())
                n_tokens = int(self.levels.tokens[number, at, groups].sum()) if self.files.has_tokens else None
                token_share = None if n_tokens is None else _share(n_tokens, tokens)
                kept.append(Kept(rule, quantile, n_docs, _share(n_docs, scored), n_tokens, token_share))
        return tuple(kept)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _heads(
    counting: _Counting,
    histograms: Histograms,
    examples: Sequence[tuple[list[tuple[int, int]], ...]],
    corpus: Corpus | None,
) -> tuple[Head, ...]:
    shown = read_examples(counting.files, [place for three in examples for one in three for place in one], corpus)
    return tuple(
        _head(counting, histograms, number, [tuple(shown[place] for place in one) for one in three])
        for number, three in enumerate(examples)
    )


def _head(counting: _Counting, histograms: Histograms, number: int, examples: list[tuple[Example, ...]]) -> Head:
    census = counting.census
    null, nan, infinite = (int(one[number].sum()) for one in census.faulty_scores)
    least, greatest = float(census.least[number].min()), float(census.greatest[number].max())
    finite = int(census.documents.sum()) - null - nan - infinite
    scopes = [(Scope("all", None, census.n_groups), np.arange(census.n_groups))]
    if census.n_groups > 1:
        scopes += counting.scopes(MOST_PLOTTED)
    best, middle, worst = examples
    return Head(
        head=counting.files.heads[number],
        finite=finite,
        null=null,
        nan=nan,
        infinite=infinite,
        least=least if finite else None,
        median=float(_medians(counting.levels)[number]),
        greatest=greatest if finite else None,
        edges=tuple(histograms.edges[number].tolist()),
        histograms=tuple(
            Histogram(scope, tuple(histograms.documents[groups, number].sum(axis=0).tolist()))
            for scope, groups in scopes
        ),
        best=best,
        middle=middle,
        worst=worst,
    )


def _bands(lengths: Lengths, knows_truncated: bool) -> tuple[Band, ...]:
    """From the first to the last band that holds a document."""
    held = np.flatnonzero(lengths.documents)
    if not len(held):
        return ()
    return tuple(
        Band(
            *limits(band),
            documents=int(lengths.documents[band]),
            tokens=int(lengths.tokens[band]),
            truncated=int(lengths.truncated[band]) if knows_truncated else None,
        )
        for band in range(int(held[0]), int(held[-1]) + 1)
    )
