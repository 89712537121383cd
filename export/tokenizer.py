"""The checkpoint's tokenizer.json -> the bundle's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as OracleTokenizer

from jql_engine.bundle import TokenizerInfo
from jql_engine.errors import CheckpointError, TokenizerError
from jql_engine.rust import rust_errors
from jql_engine.tokenizer_libraries import parse_oracle
from jql_export.settings import read_settings

# transformers' classes that take tokenizer.json as it is, whatever tokenizer_config.json says of lower case.
TAKE_THE_FILE = ("PreTrainedTokenizerFast", "TokenizersBackend")
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
    with rust_errors(TokenizerError, f"{file} cannot tokenize a text"):
        _check_config(source, read_settings(source / "tokenizer_config.json", dict), oracle)
        oracle.no_truncation()
        oracle.no_padding()
        oracle.save(str(target))
        prefix, suffix = _around(oracle)
    if not prefix + suffix:
        raise TokenizerError(f"{file} puts no special token around a text; an empty text would have no token to pool")
    added = sorted(token.content for token in oracle.get_added_tokens_decoder().values())
    try:
        return TokenizerInfo(prefix, suffix, pad_id, None, oracle.token_to_id("\u2581"), added)
    except ValueError as error:
        raise TokenizerError(f"{file} is damaged: {error}") from error


def _check_config(source: Path, config: Mapping[str, Any], oracle: OracleTokenizer) -> None:
    lower, lowers = config.get("do_lower_case"), _lowers(oracle)
    if lower in (True, False) and lower != lowers and config.get("tokenizer_class") not in TAKE_THE_FILE:
        raise CheckpointError(
            f"{source}: tokenizer_config.json has do_lower_case = {lower}, but tokenizer.json "
            f"{'puts texts in lower case' if lowers else 'keeps capitals'}; write both anew with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...), or correct do_lower_case in a copy"
        )
    side = config.get("truncation_side") or (oracle.truncation or {}).get("direction") or "right"
    if side != "right":
        raise CheckpointError(
            f"{source}: truncation_side = {side!r} in tokenizer_config.json, or direction in tokenizer.json, asks to "
            "cut the beginning of a long text; supported is to cut its end: if that is fine for your heads, say "
            "'right' in a copy"
        )


def _lowers(oracle: OracleTokenizer) -> bool:
    return oracle.normalizer is not None and "a" in oracle.normalizer.normalize_str("A")


def _around(oracle: OracleTokenizer) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after a text."""
    content = oracle.encode("a", add_special_tokens=False).ids
    whole = oracle.encode("a").ids
    for start in range(len(whole) - len(content) + 1):
        if whole[start : start + len(content)] == content:
            return whole[:start], whole[start + len(content) :]
    raise TokenizerError("the tokenizer's post-processor changes the ids of a text; only ids around it are supported")
