"""jql-cut: from score files to thresholds.json and the kept rows, and what is said aloud about them."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from jql_engine.decision.copying import Joined, keep_rows
from jql_engine.decision.opening import open_scores, remind_of_groups
from jql_engine.decision.ranks import needed_weight
from jql_engine.decision.result import Decision, Request
from jql_engine.decision.scores import ScoreFiles
from jql_engine.decision.threshold import decide
from jql_engine.decision.written import write_json
from jql_engine.errors import InputError
from jql_engine.files.location import locate
from jql_engine.job.plan import Job
from jql_engine.job.progress import RunLog
from jql_engine.printing import say

NAMED = 5  # groups named in a message
NOTICED = 0.001  # of the weight of a group, by which more is kept than asked for
COPIED = ("documents", "files", "skipped_files", "seconds", "workers")  # of the summary of a job: what applies here


@dataclass(frozen=True, slots=True)
class Sources:
    """Which score files to read, and how."""

    inputs: tuple[str, ...]
    columns: tuple[str, ...] = ()  # score columns; without any those that jql-run wrote
    group_column: str | None = None


@dataclass(frozen=True, slots=True)
class Copies:
    """The kept rows to write."""

    job: Job  # its inputs are the corpus; none: the score files, which have all columns
    workers: int
    log: RunLog
    stop: threading.Event  # set: begin nothing more


def cut(sources: Sources, request: Request, target: str, copies: Copies | None = None) -> dict[str, Any]:
    """Compute thresholds, copy the kept rows where that is asked for, and return the summary; raises EngineError.

    The thresholds go to the file or URL `target`, once all rows are there that there can be: not where it was stopped.
    """
    began = time.monotonic()
    thresholds = locate(target)
    files = open_scores(sources.inputs, sources.columns, sources.group_column)
    remind_of_groups(files)
    job = None if copies is None else _with_corpus(copies.job, sources, files)  # before minutes of reading
    decision = decide(files, request)
    announce(decision)
    copied: dict[str, Any] = {}
    if copies is not None and job is not None:
        joined = Joined.of(decision, files)
        copied = keep_rows(job, joined, sources.inputs, thresholds, copies.workers, copies.log, copies.stop)
    if copies is None or not copies.stop.is_set():
        write_json(thresholds, decision.to_json())
    return {
        **asdict(decision.counts),
        "quantile": decision.quantile,
        "target": None if decision.target is None else asdict(decision.target),
        "groups": len(decision.groups),
        "pooled_groups": sum(one.is_pooled for one in decision.groups),
        "score_files": len(files.files),
        "files_without_scores": len(files.without_scores),
        "thresholds": target,
        **({"copied": {name: copied[name] for name in COPIED}, "unfinished": copied["unfinished"]} if copied else {}),
        "seconds": round(time.monotonic() - began, 3),
    }


def _with_corpus(job: Job, sources: Sources, files: ScoreFiles) -> Job:
    """The job with its corpus, which may be the score files themselves; raises InputError."""
    if job.inputs:
        return job
    if files.settings.get("output") != "append":
        raise InputError(
            f"{files.files[0].source.location} was not written by jql-run --output append, with all columns beside the "
            "scores; give --corpus, the files that were scored, whose kept rows are to be copied"
        )
    return replace(job, inputs=sources.inputs)


def announce(decision: Decision) -> None:
    """Say on stderr what a user may not expect of the thresholds."""
    counts, target = decision.counts, decision.target
    if dropped := counts.documents - counts.scored:
        say(
            f"jql-cut: {dropped:,} of {counts.documents:,} documents are dropped: a score is null ({counts.null:,}), "
            f"NaN ({counts.nan:,}) or infinite ({counts.infinite:,})"
        )
    if pooled := [one.group for one in decision.groups if one.is_pooled]:
        names = ", ".join(map(repr, pooled[:NAMED])) + (", ..." if len(pooled) > NAMED else "")
        say(
            f"jql-cut: {len(pooled):,} of {len(decision.groups):,} groups have fewer than "
            f"{decision.request.min_group:,} documents with scores, and take the thresholds of all groups: {names}"
        )
    if target is None:
        _announce_ties(decision)
    elif target.excess:
        say(
            f"jql-cut: {target.excess:,} {target.unit} more are kept than the {target.asked:,} asked for: every "
            "threshold is a document's score, those of all groups and heads move together, and equal scores are kept "
            "together"
        )


def _announce_ties(decision: Decision) -> None:
    """Say where a threshold alone keeps clearly more than its quantile asks for."""
    weight = decision.request.weight
    grouped = decision.group_column is not None
    apart = [(one, one.counts, f" in group {one.group!r}" if grouped else "") for one in decision.groups]
    parts = [part for part in apart if not part[0].is_pooled]
    if pooled := next((one for one in decision.groups if one.is_pooled), None):
        parts.append((pooled, decision.counts, " over all groups" if grouped else ""))
    excess: list[tuple[float, float, str, str]] = []  # and what it is reached by, of which head and where
    for group, counts, where in parts:
        total = counts.scored if weight == "documents" else counts.tokens or 0
        asked = (total - needed_weight(total, decision.quantile, weight) + 1) / total
        excess += [(one.share - asked, one.share, one.head, where) for one in group.thresholds]
    tied = [one for one in excess if one[0] > NOTICED]
    if tied:
        _, share, head, where = max(tied, key=lambda one: one[:2])
        whole = "equal scores are" if weight == "documents" else "equal scores, and all tokens of a document, are"
        say(
            f"jql-cut: {len(tied):,} of {len(excess):,} thresholds keep more than the {1 - decision.quantile:.1%} of "
            f"{weight} asked for, as {whole} kept together: that of {head}{where} keeps {share:.1%}"
        )
