"""jql-cut: from score files to thresholds.json, and what is said aloud about them."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from typing import Any
from uuid import uuid4

import pyarrow as pa

from jql_engine.decision.opening import open_scores
from jql_engine.decision.result import Decision, Request
from jql_engine.decision.threshold import decide
from jql_engine.files.location import Location, locate
from jql_engine.files.output import explained
from jql_engine.files.writing import write
from jql_engine.printing import say

NAMED = 5  # groups named in a message


@dataclass(frozen=True, slots=True)
class Sources:
    """Which score files to read, and how."""

    inputs: tuple[str, ...]
    columns: tuple[str, ...] = ()  # score columns; without any those that jql-run wrote
    group_column: str | None = None


def cut(sources: Sources, request: Request, target: str) -> dict[str, Any]:
    """Compute thresholds, write them to the file or URL `target`, and return the summary; raises EngineError."""
    began = time.monotonic()
    files = open_scores(sources.inputs, sources.columns, sources.group_column)
    decision = decide(files, request)
    write_thresholds(decision, locate(target))
    announce(decision)
    return {
        **asdict(decision.counts),
        "quantile": decision.quantile,
        "target": None if decision.target is None else asdict(decision.target),
        "groups": len(decision.groups),
        "pooled_groups": sum(one.is_pooled for one in decision.groups),
        "files": len(files.files),
        "thresholds": target,
        "seconds": round(time.monotonic() - began, 3),
    }


def write_thresholds(decision: Decision, target: Location) -> None:
    """Let the file `target` appear complete, in the place of one that is there; raises OutputError."""
    content = json.dumps(decision.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    aside = target.with_name(f".{target.name}.{os.getpid()}.{uuid4().hex}.writing")
    with explained(target):
        write(target, pa.py_buffer(content.encode("utf-8", "surrogatepass")), aside)


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
    if target is not None and target.excess:
        say(
            f"jql-cut: {target.excess:,} {target.unit} more are kept than the {target.asked:,} asked for: documents "
            "with equal scores are kept or dropped together"
        )
