"""The checkpoint's tokenizer.json -> the bundle's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as OracleTokenizer
from transformers import AutoTokenizer

from jql_engine import probe_texts
from jql_engine.bundle import TokenizerInfo
from jql_engine.errors import BundleError, CheckpointError, TokenizerError
from jql_engine.rust import rust_errors
from jql_engine.tokenizer_libraries import parse_oracle
from jql_export.tensors import read_json
from jql_export.tokenizer_settings import check_settings

SHOWN = 60  # characters of a text in a message
# Saved are the ids up to the largest, with four bytes of memory for each one that no piece has.
LARGEST_ID = 1 << 24


def write_tokenizer(source: Path, target: Path, pad_id: int) -> TokenizerInfo:
    """Copy `source`/tokenizer.json to `target` without truncation and padding, and describe it for the manifest.

    The description names no fast tokenizer; `prove_fast` does. Raises TokenizerError, and CheckpointError where
    tokenizer_config.json asks for ids that this file does not give.
    """
    file = source / "tokenizer.json"
    if not file.is_file():
        raise TokenizerError(
            f"{file} is missing; write it with AutoTokenizer.from_pretrained(...).save_pretrained({str(source)!r})"
        )
    oracle = parse_oracle(file)
    if (largest := max(oracle.get_vocab().values(), default=0)) > LARGEST_ID:
        raise TokenizerError(f"{file} has the id {largest}, and no embedding table that many rows; it is damaged")
    check_settings(source, oracle)
    oracle.no_truncation()
    oracle.no_padding()
    with rust_errors(BundleError, f"{target} cannot be written"):
        oracle.save(str(target))
    with rust_errors(TokenizerError, f"{file} cannot tokenize a text"):
        prefix, suffix = _around(file, oracle)
    if not prefix + suffix:
        raise TokenizerError(f"{file} puts no special token around a text; an empty text would have no token to pool")
    added = sorted(token.content for token in oracle.get_added_tokens_decoder().values())
    try:
        return TokenizerInfo(prefix, suffix, pad_id, None, oracle.token_to_id("\u2581"), added)
    except ValueError as error:
        raise TokenizerError(f"{file} is damaged: {error}") from error


def check_ids(source: Path, info: TokenizerInfo, n_rows: int) -> None:
    """Raise CheckpointError where `source`/tokenizer.json has an id for which the words' table [n_rows, D] has no row.

    No probe document need have such a token; a text that has it would end a run, or get any score at all.
    """
    file = source / "tokenizer.json"
    around = info.prefix + info.suffix
    ids = parse_oracle(file).get_vocab() | {f"around every text: {one}": one for one in around}
    token, largest = max(ids.items(), key=lambda item: item[1])
    if largest >= n_rows:
        raise CheckpointError(
            f"{file} has id {largest} ({token!r}), the words' table of the model has {n_rows} rows: they do not belong "
            "together, or a token was added and the table not resized; remove the token in a copy"
        )


def difference_to_auto(source: Path, file: Path, texts: Sequence[str]) -> str | None:
    """What transformers' AutoTokenizer makes otherwise of `texts` than the tokenizer.json `file`; None for nothing.

    Releases from 5 on rebuild the tokenizers of some classes from their vocabulary; those before took tokenizer.json,
    which published heads and classifiers were trained with, as it is.
    """
    oracle = parse_oracle(file)
    try:
        auto = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        found = [auto(text)["input_ids"] for text in texts]
    except Exception as error:  # of transformers' own checks, of a missing library, of custom classes
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return f"not compared with AutoTokenizer, which cannot be loaded ({what})"
    for text, ids in zip(texts, found, strict=True):
        if ids != oracle.encode(text).ids:
            return (
                f"transformers {version('transformers')} builds another one from {source} than tokenizer.json "
                f"describes, which this bundle uses: their ids differ for {_shortened(text)}"
            )
    return None


def tokenizer_of(source: Path) -> Mapping[str, Any]:
    """What `source`/tokenizer.json says of ids, which truncation and padding are not; CheckpointError without one."""
    return read_json(source / "tokenizer.json") | {"truncation": None, "padding": None}


def _around(file: Path, oracle: OracleTokenizer) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after a text, whatever the text; raises TokenizerError."""
    bare = [(text, oracle.encode(text, add_special_tokens=False).ids) for text in probe_texts.texts()]
    sentences = bare[: len(probe_texts.SENTENCES)]  # of which probe documents are made
    text, content = next(((text, ids) for text, ids in sentences if ids), ("", []))
    if not content:
        raise TokenizerError(
            f"{file} gives no token for any of {len(sentences)} sentences in many languages: its vocabulary has none "
            "of their characters and no token for what is unknown; a bundle cannot be certified with it"
        )
    whole = oracle.encode(text).ids
    starts = range(len(whole) - len(content) + 1)
    start = next((start for start in starts if whole[start : start + len(content)] == content), None)
    if start is not None:
        prefix, suffix = whole[:start], whole[start + len(content) :]
        if all(oracle.encode(text).ids == prefix + ids + suffix for text, ids in bare):
            return prefix, suffix
    raise TokenizerError(
        f"{file} has a post-processor that changes the ids of a text, or puts others around some texts than around "
        f"{_shortened(text)}; supported are ids that are the same around every text"
    )


def _shortened(text: str) -> str:
    """A text for a message."""
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "...")
