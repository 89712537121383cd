"""Windows of long documents: cut from the ids, each with the special tokens around it; their scores become one.

    first        the first window alone
    first+last   the first, and the last where the document is longer than one
    all          one after another; the last one ends with the document and overlaps the one before it

Every window of a document that has several is full: the rest alone could be a few tokens, whose score says nothing of
the document and would be taken for it by `max`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from jql_engine.bundle import Bundle, TokenizerInfo, WindowsInfo
from jql_engine.data import ScoreBatch, TokenBatch
from jql_engine.tokenizer import enclosed


@dataclass(frozen=True, slots=True)
class WindowBatch:
    """The windows of documents; those of one document follow each other."""

    tokens: TokenBatch  # of windows, rows counted from 0
    document: NDArray[np.int64]  # [W]; the place of each window's document, ascending
    is_first: NDArray[np.bool_]  # [W]


@dataclass(frozen=True, slots=True)
class Windows:
    """How documents are cut, and how the scores of their windows become theirs."""

    rule: WindowsInfo
    special: TokenizerInfo
    room: int  # ids of a window without its special tokens

    @classmethod
    def of(cls, bundle: Bundle) -> Windows:
        """Those that the manifest of `bundle` asks for."""
        m = bundle.manifest
        return cls(m.windows, m.tokenizer, m.max_tokens - len(m.tokenizer.prefix) - len(m.tokenizer.suffix))

    def cut(self, documents: TokenBatch) -> WindowBatch:
        """The windows of `documents`, as a Tokenizer of the same rule gives them."""
        n_docs, n_before = len(documents.rows), len(self.special.prefix)
        content = documents.lengths - n_before - len(self.special.suffix)
        counts = np.maximum(1, -(-content // self.room))
        step = np.full(n_docs, self.room)
        if self.rule.take != "all":
            counts, step = np.minimum(counts, 1 if self.rule.take == "first" else 2), content
        document = np.repeat(np.arange(n_docs), counts)
        number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
        if (content <= self.room).all():
            return WindowBatch(replace(documents, rows=document), document, number == 0)
        starts = np.minimum(number * step[document], np.maximum(0, content - self.room)[document])
        lengths = np.minimum(content, self.room)[document]
        ends = np.cumsum(lengths)
        places = np.repeat(documents.offsets[document] + n_before + starts - ends + lengths, lengths)
        ids = documents.ids[places + np.arange(ends[-1])]
        tokens = enclosed(np.arange(len(document)), ids, lengths, documents.truncated[document], self.special)
        return WindowBatch(tokens, document, number == 0)

    def merge(self, documents: TokenBatch, windows: WindowBatch, scores: ScoreBatch) -> ScoreBatch:
        """The scores of `documents` from those of their windows."""
        if self.rule.take == "first":
            return replace(scores, rows=documents.rows)
        starts = np.flatnonzero(windows.is_first)
        counts = np.diff(starts, append=len(windows.document))
        if not len(starts):
            values = scores.values
        elif self.rule.aggregate == "max":
            values = np.maximum.reduceat(scores.values, starts)
        else:
            values = (np.add.reduceat(scores.values.astype(np.float64), starts) / counts[:, None]).astype(np.float32)
        n_tokens, n_windows = documents.lengths.astype(np.int32), counts.astype(np.int32)
        return ScoreBatch(documents.rows, values, None, n_tokens, documents.truncated, n_windows)
