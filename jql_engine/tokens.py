"""Texts -> TokenBatch, with exactly the ids of the Hugging Face tokenizer.

The fast tokenizer (tokie) is used only where export has proven it identical, and even then two kinds of documents
go to the oracle (tokenizers), because the two are known to differ on them: texts that are empty once normalised, for
which tokie emits one lone space piece, and texts that contain an added token such as "</s>" literally.

Of a huge document only a prefix is tokenised where truncation.py proves it to have the same ids.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tokenizers import Tokenizer as OracleTokenizer

from jql_engine.bundle import Bundle, TokenizerInfo
from jql_engine.data import DocumentBatch, TokenBatch
from jql_engine.errors import TokenizerError
from jql_engine.rust import rust_errors
from jql_engine.truncation import Shortener, shortener

Ragged = tuple[NDArray[np.int32], NDArray[np.int64]]  # ids [T] and lengths [N]

# Texts of more bytes than both are huge; below that, to look for a prefix costs what it saves.
HUGE = 1 << 16
HUGE_PER_TOKEN = 16
# Text after which the fast tokenizer is made anew: about a second of its work, and 3 % of it to do so.
RENEW_CHARACTERS = 32 << 20
# Of those that stay whole for want of a place to cut, larger ones go to the oracle: for each byte of a text without
# white space tokie 0.1.4 needs 170 bytes of memory, the oracle 65 and no more time.
VAST = 1 << 22


class Encoder(Protocol):
    """A tokenizer library: content ids of every text, without special tokens or truncation."""

    def __call__(self, texts: list[str]) -> Ragged:
        """Encode `texts`."""
        ...


class Tokenizer:
    """Turns texts into token ids, truncated to `max_tokens` with the special tokens included."""

    def __init__(self, file: Path, info: TokenizerInfo, max_tokens: int) -> None:
        """Read `file` (tokenizer.json); raises TokenizerError where a library cannot."""
        self.info, self.max_tokens = info, max_tokens
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
        """The tokenizer of a bundle."""
        return cls(bundle.path / "tokenizer.json", bundle.manifest.tokenizer, bundle.manifest.max_tokens)

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
        """Truncate the content as the oracle does and put the special tokens around it."""
        prefix, suffix = self.info.prefix, self.info.suffix
        kept = np.minimum(lengths, self.room)
        truncated = lengths > self.room
        if truncated.any():
            content = content[_inside(np.cumsum(lengths) - lengths, kept, len(content))]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(kept + len(prefix) + len(suffix), out=offsets[1:])
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


def read_oracle(file: Path) -> OracleTokenizer:
    """The Hugging Face tokenizer of `file`, which cuts and pads nothing; raises TokenizerError."""
    with rust_errors(TokenizerError, f"{file} is no tokenizer that `tokenizers` can read"):
        tokenizer = OracleTokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def oracle_encoder(tokenizer: OracleTokenizer) -> Encoder:
    """`tokenizer` as an Encoder."""

    def encode(texts: list[str]) -> Ragged:
        encodings = [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
        ids = np.concatenate([np.empty(0, np.int32), *(np.asarray(e, np.int32) for e in encodings)])
        return ids, lengths

    return encode


def fast_encoder(file: Path) -> Encoder:
    """The tokie tokenizer of `file`; raises TokenizerError."""
    return _FastEncoder(file)


class _FastEncoder:
    """tokie, made anew now and then: it remembers every word it has met and forgets none.

    Measured with tokie 0.1.4: 8 million different words make a process grow by 790 MB.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._lock = file, threading.Lock()
        self._saved = _memory_file()
        self._n_characters = 0
        tokenizer = _tokie(file)
        if self._saved is not None:
            tokenizer.save(f"/proc/self/fd/{self._saved.fileno()}")
        self._tokenizer: Any = tokenizer

    def __call__(self, texts: list[str]) -> Ragged:
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._load()
            tokenizer = self._tokenizer
        # tokie 0.1.4 returns lengths, not offsets, and puts only the first special token: ask it for none.
        ids, lengths = tokenizer.encode_batch_flat(texts, add_special_tokens=False)
        del tokenizer
        with self._lock:
            self._n_characters += sum(map(len, texts))
            if self._n_characters > RENEW_CHARACTERS:
                self._n_characters, self._tokenizer = 0, None
                _return_memory()
        return ids.view(np.int32), lengths.astype(np.int64)

    def _load(self) -> Any:
        if self._saved is None:
            return _tokie(self._file)
        import tokie

        return tokie.Tokenizer.from_file(f"/proc/self/fd/{self._saved.fileno()}")


def _tokie(file: Path) -> Any:  # its stub lacks encode_batch_flat
    import tokie

    try:
        return tokie.Tokenizer.from_json(str(file))
    except (tokie.TokieError, ValueError, OSError) as error:
        raise TokenizerError(f"{file} is no tokenizer that tokie {_version()} can read: {error}") from error


def _return_memory() -> None:
    """Give freed memory back to the operating system, which glibc's allocator otherwise keeps in pieces."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _memory_file() -> BinaryIO | None:
    """A file without a name: tokie's own format loads in 50 ms from there, the JSON of 250,000 pieces in 700 ms."""
    return os.fdopen(os.memfd_create("tokie"), "wb") if hasattr(os, "memfd_create") else None


def _offsets(texts: pa.LargeStringArray) -> NDArray[np.int64]:
    """Where each text begins in the array's buffer of UTF-8, and where the last ends."""
    if not len(texts):  # without texts there may be no buffers
        return np.zeros(1, np.int64)
    return np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]


def _version() -> str:
    from importlib.metadata import version

    return version("tokie")


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
