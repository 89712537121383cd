"""Pages about two sets of scores of the same documents: of jql-compare, and of a bundle's certificate.

Both show a comparison as its JSON has it: a certificate is read from a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jql_engine.certificate import CUT, REFERENCE_BF16
from jql_engine.decision.comparison import Comparison
from jql_engine.decision.report.figures import MOST_LISTED, MOST_PLOTTED
from jql_engine.decision.report.page import (
    Column,
    Content,
    Html,
    Section,
    Table,
    count,
    element,
    number,
    page,
    paragraph,
    percent,
    score,
    share,
    side_by_side,
)
from jql_engine.decision.report.plots import Plots
from jql_engine.printing import redact

ABOUT_FLIPS = (
    "A document changes sides at a quantile if it is kept at it by one set of scores and not by the other, each by its "
    "own thresholds. In brackets the interval in which the share of documents like these lies with 95 % confidence."
)
Described = Mapping[str, Any]  # of JSON: a comparison, or a slice of one


def comparison_page(found: Comparison, first: str, second: str) -> str:
    """The page of jql-compare about the scores in `first` and `second`."""
    comparison, plots = found.to_json(), Plots()
    lead = [
        paragraph(f"First: {redact(first)}"),
        paragraph(f"Second: {redact(second)}"),
        paragraph(
            count(found.compared), " of ", count(found.documents), " documents have scores in both sets; ",
            count(found.only_first), " in the first alone, ", count(found.only_second), " in the second alone. ",
            ABOUT_FLIPS,
        ),
    ]  # fmt: skip
    kinds = [
        ("all", "All documents", [comparison["slices"][0]]),
        ("groups", "By group", [one for one in comparison["slices"] if one["has_group"] and one["tokens"] is None]),
        ("lengths", "By length", [one for one in comparison["slices"] if not one["has_group"] and one["tokens"]]),
        ("both", "By group and length", [one for one in comparison["slices"] if one["has_group"] and one["tokens"]]),
    ]
    sections = [_section(*kind, comparison, plots) for kind in kinds if kind[2]]
    return page("Two sets of scores", lead, sections)


def certificate_page(certificate: Described) -> str:
    """The page of a bundle's certificate, by the content of certificate.json."""
    plots = Plots()
    compared = {REFERENCE_BF16: certificate["reference_bf16"], **certificate["variants"]}
    corpus, machine = certificate["corpus"], certificate["machine"]
    made_with = ", ".join(f"{name} {version}" for name, version in certificate["made_with"].items())
    lead = [
        paragraph("Bundle ", element("code", [certificate["bundle"]])),
        paragraph(
            count(certificate["documents"]), f" documents, a uniform sample of the {corpus['documents']:,} in "
            f"{redact(corpus['given'])}, were scored by PyTorch in fp32. These are the first set of scores; the second "
            "are those of each graph that ran on this machine, and, beside them, of PyTorch in bf16, which is what the "
            f"original pipeline computes. {machine['processor']}, {machine['cores']} cores; {made_with}.",
        ),
        paragraph(ABOUT_FLIPS),
    ]  # fmt: skip
    sections = [_overview(compared, certificate["cut"], plots)]
    for number_, (name, found) in enumerate(compared.items()):
        comparison = found["comparison"]
        slices = [comparison["slices"][0], *(one for one in comparison["slices"] if one["tokens"] is not None)]
        tables = [_differences(slices, comparison).to_html(), _flips(slices, comparison).to_html()]
        sections.append(Section(f"variant-{number_}", name, tables))
    return page("Certificate of a bundle", lead, sections)


def _overview(compared: Mapping[str, Described], cut: float, plots: Plots) -> Section:
    wholes = {name: found["comparison"]["slices"][0] for name, found in compared.items()}
    heads = [one["head"] for one in next(iter(wholes.values()))["differences"]]
    decisions = [one["what"] for one in _at(next(iter(wholes.values())), cut)]
    columns = [Column("computed by", "text"), *map(Column, decisions), *map(Column, heads), *map(Column, heads)]
    rows: list[list[Content]] = []
    for name, whole in wholes.items():
        flips: list[Content] = [_with_interval(one) for one in _at(whole, cut)]
        greatest: list[Content] = [score(one["greatest"]) for one in whole["differences"]]
        rows.append([name, *flips, *greatest, *(_correlation(one["spearman"]) for one in whole["differences"])])
    spans = [
        ("", 1),
        (f"change sides at {cut:g}", len(decisions)),
        ("greatest difference", len(heads)),
        ("Spearman's correlation", len(heads)),
    ]
    table = Table("Each graph beside PyTorch in fp32, all documents.", columns, [rows], 1, spans)
    points = [(f"{name}, {one['what']}", *_percents(one)) for name, whole in wholes.items() for one in _at(whole, cut)]
    label = f"Documents that change sides at {cut:g}, by graph and head or rule; the table has the figures"
    plot = plots.intervals(label, points, f"% of documents that change sides at {cut:g}")
    return Section("overview", "Overview", [table.to_html(), side_by_side([(plot, "Share, and its interval")])])


def _section(name: str, title: str, slices: Sequence[Described], comparison: Described, plots: Plots) -> Section:
    content: list[Html] = []
    shown = _largest(slices)
    if len(shown) < len(slices):
        content.append(paragraph(f"The {MOST_LISTED} groups with the most documents are listed."))
    if name != "both":
        points = [
            (one["what"] if name == "all" else _slice_name(part), *_percents(one))
            for part in shown[:MOST_PLOTTED]
            for one in _at(part, CUT)
            if name == "all" or one["what"] == "all" or len(comparison["heads"]) == 1
        ]
        rule = "" if name == "all" or len(comparison["heads"]) == 1 else ", by the rule all"
        axis = f"% of documents that change sides at {CUT}{rule}"
        plot = plots.intervals(f"Intervals, {axis}; the table has the figures", points, axis)
        content.append(side_by_side([(plot, "Share, and its interval")]))
    tables = (_flips(shown, comparison), _differences(shown, comparison))
    return Section(name, title, [*content, *(one.to_html() for one in tables)])


def _largest(slices: Sequence[Described]) -> Sequence[Described]:
    """Those of the groups with the most documents, in their order."""
    sizes: dict[Any, int] = {}
    for one in slices:
        sizes[one["group"]] = sizes.get(one["group"], 0) + one["documents"]
    kept = set(sorted(sizes, key=lambda group: -sizes[group])[:MOST_LISTED])
    return [one for one in slices if one["group"] in kept]


def _flips(slices: Sequence[Described], comparison: Described) -> Table:
    cuts = comparison["cuts"]
    columns = [Column("documents", "text"), Column("kept by", "text"), *(Column(f"at {cut:g}") for cut in cuts)]
    blocks: list[list[list[Content]]] = []
    for one in slices:
        by_cut = {(flip["what"], flip["is_rule"], flip["cut"]): flip for flip in one["flips"]}
        whats = dict.fromkeys((flip["what"], flip["is_rule"]) for flip in one["flips"])
        block: list[list[Content]] = []
        for what, is_rule in whats:
            cells = [_with_interval(by_cut[what, is_rule, cut]) for cut in cuts]
            block.append([None if block else _counted_name(one), f"rule {what}" if is_rule else what, *cells])
        blocks.append(block)
    return Table("Documents that change sides, by each head alone and by each rule.", columns, blocks, 2)


def _differences(slices: Sequence[Described], comparison: Described) -> Table:
    names = [f"{100 * q:g} % up to" for q in comparison["quantiles"]]
    columns = [Column("documents", "text"), Column("head", "text"), *map(Column, names), Column("greatest"),
               Column("Spearman")]  # fmt: skip
    blocks: list[list[list[Content]]] = []
    for one in slices:
        block: list[list[Content]] = []
        for found in one["differences"]:
            cells = [*map(score, found["quantiles"]), score(found["greatest"]), _correlation(found["spearman"])]
            block.append([None if block else _counted_name(one), found["head"], *cells])
        blocks.append(block)
    return Table("How far the scores are apart, and whether they put documents in the same order.", columns, blocks, 2)


def _at(slice_: Described, cut: float) -> list[Described]:
    """The flips at one cut."""
    return [one for one in slice_["flips"] if one["cut"] == cut]


def _with_interval(flip: Described) -> Html:
    low, high = flip["interval"]
    found = [share(flip["share"]), " (", number(low, percent(low)[:-2]), "–", number(high, percent(high)[:-2]), ")"]
    return element("span", [*found], {"title": f"{flip['documents']:,} documents"})


def _percents(flip: Described) -> tuple[float, float, float]:
    low, high = flip["interval"]
    return 100 * flip["share"], 100 * low, 100 * high


def _correlation(value: float | None) -> Html:
    return number(value, "" if value is None else f"{value:.5f}")


def _slice_name(slice_: Described) -> str:
    """A group, a band of lengths, or both, in words."""
    names = []
    if slice_["has_group"]:
        pooled = " (pooled)" if slice_["is_pooled"] else ""
        names.append(f"{'no group' if slice_['group'] is None else slice_['group']}{pooled}")
    if slice_["tokens"] is not None:
        least, most = slice_["tokens"]
        names.append(f"{least:,} tokens or more" if most is None else f"{least:,} to {most:,} tokens")
    return ", ".join(names) or "all"


def _counted_name(slice_: Described) -> Html:
    return element("span", [_slice_name(slice_), " ", element("small", ["(", count(slice_["documents"]), ")"])])
