"""jql-compare: from two sets of score files to figures, a page, and what is said aloud about them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from jql_engine.certificate import CUT
from jql_engine.decision.comparison import Comparison, compare, flips_at
from jql_engine.decision.pairing import read_pair
from jql_engine.decision.report.plots import check_matplotlib
from jql_engine.decision.result import MIN_GROUP
from jql_engine.decision.written import write_json, write_text
from jql_engine.files.location import locate
from jql_engine.printing import say


def compare_files(
    first: str,
    second: str,
    columns: Sequence[str] = (),
    group_column: str | None = None,
    min_group: int = MIN_GROUP,
    *,
    json_file: str | None = None,
    html: str | None = None,
) -> dict[str, Any]:
    """Compare two sets of scores, write what is asked for, and return the summary; raises EngineError."""
    began = time.monotonic()
    if html is not None:
        check_matplotlib()  # before minutes of reading
    found = compare(read_pair([first], [second], columns, group_column), min_group)
    if lone := found.only_first + found.only_second:
        say(f"jql-compare: {lone:,} documents have scores in one set alone, and are left out")
    groups = [one for one in found.slices if one.has_group and one.tokens is None]
    if n_pooled := sum(one.is_pooled for one in groups):
        say(
            f"jql-compare: {n_pooled:,} of {len(groups):,} groups have fewer than {min_group:,} documents with scores, "
            "and are cut at the thresholds of all groups; see --min-group"
        )
    if json_file is not None:
        write_json(locate(json_file), found.to_json())
    if html is not None:
        from jql_engine.decision.report.comparison import comparison_page

        write_text(locate(html), comparison_page(found, first, second))
    return _summary(found) | {"seconds": round(time.monotonic() - began, 3)}


def _summary(found: Comparison) -> dict[str, Any]:
    flips = flips_at(found.whole, CUT, ("all", "any", "mean"))
    return {
        "documents": found.documents,
        "compared": found.compared,
        "max_difference": {one.head: one.greatest for one in found.whole.differences},
        "spearman": {one.head: one.spearman for one in found.whole.differences},
        f"flips_at_{CUT}": {one.what: [one.share, *one.interval] for one in flips if not one.is_rule},
        f"flips_by_rule_at_{CUT}": {one.what: [one.share, *one.interval] for one in flips if one.is_rule},
    }
