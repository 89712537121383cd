"""jql-report: from score files to figures, a page, and what is said aloud about them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jql_engine.bundle import Bundle
from jql_engine.certificate import CERTIFICATE, HOW, read_certificate
from jql_engine.decision.opening import open_scores, remind_of_groups
from jql_engine.decision.ranks import Weight
from jql_engine.decision.report.decisions import contents_section, kept_section, thresholds_section
from jql_engine.decision.report.examples import Corpus
from jql_engine.decision.report.figures import QUANTILES, Figures, Provenance
from jql_engine.decision.report.history import provenance_section, speed_section
from jql_engine.decision.report.looks import agreement_section, examples_section, histogram_section, lengths_section
from jql_engine.decision.report.measure import measure
from jql_engine.decision.report.metrics import read_speed
from jql_engine.decision.report.page import page, paragraph
from jql_engine.decision.report.plots import Plots, check_matplotlib
from jql_engine.decision.result import MIN_GROUP
from jql_engine.decision.scores import ScoreFiles
from jql_engine.decision.written import write_json, write_text
from jql_engine.errors import BundleError
from jql_engine.files.location import locate
from jql_engine.printing import redact, say


@dataclass(frozen=True, slots=True)
class Sources:
    """What a report is made of."""

    inputs: tuple[str, ...]
    columns: tuple[str, ...] = ()  # score columns; without any those that jql-run wrote
    group_column: str | None = None
    corpus: tuple[str, ...] = ()
    text_column: str = "text"
    assume_unchanged: bool = False
    metrics: Path | None = None
    bundle: Path | None = None


def report(
    sources: Sources,
    weight: Weight = "documents",
    min_group: int = MIN_GROUP,
    *,
    html: str | None = None,
    json_file: str | None = None,
) -> dict[str, Any]:
    """Write what is asked for, and return the summary; raises EngineError."""
    began = time.monotonic()
    if html is not None:
        check_matplotlib()  # before minutes of reading
    figures = take_figures(sources, weight, min_group)
    if json_file is not None:
        write_json(locate(json_file), figures.to_json())
    if html is not None:
        write_text(locate(html), report_page(figures))
    whole = figures.whole
    if figures.pooled_groups:
        say(
            f"jql-report: {figures.pooled_groups:,} of {whole.scope.n_groups:,} groups have fewer than {min_group:,} "
            "documents with scores, and take the thresholds of all groups; see --min-group"
        )
    return {
        "documents": whole.documents,
        "scored": whole.scored,
        "tokens": whole.tokens,
        "truncated": whole.truncated,
        "groups": len(figures.groups) and whole.scope.n_groups,
        "files": figures.provenance.files,
        "files_without_scores": len(figures.provenance.without_scores),
        "kept_at_0.6": {one.rule: one.document_share for one in whole.kept if one.quantile == 0.6},
        "html": html,
        "json": json_file,
        "seconds": round(time.monotonic() - began, 3),
    }


def take_figures(sources: Sources, weight: Weight = "documents", min_group: int = MIN_GROUP) -> Figures:
    """All figures; raises EngineError."""
    files = open_scores(sources.inputs, sources.columns, sources.group_column)
    remind_of_groups(files)
    certificate = None if sources.bundle is None else _certificate(sources.bundle, files)
    speed = None if sources.metrics is None else read_speed(sources.metrics)
    corpus = None
    if sources.corpus:
        corpus = Corpus.find(sources.corpus, sources.text_column, sources.assume_unchanged)
    found = measure(files, corpus, weight, min_group)
    provenance = Provenance(
        inputs=tuple(map(redact, sources.inputs)),
        files=len(files.files),
        settings=dict(files.settings),
        without_scores=tuple(one.file for one in files.without_scores),
        corpus=tuple(map(redact, sources.corpus)),
        certificate=certificate,
    )
    return Figures(
        weight=weight,
        min_group=min_group,
        group_column=files.group_column,
        rules=found.rules,
        quantiles=QUANTILES,
        judged=found.judged,
        whole=found.whole,
        groups=found.groups,
        pooled_groups=found.n_pooled,
        heads=found.heads,
        agreement=found.agreement,
        lengths=found.lengths,
        speed=speed,
        provenance=provenance,
    )


def report_page(figures: Figures) -> str:
    """The page that shows them."""
    plots = Plots()
    sections = [contents_section(figures), histogram_section(figures, plots), kept_section(figures)]
    sections.append(thresholds_section(figures))
    if figures.agreement.pairs:
        sections.append(agreement_section(figures, plots))
    if figures.lengths:
        sections.append(lengths_section(figures, plots))
    sections.append(examples_section(figures))
    if figures.speed is not None:
        sections.append(speed_section(figures.speed, plots))
    sections.append(provenance_section(figures))
    return page("Scores of a corpus", [paragraph(_lead(figures))], sections)


def _lead(figures: Figures) -> str:
    whole, heads = figures.whole, [head.head for head in figures.heads]
    groups = f" in {whole.scope.n_groups:,} groups by {figures.group_column}" if figures.group_column else ""
    tokens = "" if whole.tokens is None else f", {whole.tokens:,} tokens"
    n_left = len(figures.provenance.without_scores)
    left = f" Input files without scores, which have no part here: {n_left:,}." if n_left else ""
    return (
        f"{whole.documents:,} documents{groups}, {whole.scored:,} of them with scores{tokens}; "
        f"{'heads' if len(heads) > 1 else 'head'} {', '.join(heads)}.{left}"
    )


def _certificate(path: Path, files: ScoreFiles) -> Mapping[str, Any] | None:
    """That of the bundle which the scores were computed with, without its comparisons; None where it has none."""
    bundle = Bundle.open(path)
    if (found := files.settings.get("bundle")) != bundle.hash:
        raise BundleError(
            f"the scores were computed with bundle {str(found)[:12]}, and {path} is {bundle.hash[:12]}; give the one "
            "that they were computed with"
        )
    if not (path / CERTIFICATE).exists():
        say(f"jql-report: {path} has no {CERTIFICATE}, so none is shown; {HOW}")
        return None
    read_certificate(bundle)  # checks it
    certificate = json.loads((path / CERTIFICATE).read_text(encoding="utf-8"))
    compared = [certificate["reference_bf16"], *certificate["variants"].values()]
    for one in compared:
        one.pop("comparison", None)  # certificate.html shows it
    return dict(certificate)
