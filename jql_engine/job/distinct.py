"""The texts of a chunk -> its distinct documents: equal texts, and texts of equal token ids, are scored once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jql_engine.data import DocumentBatch, TokenBatch
from jql_engine.files.dictionaries import join
from jql_engine.tokenizer import Tokenizer

TOGETHER_BYTES = 4 << 20  # text in one call of the tokenizer, so that its threads get enough to do
# Tokens of distinct documents after which they are handed on: 64 MiB. A chunk's bytes bound its tokens to fewer unless
# its encoding hides what it holds: 20,000 documents of 8,192 tokens, 655 MB of ids, were found in 2 MB of parquet.
SLICE_TOKENS = 1 << 24


@dataclass(frozen=True, slots=True)
class DistinctDocuments:
    """Documents of a chunk that differ, or a part of them."""

    tokens: TokenBatch  # rows count from 0
    n_rows: NDArray[np.int64]  # [N]; rows of the chunk that have this document


class ChunkDocuments:
    """Tokenizes the texts of one chunk as they come, and keeps of them the ids of distinct documents alone."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.index = np.empty(0, np.int64)  # the document of each row, through all slices; -1: none
        self.truncated = np.empty(0, np.bool_)
        self._tokenizer = tokenizer
        self._waiting: list[tuple[int, pa.DictionaryArray]] = []
        self._waiting_bytes = 0
        self._parts: list[TokenBatch] = []
        self._first_row = self._first_doc = self._n_docs = 0  # of the slice that is being filled

    def add(self, first: int, texts: pa.DictionaryArray) -> Iterator[DistinctDocuments]:
        """Take the texts of the rows from `first` on; yield the documents so far where they are many."""
        self._waiting.append((first, texts))
        self._waiting_bytes += texts.nbytes
        if self._waiting_bytes <= TOGETHER_BYTES:
            return
        self._tokenize()
        if self._n_tokens > SLICE_TOKENS:
            self._merge()
            if self._n_tokens > SLICE_TOKENS // 2:
                yield self._slice(first + len(texts))

    def finish(self, n_rows: int, dropped: Sequence[slice] = ()) -> DistinctDocuments:
        """The documents that are left of `n_rows` rows in all, less those of the rows `dropped`."""
        self._tokenize()
        self._grow(n_rows)
        for rows in dropped:
            self.index[rows], self.truncated[rows] = -1, False
        self._merge()
        return self._slice(len(self.index))

    @property
    def _n_tokens(self) -> int:
        return sum(len(part.ids) for part in self._parts)

    def _tokenize(self) -> None:
        """Tokenize the distinct texts among those that wait."""
        if not self._waiting:
            return
        texts = join([texts for _, texts in self._waiting])
        tokens = self._tokenizer.encode(DocumentBatch.of(texts.dictionary))
        documents = texts.indices.fill_null(-1).to_numpy().astype(np.int64)
        rows = np.concatenate([np.arange(first, first + len(texts)) for first, texts in self._waiting])
        self._grow(int(rows[-1]) + 1)
        rows, documents = rows[documents >= 0], documents[documents >= 0]
        self.index[rows] = self._first_doc + self._n_docs + documents
        self.truncated[rows] = tokens.truncated[documents]
        self._parts.append(tokens)
        self._n_docs += len(tokens.rows)
        self._waiting, self._waiting_bytes = [], 0

    def _grow(self, n_rows: int) -> None:
        missing = n_rows - len(self.index)
        self.index = np.concatenate([self.index, np.full(missing, -1, np.int64)])
        self.truncated = np.concatenate([self.truncated, np.zeros(missing, np.bool_)])

    def _merge(self) -> None:
        """Make one document of those that have the same ids, and none of those that no row has."""
        here = self.index[self._first_row :]
        used, place = np.unique(here[here >= 0] - self._first_doc, return_inverse=True)
        tokens, same = TokenBatch.concat(self._parts).take(used).distinct()
        here[here >= 0] = self._first_doc + same[place]
        self._parts, self._n_docs = [tokens], len(tokens.rows)

    def _slice(self, next_row: int) -> DistinctDocuments:
        here = self.index[self._first_row : next_row]
        n_rows = np.bincount(here[here >= 0] - self._first_doc, minlength=self._n_docs)
        [tokens] = self._parts
        self._first_row, self._first_doc = next_row, self._first_doc + self._n_docs
        self._parts, self._n_docs = [], 0
        return DistinctDocuments(tokens, n_rows)
