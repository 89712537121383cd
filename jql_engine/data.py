"""The nouns that travel between stages: frozen, checked once, at construction.

`rows` travels with the data, so sorting by length stays invisible from outside. Rows number the documents of
one chunk from 0; a document without a score (null text) has no row in a TokenBatch.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jql_engine.errors import InputError

Embeddings: TypeAlias = NDArray[np.float32] | NDArray[np.float16]
EMBEDDING = "embedding"  # the column of stored vectors
Layout = Literal["exact", "padded", "packed"]
"""How a graph takes a batch: [B, L] of one exact length, [B, L] padded with a mask, or [T] without padding."""


@dataclass(frozen=True, slots=True)
class DocumentBatch:
    """The texts of one chunk."""

    rows: NDArray[np.int64]  # [N]
    texts: pa.LargeStringArray  # [N], null where there is no text to score

    def __post_init__(self) -> None:
        assert self.rows.dtype == np.int64 and self.rows.shape == (len(self.texts),)
        assert self.texts.type == pa.large_string(), self.texts.type

    @classmethod
    def of(cls, texts: pa.LargeStringArray, first: int = 0) -> DocumentBatch:
        """Number `texts` from `first`."""
        return cls(np.arange(first, first + len(texts), dtype=np.int64), texts)


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

    @classmethod
    def concat(cls, parts: Sequence[TokenBatch]) -> TokenBatch:
        """Join batches in their order."""
        if len(parts) == 1:
            return parts[0]
        lengths = np.concatenate([np.empty(0, np.int64), *(part.lengths for part in parts)])
        return cls(
            np.concatenate([np.empty(0, np.int64), *(part.rows for part in parts)]),
            np.concatenate([np.empty(0, np.int32), *(part.ids for part in parts)]),
            np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
            np.concatenate([np.empty(0, np.bool_), *(part.truncated for part in parts)]),
        )

    def take(self, documents: NDArray[np.int64]) -> TokenBatch:
        """The documents at places `documents`, in that order; each as often as it is named."""
        if np.array_equal(documents, np.arange(len(self.rows))):
            return self
        lengths = self.lengths[documents]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        places = np.repeat(self.offsets[documents] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return TokenBatch(self.rows[documents], self.ids[places], offsets, self.truncated[documents])

    def distinct(self) -> tuple[TokenBatch, NDArray[np.int64]]:
        """Documents of different ids, rows counted from 0, and the row [N] among them of each document here.

        They are in the order in which they come first; truncated where any of the equal ones is.
        """
        width = self.ids.itemsize
        buffers = [None, pa.py_buffer(self.offsets * width), pa.py_buffer(np.ascontiguousarray(self.ids))]
        found = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(self.rows), buffers).dictionary_encode()
        index = found.indices.to_numpy().astype(np.int64)
        n_docs = len(found.dictionary)
        if n_docs == len(self.rows):
            return TokenBatch(np.arange(n_docs), self.ids, self.offsets, self.truncated), index
        _, offsets, ids = found.dictionary.buffers()
        ends = np.frombuffer(offsets, np.int64, n_docs + 1) // width
        truncated = np.zeros(n_docs, np.bool_)
        truncated[index[self.truncated]] = True
        return TokenBatch(np.arange(n_docs), np.frombuffer(ids, np.int32, int(ends[-1])), ends, truncated), index

    def slice(self, document: int) -> TokenBatch:
        """Document number `document` alone."""
        start, stop = self.offsets[document], self.offsets[document + 1]
        here = slice(document, document + 1)
        return TokenBatch(self.rows[here], self.ids[start:stop], np.array([0, stop - start]), self.truncated[here])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, int64 [N]."""
        return np.diff(self.offsets)


@dataclass(frozen=True, slots=True)
class Budget:
    """What one batch of a session may hold.

    `tokens` counts padding; a document that is longer alone forms a batch of its own. With `buckets` every row of a
    padded batch is as long as the smallest of them that holds it.
    """

    tokens: int
    layout: Layout
    buckets: tuple[int, ...] = ()  # row lengths, ascending; empty: any

    def __post_init__(self) -> None:
        assert self.tokens > 0
        assert not self.buckets or (self.layout == "padded" and self.buckets[0] > 0), self
        assert all(shorter < longer for shorter, longer in pairwise(self.buckets)), self.buckets

    def row_length(self, n_tokens: int) -> int:
        """The length to which a document of `n_tokens` is padded; InputError where it is longer than every bucket."""
        if not self.buckets:
            return n_tokens
        place = bisect_left(self.buckets, n_tokens)
        if place == len(self.buckets):
            raise InputError(
                f"a document has {n_tokens} tokens, the longest that this session was opened for has "
                f"{self.buckets[-1]}; cut it to that many, or export the bundle with a larger --max-tokens"
            )
        return self.buckets[place]

    def max_docs(self, row_length: int) -> int:
        """The most documents of `row_length` tokens, padding included, that fit a batch."""
        return max(1, self.tokens // max(1, row_length))


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

    def part(self, start: int, stop: int, row_length: int | None) -> Batch:
        """Documents [start, stop) of this batch in rows of `row_length`."""
        offsets = self.offsets[start : stop + 1]
        ids = self.ids[offsets[0] : offsets[-1]]
        return Batch(self.rows[start:stop], ids, offsets - offsets[0], row_length)

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
    embeddings: Embeddings | None  # [n, D] where they are kept
    n_tokens: NDArray[np.int32]  # [n]
    truncated: NDArray[np.bool_]  # [n]
    n_windows: NDArray[np.int32] | None = None  # [n] where documents may have several

    def __post_init__(self) -> None:
        assert np.all(np.diff(self.rows) > 0), "rows must ascend"
        assert self.values.ndim == 2 and self.values.dtype == np.float32
        assert len(self.values) == len(self.n_tokens) == len(self.truncated) == len(self.rows)

    @classmethod
    def empty(cls, tokens: TokenBatch, n_heads: int, keep: tuple[int, np.dtype[Any]] | None = None) -> ScoreBatch:
        """Room for `n_heads` scores of every document of `tokens`, NaN until put.

        `keep`: width and type of the embeddings, where they are kept as well.
        """
        n_docs = len(tokens.rows)
        values = np.full((n_docs, n_heads), np.nan, np.float32)
        embeddings = None if keep is None else np.full((n_docs, keep[0]), np.nan, keep[1])
        return cls(tokens.rows, values, embeddings, tokens.lengths.astype(np.int32), tokens.truncated)

    @classmethod
    def concat(cls, parts: Sequence[ScoreBatch]) -> ScoreBatch:
        """Join batches in their order, rows counted from 0."""
        kept: list[Any] = [part.embeddings for part in parts if part.embeddings is not None]
        windows: list[Any] = [part.n_windows for part in parts if part.n_windows is not None]
        return cls(
            np.arange(sum(len(part.rows) for part in parts)),
            np.concatenate([part.values for part in parts]),
            np.concatenate(kept) if kept else None,
            np.concatenate([part.n_tokens for part in parts]),
            np.concatenate([part.truncated for part in parts]),
            np.concatenate(windows) if windows else None,
        )

    def put(self, rows: NDArray[np.int64], output: BatchOutput) -> None:
        """Store the `output` of the documents `rows` [B]."""
        index = np.searchsorted(self.rows, rows)
        self.values[index] = output.scores
        if self.embeddings is not None:
            self.embeddings[index] = output.embeddings


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of a list of texts, in its order."""

    heads: tuple[str, ...]
    values: NDArray[np.float32]  # [n, H]; NaN where the text is null
    n_tokens: NDArray[np.int32]  # [n]; after truncation, special tokens included; 0 where the text is null
    truncated: NDArray[np.bool_]  # [n]
    valid: NDArray[np.bool_]  # [n]; False where the text is null
    embeddings: Embeddings | None = None  # [n, D] where they are kept
    n_windows: NDArray[np.int32] | None = None  # [n] where documents may have several; 0 where the text is null

    def __post_init__(self) -> None:
        assert self.values.shape == (len(self.valid), len(self.heads))

    def __len__(self) -> int:
        return len(self.valid)

    @classmethod
    def spread(cls, batch: ScoreBatch, heads: Sequence[str], n_docs: int) -> Scores:
        """The scores of all `n_docs` documents of a chunk, rows that `batch` lacks marked as not valid."""
        index, truncated = np.full(n_docs, -1, np.int64), np.zeros(n_docs, np.bool_)
        index[batch.rows], truncated[batch.rows] = np.arange(len(batch.rows)), batch.truncated
        return cls.of_documents(batch, heads, index, truncated)

    @classmethod
    def of_documents(
        cls, batch: ScoreBatch, heads: Sequence[str], index: NDArray[np.int64], truncated: NDArray[np.bool_]
    ) -> Scores:
        """For each of n rows the scores of document `index` [n] of `batch`, -1 for none; `truncated` [n] as it is."""
        valid = index >= 0
        values = np.full((len(index), len(heads)), np.nan, np.float32)
        n_tokens = np.zeros(len(index), np.int32)
        values[valid], n_tokens[valid] = batch.values[index[valid]], batch.n_tokens[index[valid]]
        embeddings = None
        if batch.embeddings is not None:
            embeddings = np.zeros((len(index), batch.embeddings.shape[1]), batch.embeddings.dtype)
            embeddings[valid] = batch.embeddings[index[valid]]
        n_windows = None
        if batch.n_windows is not None:
            n_windows = np.zeros(len(index), np.int32)
            n_windows[valid] = batch.n_windows[index[valid]]
        return cls(tuple(heads), values, n_tokens, truncated, valid, embeddings, n_windows)

    def to_table(self) -> pa.Table:
        """The columns of `score_schema`; null where the text is null."""
        null = ~self.valid
        columns = [pa.array(np.ascontiguousarray(self.values[:, i]), mask=null) for i in range(len(self.heads))]
        columns += [pa.array(self.n_tokens, mask=null), pa.array(self.truncated, mask=null)]
        if self.n_windows is not None:
            columns.append(pa.array(self.n_windows, mask=null))
        kind = None
        if self.embeddings is not None:
            kind = embedding_type(self.embeddings.shape[1], self.embeddings.dtype)
            flat = pa.array(self.embeddings.reshape(-1))
            columns.append(pa.FixedSizeListArray.from_arrays(flat, type=kind, mask=pa.array(null)))
        return pa.table(columns, schema=score_schema(self.heads, kind, self.n_windows is not None))


def score_column(head: str) -> str:
    """The output column of a head."""
    return f"score_{head}"


def embedding_type(width: int, dtype: np.dtype[Any]) -> pa.DataType:
    """The type of the column `embedding`."""
    return pa.list_(pa.float16() if dtype == np.float16 else pa.float32(), width)


def score_schema(heads: Sequence[str], embedding: pa.DataType | None = None, windows: bool = False) -> pa.Schema:
    """The columns that scoring adds, in order.

    `score_<head>`, `n_tokens`, `truncated`; `n_windows` where documents may have several; `embedding` if kept.
    """
    fields = [pa.field(score_column(head), pa.float32()) for head in heads]
    fields += [pa.field("n_tokens", pa.int32()), pa.field("truncated", pa.bool_())]
    fields += [pa.field("n_windows", pa.int32())] if windows else []
    return pa.schema(fields if embedding is None else [*fields, pa.field(EMBEDDING, embedding)])
