"""The documents of a benchmark: a small sample with the length distribution of a whole corpus."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

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
