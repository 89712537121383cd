"""Which documents a rule keeps by its thresholds: row by row, all heads jointly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jql_engine.decision.result import Decision
from jql_engine.decision.rules import Rule, join, judged_scores
from jql_engine.decision.scores import Rows, ScoreFiles
from jql_engine.errors import InputError


@dataclass(frozen=True, slots=True)
class Cut:
    """A rule and its thresholds, for rows of the files whose groups they are numbered by."""

    rule: Rule
    thresholds: NDArray[np.float32]  # [G, J]

    @classmethod
    def of(cls, decision: Decision, files: ScoreFiles) -> Cut:
        """The decision about `files`, whose groups have been read; raises InputError for a group it does not know."""
        known = {one.group: [head.threshold for head in one.thresholds] for one in decision.groups}
        if missing := [name for name in files.groups.names if name not in known]:
            raise InputError(
                f"the thresholds know no group {missing[0]!r}: they are of other scores; compute them from these"
            )
        return cls(decision.request.rule, np.array([known[name] for name in files.groups.names], np.float32))

    def kept(self, rows: Rows) -> NDArray[np.bool_]:
        """Which of `rows` are kept, bool [n]."""
        kept = rows.is_scored
        chosen = np.flatnonzero(kept)
        scores = judged_scores(self.rule, rows.scores[:, chosen])
        kept[chosen] = join(self.rule, scores >= self.thresholds[rows.groups[chosen]].T)
        return kept


def count_kept(files: ScoreFiles, cut: Cut, n_groups: int) -> NDArray[np.int64]:
    """Documents and tokens kept of each group, int64 [2, G]; one pass over the data."""
    counts = np.zeros((2, n_groups), np.int64)
    for rows in files.read():
        kept = cut.kept(rows)
        np.add.at(counts[0], rows.groups[kept], 1)
        np.add.at(counts[1], rows.groups[kept], rows.n_tokens[kept])
    return counts
