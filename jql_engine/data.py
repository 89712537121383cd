"""The nouns that travel between stages: frozen, checked once, at construction.

`rows` travels with the data, so sorting by length stays invisible from outside. Rows number the documents of
one chunk from 0; a document without a score (null text) has no row in a TokenBatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Layout = Literal["exact", "padded", "packed"]
"""How a graph takes a batch: [B, L] of one exact length, [B, L] padded with a mask, or [T] without padding."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows [start, stop) of input file number `file`."""

    file: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        assert 0 <= self.start <= self.stop, self


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive rows of one large file, or several small files: the unit of work and of commit."""

    segments: tuple[Segment, ...]

    @property
    def n_docs(self) -> int:
        """Rows in all segments; row numbers run through the segments in order."""
        return sum(segment.stop - segment.start for segment in self.segments)


@dataclass(frozen=True, slots=True)
class DocumentBatch:
    """The texts of one chunk."""

    rows: NDArray[np.int64]  # [N]
    texts: pa.LargeStringArray  # [N], null where there is no text to score

    def __post_init__(self) -> None:
        assert self.rows.dtype == np.int64 and self.rows.shape == (len(self.texts),)
        assert self.texts.type == pa.large_string(), self.texts.type

    @classmethod
    def of(cls, texts: pa.LargeStringArray) -> DocumentBatch:
        """Number `texts` from 0."""
        return cls(np.arange(len(texts), dtype=np.int64), texts)


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Ragged token ids, special tokens included, never padded."""

    rows: NDArray[np.int64]  # [N]
    ids: NDArray[np.int32]  # [T]
    offsets: NDArray[np.int64]  # [N + 1]
    truncated: NDArray[np.bool_]  # [N]

    def __post_init__(self) -> None:
        assert self.ids.dtype == np.int32 and self.offsets.dtype == np.int64 and self.truncated.dtype == np.bool_
        assert self.offsets.shape == (len(self.rows) + 1,) and self.truncated.shape == self.rows.shape
        assert self.offsets[0] == 0 and self.offsets[-1] == len(self.ids), "offsets do not span the ids"

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, int64 [N]."""
        return np.diff(self.offsets)


@dataclass(frozen=True, slots=True)
class Budget:
    """What one batch of a session may hold.

    `tokens` counts padding; a document that is longer alone forms a batch of its own.
    """

    tokens: int
    layout: Layout

    def __post_init__(self) -> None:
        assert self.tokens > 0


@dataclass(frozen=True, slots=True)
class Batch:
    """The documents of one execution."""

    rows: NDArray[np.int64]  # [B]
    ids: NDArray[np.int32]  # [T]
    offsets: NDArray[np.int32]  # [B + 1]
    row_length: int | None  # L of a rectangular graph; None where the graph takes packed tokens

    def __post_init__(self) -> None:
        assert self.offsets.shape == (len(self.rows) + 1,) and self.offsets[-1] == len(self.ids)
        assert self.row_length is None or self.row_length >= int(np.diff(self.offsets).max(initial=0))

    @property
    def n_tokens(self) -> int:
        """Tokens without padding."""
        return len(self.ids)

    @property
    def n_padding(self) -> int:
        """Padding tokens that a rectangular graph computes besides."""
        return 0 if self.row_length is None else self.row_length * len(self.rows) - len(self.ids)

    def rectangle(self, pad_id: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids and mask (1 at tokens), both int64 [B, L]."""
        assert self.row_length is not None
        mask = np.arange(self.row_length) < np.diff(self.offsets)[:, None]
        if self.n_padding == 0:
            return self.ids.reshape(mask.shape).astype(np.int64), mask.astype(np.int64)
        ids = np.full(mask.shape, pad_id, np.int64)
        ids[mask] = self.ids
        return ids, mask.astype(np.int64)


@dataclass(frozen=True, slots=True)
class BatchOutput:
    """What a session computes for one batch, in the batch's order."""

    scores: NDArray[np.float32]  # [B, H]
    embeddings: NDArray[np.float32]  # [B, D]


@dataclass(frozen=True, slots=True)
class ScoreBatch:
    """Scores of the documents of one chunk that have any, ordered by row; filled batch by batch."""

    rows: NDArray[np.int64]  # [n], ascending
    values: NDArray[np.float32]  # [n, H]
    n_tokens: NDArray[np.int32]  # [n]
    truncated: NDArray[np.bool_]  # [n]

    def __post_init__(self) -> None:
        assert np.all(np.diff(self.rows) > 0), "rows must ascend"
        assert self.values.ndim == 2 and self.values.dtype == np.float32
        assert len(self.values) == len(self.n_tokens) == len(self.truncated) == len(self.rows)

    @classmethod
    def empty(cls, tokens: TokenBatch, n_heads: int) -> ScoreBatch:
        """Room for `n_heads` scores of every document of `tokens`; NaN until put."""
        values = np.full((len(tokens.rows), n_heads), np.nan, np.float32)
        return cls(tokens.rows, values, tokens.lengths.astype(np.int32), tokens.truncated)

    def put(self, rows: NDArray[np.int64], values: NDArray[np.float32]) -> None:
        """Store `values` [B, H] of the documents `rows` [B]."""
        self.values[np.searchsorted(self.rows, rows)] = values


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of a list of texts, in its order."""

    heads: tuple[str, ...]
    values: NDArray[np.float32]  # [n, H]; NaN where the text is null
    n_tokens: NDArray[np.int32]  # [n]; after truncation, special tokens included; 0 where the text is null
    truncated: NDArray[np.bool_]  # [n]
    valid: NDArray[np.bool_]  # [n]; False where the text is null

    def __post_init__(self) -> None:
        assert self.values.shape == (len(self.valid), len(self.heads))

    def __len__(self) -> int:
        return len(self.valid)

    @classmethod
    def spread(cls, batch: ScoreBatch, heads: Sequence[str], n_docs: int) -> Scores:
        """The scores of all `n_docs` documents of a chunk, rows that `batch` lacks marked as not valid."""
        values = np.full((n_docs, len(heads)), np.nan, np.float32)
        n_tokens, truncated, valid = np.zeros(n_docs, np.int32), np.zeros(n_docs, np.bool_), np.zeros(n_docs, np.bool_)
        values[batch.rows], n_tokens[batch.rows] = batch.values, batch.n_tokens
        truncated[batch.rows], valid[batch.rows] = batch.truncated, True
        return cls(tuple(heads), values, n_tokens, truncated, valid)

    def to_table(self) -> pa.Table:
        """Columns `score_<head>` float32, `n_tokens` int32 and `truncated` bool; null where the text is null."""
        null = ~self.valid
        columns = {
            score_column(head): pa.array(np.ascontiguousarray(self.values[:, i]), mask=null)
            for i, head in enumerate(self.heads)
        }
        columns["n_tokens"] = pa.array(self.n_tokens, mask=null)
        columns["truncated"] = pa.array(self.truncated, mask=null)
        return pa.table(columns, schema=score_schema(self.heads))


def score_column(head: str) -> str:
    """The output column of a head."""
    return f"score_{head}"


def score_schema(heads: Sequence[str]) -> pa.Schema:
    """The columns that scoring adds, in order."""
    fields = [pa.field(score_column(head), pa.float32()) for head in heads]
    return pa.schema([*fields, pa.field("n_tokens", pa.int32()), pa.field("truncated", pa.bool_())])
