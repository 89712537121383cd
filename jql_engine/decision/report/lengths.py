"""How long documents are: counts in bands that double, and how many were cut off at the encoder's length."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jql_engine.decision.scores import Rows, ScoreFiles

TRUNCATED = "truncated"
N_BANDS = 32  # 0, 1, 2 to 3, 4 to 7, ...; n_tokens is an int32


class Lengths:
    """Documents with scores by the bits of their number of tokens."""

    def __init__(self) -> None:
        self.documents: NDArray[np.int64] = np.zeros(N_BANDS, np.int64)
        self.tokens: NDArray[np.int64] = np.zeros(N_BANDS, np.int64)
        self.truncated: NDArray[np.int64] = np.zeros(N_BANDS, np.int64)
        self.truncated_of_group: NDArray[np.int64] = np.zeros(0, np.int64)  # [G]

    def add(self, rows: Rows) -> None:
        """Count the rows that come next, which have the column `truncated` where the files have it."""
        is_scored = rows.is_scored
        n_tokens, groups = rows.n_tokens[is_scored], rows.groups[is_scored]
        bands = np.minimum(np.frexp(n_tokens.astype(np.float64))[1], N_BANDS - 1)
        np.add.at(self.documents, bands, 1)
        np.add.at(self.tokens, bands, n_tokens)
        if TRUNCATED in rows.columns.schema.names:
            is_cut = rows.columns.column(TRUNCATED).fill_null(False).to_numpy(zero_copy_only=False)[is_scored]
            np.add.at(self.truncated, bands[is_cut], 1)
            counts = np.bincount(groups[is_cut], minlength=len(self.truncated_of_group))
            counts[: len(self.truncated_of_group)] += self.truncated_of_group
            self.truncated_of_group = counts

    def of_groups(self, n_groups: int) -> NDArray[np.int64]:
        """Documents that were cut off, [n_groups]."""
        return np.pad(self.truncated_of_group, (0, n_groups - len(self.truncated_of_group)))


def has_truncated(files: ScoreFiles) -> bool:
    """Whether all files say which documents were cut off."""
    kinds = {file.schema.field(TRUNCATED).type for file in files.files if TRUNCATED in file.schema.names}
    return kinds == {pa.bool_()} and all(TRUNCATED in file.schema.names for file in files.files)


def limits(band: int) -> tuple[int, int]:
    """The least and the most tokens of a band."""
    return (0, 0) if band == 0 else (1 << (band - 1), (1 << band) - 1)
