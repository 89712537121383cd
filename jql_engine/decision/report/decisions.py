"""Sections of a report: what there is, what each rule keeps of it, and by which thresholds."""

from __future__ import annotations

from collections.abc import Sequence

from jql_engine.decision.report.figures import MOST_LISTED, Figures, Kept, Part, Scope
from jql_engine.decision.report.page import (
    NO_VALUE,
    Column,
    Content,
    Html,
    Section,
    Table,
    count,
    paragraph,
    percent,
    score,
    share,
    text,
)

RULES = {
    "all": "all heads reach their thresholds (as in the JQL paper)",
    "any": "any head does",
    "mean": "the mean of the heads does",
}


def scope_name(scope: Scope, group_column: str | None) -> str:
    """What figures are about, in words."""
    if scope.kind == "all":
        return "all documents"
    if scope.kind == "others":
        return f"{scope.n_groups:,} others"
    return f"no {group_column}" if scope.group is None else scope.group


def contents_section(figures: Figures) -> Section:
    """Documents, tokens, truncation, and scores that are missing, by group and by head."""
    parts = [figures.whole, *figures.groups]
    columns = [
        Column(figures.group_column or "", "text"), Column("documents"), Column("with scores"), Column("null"),
        Column("NaN"), Column("infinite"), Column("tokens"), Column("tokens each"), Column("truncated"),
        Column("share"),
    ]  # fmt: skip
    table = Table(
        "Documents. One is with scores if those of all heads are finite; the others take no part in a decision, and "
        "each is counted once: as null, or else as NaN, or else as infinite. Tokens, and documents that were longer "
        "than the encoder reads, are of those with scores.",
        columns,
        [[_contents_row(figures, part) for part in parts]],
    )
    heads = Table(
        "Scores, of each head by itself.",
        [Column("head", "text"), *map(Column, ("finite", "null", "NaN", "infinite", "least", "median", "greatest"))],
        [[[one.head, count(one.finite), count(one.null), count(one.nan), count(one.infinite), score(one.least),
           score(one.median), score(one.greatest)] for one in figures.heads]],
    )  # fmt: skip
    return Section("contents", "What there is", [*_note_on_others(figures), table.to_html(), heads.to_html()])


def _contents_row(figures: Figures, part: Part) -> Sequence[Content]:
    each = None if part.tokens is None or not part.scored else part.tokens / part.scored
    cut = None if part.truncated is None or not part.scored else part.truncated / part.scored
    return [
        scope_name(part.scope, figures.group_column), count(part.documents), count(part.scored), count(part.null),
        count(part.nan), count(part.infinite), count(part.tokens),
        NO_VALUE if each is None else f"{each:,.0f}", count(part.truncated),
        NO_VALUE if cut is None else percent(cut),
    ]  # fmt: skip


def _note_on_others(figures: Figures) -> list[Html]:
    if not any(part.scope.kind == "others" for part in figures.groups):
        return []
    return [paragraph(f"Of the groups the {MOST_LISTED} with the most documents are listed; the others are summed.")]


def kept_section(figures: Figures) -> Section:
    """Documents and tokens that each rule keeps at each quantile."""
    rules = "; ".join(f"{rule}: {RULES[rule]}" for rule in figures.rules)
    notes = [
        paragraph(
            f"At a quantile of 0.6 each head's threshold is the score that 60 % of the {figures.weight} of a group are "
            "below. A document is kept if its score is at or above the threshold"
            + (f", by one of these rules: {rules}." if len(figures.rules) > 1 else ".")
        ),
        *_note_on_pooled(figures),
    ]
    columns = [Column(figures.group_column or "", "text"), Column("quantile")]
    for _ in figures.rules:
        columns += [Column("documents"), Column("share"), Column("tokens"), Column("share")]
    table = Table(
        "Documents and tokens kept, and their shares of those with scores.",
        columns,
        [_kept_block(figures, part) for part in (figures.whole, *figures.groups)],
        2,
        [("", 2), *((f"kept by {rule}" if len(figures.rules) > 1 else "kept", 4) for rule in figures.rules)],
    )
    return Section("kept", "What is kept", [*notes, table.to_html()])


def _kept_block(figures: Figures, part: Part) -> list[list[Content]]:
    by_cut = {(one.rule, one.quantile): one for one in part.kept}
    block: list[list[Content]] = []
    for quantile in figures.quantiles:
        name = None if block else scope_name(part.scope, figures.group_column)
        cells = [cell for rule in figures.rules for cell in _kept_cells(by_cut[rule, quantile])]
        block.append([name, text(f"{quantile:g}"), *cells])
    return block


def _kept_cells(kept: Kept) -> list[Html]:
    return [count(kept.documents), share(kept.document_share), count(kept.tokens), share(kept.token_share)]


def thresholds_section(figures: Figures) -> Section:
    """The thresholds themselves."""
    rows = []
    for part in (figures.whole, *figures.groups):
        if not part.thresholds or part.is_pooled:
            continue
        name = scope_name(part.scope, figures.group_column)
        block: list[list[Content]] = []
        for judged, thresholds in zip(figures.judged, part.thresholds, strict=True):
            block.append([None if block else name, judged, *map(score, thresholds)])
        rows.append(block)
    table = Table(
        f"Thresholds by quantile, counted in {figures.weight}. jql-cut writes them in full, with their uncertainty.",
        [
            Column(figures.group_column or "", "text"),
            Column("head", "text"),
            *(Column(f"{q:g}") for q in figures.quantiles),
        ],
        rows,
        2,
    )
    return Section("thresholds", "Thresholds", [*_note_on_pooled(figures), table.to_html()])


def _note_on_pooled(figures: Figures) -> list[Html]:
    if not figures.pooled_groups:
        return []
    return [
        paragraph(
            f"{figures.pooled_groups:,} of {figures.whole.scope.n_groups:,} groups have fewer than "
            f"{figures.min_group:,} documents with scores, and take the thresholds of all documents together."
        )
    ]
