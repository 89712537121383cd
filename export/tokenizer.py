"""The checkpoint's tokenizer.json -> the bundle's, and the proof that the fast tokenizer gives the same ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer as OracleTokenizer

from jql_engine.bundle import TokenizerInfo
from jql_engine.data import DocumentBatch
from jql_engine.errors import TokenizerError
from jql_engine.rust import rust_errors
from jql_engine.tokens import Tokenizer, read_oracle

UNLIMITED = 1 << 40
# Saved are the ids up to the largest, with four bytes of memory for each one that no piece has.
LARGEST_ID = 1 << 24


def write_tokenizer(source: Path, target: Path, pad_id: int) -> TokenizerInfo:
    """Copy `source`/tokenizer.json to `target` without truncation and padding, and describe it for the manifest.

    The description names no fast tokenizer; `prove_fast` does. Raises TokenizerError.
    """
    file = source / "tokenizer.json"
    if not file.is_file():
        raise TokenizerError(
            f"{file} is missing; write it with AutoTokenizer.from_pretrained(...).save_pretrained({str(source)!r})"
        )
    oracle = read_oracle(file)
    if (largest := max(oracle.get_vocab().values(), default=0)) > LARGEST_ID:
        raise TokenizerError(f"{file} has the id {largest}, and no embedding table that many rows; it is damaged")
    oracle.save(str(target))
    with rust_errors(TokenizerError, f"{file} cannot tokenize a text"):
        prefix, suffix = _around(oracle)
    if not prefix + suffix:
        raise TokenizerError(f"{file} puts no special token around a text; an empty text would have no token to pool")
    added = sorted(token.content for token in oracle.get_added_tokens_decoder().values())
    return TokenizerInfo(prefix, suffix, pad_id, None, oracle.token_to_id("\u2581"), added)


def prove_fast(file: Path, info: TokenizerInfo, texts: Sequence[str]) -> TokenizerInfo:
    """`info` with the fast tokenizer named if its ids equal the oracle's on all `texts`, else as it is.

    Two kinds are not even tried: models other than Unigram, since tokie 0.1.4 differs from WordPiece on rare characters
    that no list of texts is sure to hold, and added tokens that are searched in the normalised text, since ours are
    searched in the text as it is.
    """
    if not _can_be_fast(file):
        return info
    fast = TokenizerInfo(
        info.prefix, info.suffix, info.pad, f"tokie {version('tokie')}", info.lone_space, info.added_tokens
    )
    documents = DocumentBatch.of(pa.array(texts, pa.large_string()))
    try:
        found = Tokenizer(file, fast, UNLIMITED).encode(documents)
    except TokenizerError:
        return info
    expected = Tokenizer(file, info, UNLIMITED).encode(documents)
    same = np.array_equal(found.ids, expected.ids) and np.array_equal(found.offsets, expected.offsets)
    return fast if same else info


def _can_be_fast(file: Path) -> bool:
    fields = json.loads(file.read_text(encoding="utf-8"))
    normalised = any(token["normalized"] for token in fields["added_tokens"])
    return fields["model"]["type"] == "Unigram" and not (normalised and fields["normalizer"])


def _around(oracle: OracleTokenizer) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after a text."""
    content = oracle.encode("a", add_special_tokens=False).ids
    whole = oracle.encode("a").ids
    for start in range(len(whole) - len(content) + 1):
        if whole[start : start + len(content)] == content:
            return whole[:start], whole[start + len(content) :]
    raise TokenizerError("the tokenizer's post-processor changes the ids of a text; only ids around it are supported")
