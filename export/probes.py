"""Probe documents in many languages and of many lengths, on which a graph meets its oracle."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice

import numpy as np
import pyarrow as pa

from jql_engine.data import DocumentBatch, TokenBatch
from jql_engine.probe_texts import SENTENCES
from jql_engine.tokenizer import Tokenizer

# Borders of powers of two and of kernels' block sizes; three of each of the first ones, so that batches hold several.
SHORT = (2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 100, 127, 128, 129, 200, 255, 256, 257)
LONG = (384, 511, 512, 513, 1000, 2048, 4096, 8192)


def token_batch(tokenizer: Tokenizer) -> TokenBatch:
    """Documents of exactly chosen lengths, in tokens, from 2 to the tokenizer's maximum."""
    limit = tokenizer.max_tokens
    n_special = len(tokenizer.info.prefix) + len(tokenizer.info.suffix)
    wanted = {min(length, limit) for length in (*SHORT, *LONG, limit)}
    lengths = sorted([n for n in wanted if n >= n_special] + [n for n in SHORT[:20] if n_special <= n <= limit] * 2)
    batches = [_exactly(tokenizer, length, i) for i, length in enumerate(lengths)]
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    ids = np.concatenate(batches)
    return TokenBatch(np.arange(len(lengths)), ids, offsets, np.zeros(len(lengths), np.bool_))


def _exactly(tokenizer: Tokenizer, length: int, first: int) -> np.ndarray:
    """Ids of a document of `length` tokens that begins with sentence number `first`."""
    room = length - len(tokenizer.info.prefix) - len(tokenizer.info.suffix)
    count, content = 1, np.empty(0, np.int32)
    while len(content) < room:
        content = _content(
            tokenizer, list(islice(cycle(SENTENCES), first % len(SENTENCES), first % len(SENTENCES) + count))
        )
        count *= 2
    return np.concatenate([tokenizer.info.prefix, content[:room], tokenizer.info.suffix]).astype(np.int32)


def _content(tokenizer: Tokenizer, sentences: Sequence[str]) -> np.ndarray:
    info, text = tokenizer.info, pa.array([" ".join(sentences)], pa.large_string())
    closed = tokenizer.encode(DocumentBatch.of(text)).ids
    return closed[len(info.prefix) : len(closed) - len(info.suffix)]
