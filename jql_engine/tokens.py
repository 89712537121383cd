"""Texts -> TokenBatch, with exactly the ids of the Hugging Face tokenizer.

The fast tokenizer (tokie) is used only where export has proven it identical, and even then two kinds of documents
go to the oracle (tokenizers), because the two are known to differ on them: texts that are empty once normalised, for
which tokie emits one lone space piece, and texts that contain an added token such as "</s>" literally.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tokenizers import Tokenizer as OracleTokenizer

from jql_engine.bundle import Bundle, TokenizerInfo
from jql_engine.data import DocumentBatch, TokenBatch
from jql_engine.errors import TokenizerError

Ragged = tuple[NDArray[np.int32], NDArray[np.int64]]  # ids [T] and lengths [N]


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
        self._oracle = oracle_encoder(file)
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
        return self._close(rows, *self._content(texts))

    def _content(self, texts: pa.LargeStringArray) -> Ragged:
        if self._fast is None:
            return self._oracle(texts.to_pylist())
        ids, lengths = self._fast(texts.to_pylist())
        suspect = np.flatnonzero(self._suspects(texts, ids, lengths))
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
        room = self.max_tokens - len(prefix) - len(suffix)
        kept = np.minimum(lengths, room)
        truncated = lengths > room
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


def oracle_encoder(file: Path) -> Encoder:
    """The Hugging Face tokenizer of `file`; raises TokenizerError."""
    try:
        tokenizer = OracleTokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise TokenizerError(f"{file} is no tokenizer that `tokenizers` can read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(texts: list[str]) -> Ragged:
        encodings = [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
        ids = np.concatenate([np.empty(0, np.int32), *(np.asarray(e, np.int32) for e in encodings)])
        return ids, lengths

    return encode


def fast_encoder(file: Path) -> Encoder:
    """The tokie tokenizer of `file`; raises TokenizerError."""
    import tokie

    try:
        tokenizer: Any = tokie.Tokenizer.from_json(str(file))  # its stub lacks encode_batch_flat
    except (tokie.TokieError, ValueError, OSError) as error:
        raise TokenizerError(f"{file} is no tokenizer that tokie {_version()} can read: {error}") from error

    def encode(texts: list[str]) -> Ragged:
        # tokie 0.1.4 returns lengths, not offsets, and puts only the first special token: ask it for none.
        ids, lengths = tokenizer.encode_batch_flat(texts, add_special_tokens=False)
        return ids.view(np.int32), lengths.astype(np.int64)

    return encode


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
