"""The documents of a benchmark: a small sample with the length distribution of a whole corpus, or of chosen lengths."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer as OracleTokenizer

from jql_engine.data import DocumentBatch, TokenBatch
from jql_engine.engine import as_texts
from jql_engine.tokenizer import Tokenizer


def sample(corpus: Path, n_docs: int, tokenizer: Tokenizer, max_tokens: int) -> tuple[list[str], TokenBatch]:
    """`n_docs` texts at evenly spaced quantiles of the length in tokens, in a fixed random order, and their ids.

    Documents over `max_tokens` are left out: a sample of a few dozen would hang on one of them.
    """
    texts = [text for text in pq.read_table(corpus, columns=["text"])["text"].to_pylist() if text]
    lengths = tokenizer.encode(DocumentBatch.of(as_texts(texts))).lengths
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] <= max_tokens]
    quantiles = ((np.arange(n_docs) + 0.5) / n_docs * len(order)).astype(int)
    chosen = np.random.default_rng(0).permutation(order[quantiles])
    picked = [texts[i] for i in chosen]
    return picked, tokenizer.encode(DocumentBatch.of(as_texts(picked)))


def of_lengths(corpus: Path, lengths: Sequence[int], tokenizer_file: Path) -> list[str]:
    """Real texts joined and cut so that they have these many tokens, special ones not counted, or nearly."""
    tokenizer = OracleTokenizer.from_file(str(tokenizer_file))
    texts = [text for text in pq.read_table(corpus, columns=["text"])["text"].to_pylist() if text]
    source = itertools.cycle(np.random.default_rng(0).permutation(len(texts)))
    cut = []
    for wanted in lengths:
        text, ends = "", []
        while len(ends) < wanted:
            text += ("\n\n" if text else "") + texts[next(source)]
            ends = [end for _, end in tokenizer.encode(text, add_special_tokens=False).offsets]
        cut.append(text[: ends[wanted - 1]])
    return cut
