"""Texts -> TokenBatch, with exactly the ids of the Hugging Face tokenizer.

The fast tokenizer (tokie) is used only in a version that has been proven identical, by export or by this machine, and
even then two kinds of documents go to the oracle (tokenizers), because the two are known to differ on them: texts that
are empty once normalized, for which tokie emits one lone space piece, and texts that contain an added token such as
"</s>" literally.

Of a huge document only a prefix is tokenized where truncation.py proves it to have the same ids.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jql_engine import probe_texts
from jql_engine.bundle import FIRST_WINDOW, Bundle, TokenizerInfo, WindowsInfo
from jql_engine.data import DocumentBatch, TokenBatch
from jql_engine.errors import TokenizerError
from jql_engine.rust import rust_errors
from jql_engine.tokenizer_libraries import (
    Ragged,
    fast_encoder,
    fast_name,
    may_be_fast,
    oracle_encoder,
    oracle_name,
    read_oracle,
)
from jql_engine.truncation import Shortener, shortener

UNLIMITED = 1 << 40  # tokens
# Texts of more bytes than both are huge; below that, to look for a prefix costs what it saves.
HUGE = 1 << 16
HUGE_PER_TOKEN = 16
# Of those that stay whole for want of a place to cut, larger ones go to the oracle: for each byte of a text without
# white space tokie 0.1.4 needs 170 bytes of memory, the oracle 65 and no more time.
VAST = 1 << 22


class Tokenizer:
    """Turns texts into token ids, special tokens included.

    Of a document longer than `max_tokens` it keeps what `windows` are cut from: the first window, the first and the
    last, or all of it.
    """

    def __init__(self, file: Path, info: TokenizerInfo, max_tokens: int, windows: WindowsInfo = FIRST_WINDOW) -> None:
        """Read `file` (tokenizer.json) with the libraries that `info` names; raises TokenizerError where one cannot."""
        self.info, self.max_tokens, self._windows = info, max_tokens, windows.take
        self.room = max_tokens - len(info.prefix) - len(info.suffix)
        self._tokenizer = read_oracle(file)
        self._oracle = oracle_encoder(self._tokenizer)
        self._huge = max(HUGE, HUGE_PER_TOKEN * max_tokens)
        with rust_errors(TokenizerError, f"{file} is no tokenizer that tokie can read"):
            self._fast = fast_encoder(file) if info.fast else None
        literal = "|".join(re.escape(token) for token in info.added_tokens)
        self._literal = literal or None

    @classmethod
    def of(cls, bundle: Bundle) -> Tokenizer:
        """The tokenizer of a bundle; never a fast one in a version that nothing was proven for."""
        info = with_proven_tokenizer(bundle).manifest.tokenizer
        return cls(_file(bundle), info, bundle.manifest.max_tokens, bundle.manifest.windows)

    @property
    def library(self) -> str:
        """Name and version of the library that computes the ids: "tokie 0.1.4", or "tokenizers 0.23.3"."""
        return self.info.fast or oracle_name()

    def is_exact_on(self, texts: Sequence[str]) -> bool:
        """Whether `texts`, whole, get the ids that `tokenizers` gives them."""
        ids, lengths = self._content(pa.array(texts, pa.large_string()))
        exact_ids, exact_lengths = self._oracle(list(texts))
        return np.array_equal(ids, exact_ids) and np.array_equal(lengths, exact_lengths)

    def encode(self, documents: DocumentBatch) -> TokenBatch:
        """Tokenize every document that is not null."""
        rows, texts = documents.rows, documents.texts
        if texts.null_count:
            present = texts.is_valid()
            rows, texts = rows[present.to_numpy(zero_copy_only=False)], texts.filter(present)
        with rust_errors(TokenizerError, "a document cannot be tokenized"):
            return self._close(rows, *self._content(self._shorten(texts)))

    @cached_property
    def _shortener(self) -> Shortener | None:
        return shortener(self._tokenizer)  # 0.5 s for 250,000 pieces, so not before a document needs it

    def _shorten(self, texts: pa.LargeStringArray) -> pa.LargeStringArray:
        """Put in the place of every huge text a shorter one whose ids are the same once they are cut."""
        if self._windows != "first":
            return texts
        offsets = _offsets(texts)
        huge = np.flatnonzero(np.diff(offsets) > self._huge)
        if not len(huge) or self._shortener is None:
            return texts
        import pyarrow.compute as pc

        is_huge = np.zeros(len(texts), np.bool_)
        is_huge[huge] = True
        content = memoryview(texts.buffers()[2])  # texts[i].as_buffer() is a copy
        documents = (content[offsets[i] : offsets[i + 1]] for i in huge)
        short = [self._shortener.shorten(document, self.room, self._encode) for document in documents]
        return pc.replace_with_mask(texts, pa.array(is_huge), pa.array(short, pa.large_string()))

    def _encode(self, texts: list[str]) -> Ragged:
        return self._content(pa.array(texts, pa.large_string()))

    def _content(self, texts: pa.LargeStringArray) -> Ragged:
        if self._fast is None:
            return self._oracle(texts.to_pylist())
        listed, vast = texts.to_pylist(), np.diff(_offsets(texts)) > max(VAST, self._huge)
        if vast.any() and self._shortener is None:
            vast[:] = False
        for i in np.flatnonzero(vast):
            listed[i] = ""
        ids, lengths = self._fast(listed)
        suspect = np.flatnonzero(vast | self._suspects(texts, ids, lengths))
        if not len(suspect):
            return ids, lengths
        exact_ids, exact_lengths = self._oracle(texts.take(pa.array(suspect)).to_pylist())
        return _replace(ids, lengths, suspect, exact_ids, exact_lengths)

    def _suspects(
        self, texts: pa.LargeStringArray, ids: NDArray[np.int32], lengths: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        import pyarrow.compute as pc  # a quarter of the package's import time, and not always needed

        suspect = np.zeros(len(texts), np.bool_)
        if self.info.lone_space is not None:
            single = np.flatnonzero(lengths == 1)
            first = np.cumsum(lengths)[single] - 1
            suspect[single] = ids[first] == self.info.lone_space
        if self._literal:
            suspect |= pc.match_substring_regex(texts, self._literal).to_numpy(zero_copy_only=False)
        return suspect

    def _close(self, rows: NDArray[np.int64], content: NDArray[np.int32], lengths: NDArray[np.int64]) -> TokenBatch:
        """Truncate the content, to the first window as the oracle does, and put the special tokens around it."""
        first, last = self.room, self.room if self._windows == "first+last" else 0
        truncated = lengths > first + last
        if self._windows == "all" or not truncated.any():
            return enclosed(rows, content, lengths, np.zeros(len(rows), np.bool_), self.info)
        kept, ends = np.where(truncated, first, lengths), np.cumsum(lengths)
        inside = _inside(ends - lengths, kept, len(content))
        if last:
            inside |= _inside(ends - last, np.where(truncated, last, 0), len(content))
            kept = np.minimum(lengths, first + last)
        return enclosed(rows, content[inside], kept, truncated, self.info)


def enclosed(
    rows: NDArray[np.int64],
    content: NDArray[np.int32],
    lengths: NDArray[np.int64],
    truncated: NDArray[np.bool_],
    special: TokenizerInfo,
) -> TokenBatch:
    """Documents of `lengths` [N] in `content` [T], with the special tokens around each."""
    prefix, suffix = special.prefix, special.suffix
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(lengths + len(prefix) + len(suffix), out=offsets[1:])
    is_content = np.ones(offsets[-1], np.bool_)
    ids = np.empty(offsets[-1], np.int32)
    for i, token in enumerate(prefix):
        is_content[offsets[:-1] + i] = False
        ids[offsets[:-1] + i] = token
    for i, token in enumerate(reversed(suffix)):
        is_content[offsets[1:] - 1 - i] = False
        ids[offsets[1:] - 1 - i] = token
    ids[is_content] = content
    return TokenBatch(rows, ids, offsets, truncated)


def with_proven_tokenizer(bundle: Bundle, report: Callable[[str], None] = lambda _: None) -> Bundle:
    """`bundle`, with no other fast tokenizer in its manifest than one that was proven in the version installed here.

    Where export has proven another version, this one is proven anew, which takes seconds with a large vocabulary: a job
    does it once, before its workers begin. `report` is told which library computes the ids from now on.
    """
    info, installed = bundle.manifest.tokenizer, fast_name()
    if info.fast in (None, installed):
        return bundle
    found = prove_fast(_file(bundle), info, probe_texts.texts())
    here = f"tokenizer: {installed} is installed here, the bundle was made with {info.fast}"
    if found.fast:
        report(f"{here}; proven anew: it gives the ids of `tokenizers` on all {len(probe_texts.texts())} probe texts")
    else:
        report(
            f"{here}; it does not give the ids of `tokenizers` on every probe text, so {oracle_name()} is used, which "
            f"is several times slower; install {info.fast.replace(' ', '==')} to tokenize with that"
        )
    return replace(bundle, manifest=replace(bundle.manifest, tokenizer=found))


def prove_fast(file: Path, info: TokenizerInfo, texts: Sequence[str]) -> TokenizerInfo:
    """`info` of tokenizer.json, with the installed fast tokenizer if that is exact on `texts`, else with none."""
    fast = replace(info, fast=fast_name())
    try:
        with rust_errors(TokenizerError, f"{file} cannot be proven"):
            exact = may_be_fast(file) and Tokenizer(file, fast, UNLIMITED).is_exact_on(texts)
    except Exception:  # what a version that nobody knows yet may raise; the oracle takes its place
        exact = False
    return fast if exact else replace(info, fast=None)


def _file(bundle: Bundle) -> Path:
    return bundle.path / "tokenizer.json"


def _offsets(texts: pa.LargeStringArray) -> NDArray[np.int64]:
    """Where each text begins in the array's buffer of UTF-8, and where the last ends."""
    if not len(texts):  # without texts there may be no buffers
        return np.zeros(1, np.int64)
    return np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]


def _inside(starts: NDArray[np.int64], lengths: NDArray[np.int64], total: int) -> NDArray[np.bool_]:
    """True at positions [start, start + length) of every document; documents do not overlap."""
    edges = np.zeros(total + 1, np.int8)
    used = lengths > 0
    np.add.at(edges, starts[used], 1)
    np.add.at(edges, (starts + lengths)[used], -1)
    return np.cumsum(edges[:-1], dtype=np.int8).astype(np.bool_)


def _replace(
    ids: NDArray[np.int32],
    lengths: NDArray[np.int64],
    index: NDArray[np.int64],
    new_ids: NDArray[np.int32],
    new_lengths: NDArray[np.int64],
) -> Ragged:
    """Exchange the documents `index` (ascending) of a ragged array for others."""
    starts = np.cumsum(lengths) - lengths
    new_starts = np.cumsum(new_lengths) - new_lengths
    pieces, position = [], 0
    for document, start, length in zip(index, new_starts, new_lengths, strict=True):
        pieces += [ids[position : starts[document]], new_ids[start : start + length]]
        position = starts[document] + lengths[document]
    out = lengths.copy()
    out[index] = new_lengths
    return np.concatenate([*pieces, ids[position:]]), out
