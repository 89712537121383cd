"""The two tokenizer libraries, behind one call: `tokenizers`, which decides what is right, and tokie, which is fast."""

from __future__ import annotations

import ctypes
import json
import os
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as OracleTokenizer

from jql_engine.errors import TokenizerError
from jql_engine.rust import rust_errors

Ragged = tuple[NDArray[np.int32], NDArray[np.int64]]  # ids [T] and lengths [N]

# Text after which the fast tokenizer is made anew: about a second of its work, and 3 % of it to do so.
RENEW_CHARACTERS = 32 << 20
# tokie reads scores as fp32. Of XLM-R's, which are exact in fp32, JSON readers lose 3.6e-15 at most.
SCORE_ERROR = 1e-9


class Encoder(Protocol):
    """A tokenizer library: content ids of every text, without special tokens or truncation."""

    def __call__(self, texts: list[str]) -> Ragged:
        """Encode `texts`."""
        ...


def fast_name() -> str:
    """Name and version of the fast tokenizer that is installed, as a manifest names it: "tokie 0.1.4"."""
    return f"tokie {version('tokie')}"


def oracle_name() -> str:
    """Name and version of the other: "tokenizers 0.23.3"."""
    return f"tokenizers {version('tokenizers')}"


def may_be_fast(file: Path) -> bool:
    """Whether `file` (tokenizer.json) is of a kind for which a list of texts can prove the fast tokenizer.

    No list is sure to hold what tokie 0.1.4 gets wrong of three kinds: models other than Unigram (rare characters of
    WordPiece); added tokens that are searched in the normalized text (ours are searched in the text as it is);
    scores that are not exact in fp32 (which of two equally good splits behind an unknown character is taken).
    """
    fields = json.loads(file.read_text(encoding="utf-8"))
    model = fields["model"]
    normalized = any(token["normalized"] for token in fields["added_tokens"])
    return model["type"] == "Unigram" and not (normalized and fields["normalizer"]) and _are_fp32(model["vocab"])


def _are_fp32(pieces: list[tuple[str, float]]) -> bool:
    scores = np.array([score for _, score in pieces], np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        return bool((np.abs(scores - scores.astype(np.float32)) <= SCORE_ERROR).all())


def read_oracle(file: Path) -> OracleTokenizer:
    """The Hugging Face tokenizer of `file`, which cuts and pads nothing; raises TokenizerError."""
    tokenizer = parse_oracle(file)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def parse_oracle(file: Path) -> OracleTokenizer:
    """The same as the file has it, truncation and padding included; raises TokenizerError."""
    with rust_errors(TokenizerError, f"{file} is no tokenizer that `tokenizers` can read"):
        return OracleTokenizer.from_file(str(file))


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
        raise TokenizerError(f"{file} is no tokenizer that {fast_name()} can read: {error}") from error


def _return_memory() -> None:
    """Give freed memory back to the operating system, which glibc's allocator otherwise keeps in pieces."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _memory_file() -> BinaryIO | None:
    """A file without a name: tokie's own format loads in 50 ms from there, the JSON of 250,000 pieces in 700 ms."""
    return os.fdopen(os.memfd_create("tokie"), "wb") if hasattr(os, "memfd_create") else None
