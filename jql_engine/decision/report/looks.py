"""Sections of a report that are looked at: histograms, agreement, lengths, and single documents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jql_engine.decision.report.decisions import scope_name
from jql_engine.decision.report.figures import MOST_PAIRS, MOST_PLOTTED, Example, Figures, Head, Histogram
from jql_engine.decision.report.page import (
    NO_VALUE,
    Column,
    Content,
    Html,
    Section,
    Table,
    count,
    element,
    number,
    paragraph,
    score,
    side_by_side,
    text,
)
from jql_engine.decision.report.plots import Plots

SHORT = 32  # characters of a name that is kept on one line


def histogram_section(figures: Figures, plots: Plots) -> Section:
    """A histogram for each head and group."""
    content: list[Html] = [
        paragraph(
            "The area is the share of a group's documents by their score, the line that of all documents. The bins of "
            "a head are the same everywhere; their counts are in the figures that --json writes."
        )
    ]
    if any(one.scope.kind == "others" for head in figures.heads for one in head.histograms):
        content.append(
            paragraph(
                f"The {MOST_PLOTTED} groups with the most documents have a plot of their own; the others are summed."
            )
        )
    for head in figures.heads:
        content.append(element("h3", [head.head]))
        shown = [(_histogram(figures, head, one, plots), _caption(figures, one)) for one in head.histograms]
        content.append(side_by_side(shown))
    return Section("histograms", "How scores are distributed", content)


def _histogram(figures: Figures, head: Head, histogram: Histogram, plots: Plots) -> Html:
    shares, of_all = (_shares(one.documents) for one in (histogram, head.histograms[0]))
    name, total = scope_name(histogram.scope, figures.group_column), sum(histogram.documents)
    label = f"Histogram of {head.head}, {name}: {total:,} documents"
    if total:
        ends = [head.edges[int(np.searchsorted(np.cumsum(histogram.documents), total * q))] for q in (0.25, 0.5, 0.75)]
        label += "; a quarter of them below about {:.3g}, half below {:.3g}, three quarters below {:.3g}".format(*ends)
    return plots.histogram(label, head.edges, shares, of_all)


def _caption(figures: Figures, histogram: Histogram) -> Content:
    name = element("strong", [scope_name(histogram.scope, figures.group_column)])
    return element("span", [name, " ", count(sum(histogram.documents))])


def _shares(counts: Sequence[int]) -> list[float]:
    total = max(sum(counts), 1)
    return [one / total for one in counts]


def agreement_section(figures: Figures, plots: Plots) -> Section:
    """Correlations of every two heads, and hexagons."""
    found = figures.agreement
    note = paragraph(
        f"Of a uniform sample of {found.drawn:,} of {figures.whole.documents:,} rows, the same one each time; "
        f"{found.compared:,} of them have scores of all heads."
    )
    table = Table(
        "Spearman's rank correlation: 1 where two heads put documents in the same order, 0 where they have nothing in "
        "common.",
        [Column("head", "text"), Column("head", "text"), Column("correlation")],
        [[[one.first, one.second, number(one.spearman, f"{one.spearman or 0:.3f}")] for one in found.pairs]],
        2,
    )
    drawn = []
    for one in found.pairs:
        if one.hexagons is not None:
            label = f"Documents by their scores of {one.first} and {one.second}, Spearman {one.spearman or 0:.3f}"
            hexagons = one.hexagons
            step = hexagons.width, hexagons.height
            plot = plots.hexagons(label, np.array(hexagons.centres), np.array(hexagons.documents), step)
            drawn.append(
                (plot, f"{one.first} to the right, {one.second} upwards; the stronger the color, the more documents")
            )
    more = [paragraph(f"The first {MOST_PAIRS} pairs have a plot.")] if len(found.pairs) > MOST_PAIRS else []
    return Section("agreement", "How heads agree", [note, table.to_html(), side_by_side(drawn), *more])


def lengths_section(figures: Figures, plots: Plots) -> Section:
    """Documents by their number of tokens."""
    total = max(sum(band.documents for band in figures.lengths), 1)
    names = [f"{band.least:,}" for band in figures.lengths]
    plot = plots.bars(
        "Share of documents by their number of tokens; the table below has the counts",
        names,
        [band.documents / total for band in figures.lengths],
        "% of documents",
    )
    table = Table(
        "Documents with scores by their number of tokens, as the encoder read them.",
        [Column("tokens", "text"), Column("documents"), Column("their tokens"), Column("truncated")],
        [[[_band(band.least, band.most), count(band.documents), count(band.tokens), count(band.truncated)]
          for band in figures.lengths]],
    )  # fmt: skip
    return Section(
        "lengths",
        "How long documents are",
        [side_by_side([(plot, "tokens, from the number below each bar")]), table.to_html()],
    )


def _band(least: int, most: int) -> str:
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def examples_section(figures: Figures) -> Section:
    """The best, the middle and the worst documents of each head."""
    given = figures.provenance.corpus
    content = [
        paragraph(
            "Documents with equal scores come in the order of their files. "
            + ("An excerpt is the beginning of a text." if given else "--corpus shows their texts.")
        )
    ]
    for number_, head in enumerate(figures.heads):
        content.append(element("h3", [head.head]))
        for what, shown in (
            ("with the highest scores", head.best),
            (f"nearest to the median, {head.median:.4g}", head.middle),
            ("with the lowest scores", head.worst),
        ):
            table = _examples(figures, f"{head.head}: {len(shown)} documents {what}.", number_, shown)
            content.append(table.to_html())
    return Section("documents", "Best, median and worst documents", content)


def _examples(figures: Figures, caption: str, head: int, examples: Sequence[Example]) -> Table:
    others = [i for i in range(len(figures.heads)) if i != head]
    has_id = any(one.id is not None for one in examples)
    has_text = any(one.excerpt is not None for one in examples)
    columns = [Column(figures.heads[i].head) for i in (head, *others)]
    columns += [Column("tokens")] * any(one.n_tokens is not None for one in examples)
    columns += [Column(figures.group_column or "", "text")] * (figures.group_column is not None)
    columns += [Column("id", "text")] * has_id + [Column("file", "text"), Column("row")]
    columns += [Column("text", "excerpt")] * has_text
    rows: list[list[Content]] = []
    for one in examples:
        row: list[Content] = [score(one.scores[i]) for i in (head, *others)]
        row += [count(one.n_tokens)] * (one.n_tokens is not None)
        row += [NO_VALUE if one.group is None else one.group] * (figures.group_column is not None)
        row += [NO_VALUE if one.id is None else _whole(one.id)] * has_id
        row += [_whole(one.file), number(one.row, str(one.row))]
        row += [text(one.excerpt or "")] * has_text
        rows.append(row)
    return Table(caption, columns, [rows], 0)


def _whole(name: str) -> Content:
    """A name on one line, where it is short."""
    return element("span", [name], {"class": "whole"}) if len(name) <= SHORT else name
