"""Sections of a report about the job: how fast it was, and what the scores were computed with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jql_engine.certificate import REFERENCE_BF16
from jql_engine.decision.report.figures import Figures, Speed
from jql_engine.decision.report.page import (
    NO_VALUE,
    Column,
    Content,
    Section,
    Table,
    count,
    element,
    number,
    paragraph,
    share,
    side_by_side,
    text,
)
from jql_engine.decision.report.plots import SERIES, Plots

KNOWN = ("bundle", "variant", "precision", "heads", "encoder", "tokenizer")  # settings that come first


def speed_section(speed: Speed, plots: Plots) -> Section:
    """Documents and tokens a second, and which stage worked, over time."""
    damaged = f" {speed.damaged_lines:,} lines were cut off, and are left out." if speed.damaged_lines else ""
    note = paragraph(
        f"From {speed.began} to {speed.ended}; chunks: {speed.chunks:,}; failures: {speed.failures:,}; at most "
        f"{speed.memory_bytes / (1 << 20):,.0f} MiB in a process. A chunk counts when it is finished; where nothing "
        f"was, no job was under way, or none got through a chunk.{damaged}"
    )
    times = [*(one.start for one in speed.moments), speed.minutes]
    rates = [
        ("documents/s", [one.documents_per_second for one in speed.moments]),
        ("tokens/s", [one.tokens_per_second for one in speed.moments]),
    ]
    stages = list(dict.fromkeys(name for one in speed.moments for name in one.busy))[: len(SERIES)]
    shares = [(name, [100 * one.busy.get(name, 0.0) for one in speed.moments]) for name in stages]
    drawn = [
        (plots.lines("Documents and tokens per second over time; the table has the figures", times, rates), "Speed"),
        (plots.stacked("Busy time of each stage over time; the table has the bottleneck", times, shares),
         "Where the time went: the busiest stage is the bottleneck"),
    ]  # fmt: skip
    table = Table(
        f"Over time. The bottleneck of the whole is {speed.bottleneck or NO_VALUE}.",
        [Column("minute"), Column("documents/s"), Column("tokens/s"), Column("bottleneck", "text"),
         Column("its share")],
        [[[number(one.start, f"{one.start:,.3g}"), number(one.documents_per_second, f"{one.documents_per_second:,.1f}"),
           number(one.tokens_per_second, f"{one.tokens_per_second:,.0f}"), one.bottleneck or NO_VALUE,
           share(None if one.bottleneck is None else one.busy[one.bottleneck])] for one in speed.moments]],
    )  # fmt: skip
    return Section("speed", "Speed", [note, side_by_side(drawn), table.to_html()])


def provenance_section(figures: Figures) -> Section:
    """What the scores are, and of what."""
    found = figures.provenance
    rows: list[tuple[str, Content]] = [
        ("scores", ", ".join(found.inputs)),
        ("files", count(found.files)),
        ("input files without scores", ", ".join(found.without_scores) or "none"),
        ("corpus", ", ".join(found.corpus) or "not given"),
        ("groups", figures.group_column or "none"),
        ("quantiles counted in", figures.weight),
        ("smallest group with thresholds of its own", count(figures.min_group)),
    ]
    settings = dict(found.settings)
    names = [*(name for name in KNOWN if name in settings), *sorted(settings.keys() - set(KNOWN))]
    rows += [(name.replace("_", " "), _shown(settings[name])) for name in names]
    table = Table(
        "As the score files' metadata say." if settings else "jql-run did not write these files: they say nothing.",
        [Column("what", "text"), Column("value", "text")],
        [[list(row) for row in rows]],
    )
    return Section(
        "provenance", "Where the scores come from", [table.to_html(), *_certificate(found.certificate, settings)]
    )


def _shown(value: Any) -> Content:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return NO_VALUE if value is None else value if isinstance(value, str) else json.dumps(value)


def _certificate(certificate: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> Sequence[Any]:
    """What the variant decides otherwise than PyTorch in fp32, where a bundle was given that says so."""
    if certificate is None:
        return []
    windows = certificate["windows"]
    is_same = settings.get("windows", windows["take"]) == windows["take"] and settings.get("aggregate") in (
        None,
        windows["aggregate"],
    )
    used = settings.get("variant") if is_same else None
    compared = {REFERENCE_BF16: certificate["reference_bf16"], **certificate["variants"]}
    blocks: list[list[list[Content]]] = []
    for name, found in compared.items():
        title = f"{name} (computed these scores)" if name == used else name
        block: list[list[Content]] = []
        for flip in found["flips"]:
            block.append([None if block else title, flip["what"], share(flip["share"]), share(flip["upper"])])
        blocks.append(block)
    table = Table(
        f"The bundle's certificate: of {certificate['documents']:,} documents, those that are kept at "
        f"{certificate['cut']} by PyTorch in fp32 and not by the variant, or the other way round; with 95 % confidence "
        "at most the last column.",
        [Column("computed by", "text"), Column("head or rule", "text"), Column("change sides"), Column("at most")],
        blocks,
        2,
    )
    return [element("h3", [text("Certificate")]), table.to_html()]
