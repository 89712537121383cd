"""The checkpoint's tokenizer.json -> the bundle's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as OracleTokenizer
from transformers import AutoTokenizer

from jql_engine.bundle import TokenizerInfo
from jql_engine.errors import CheckpointError, TokenizerError
from jql_engine.rust import rust_errors
from jql_engine.tokenizer_libraries import parse_oracle
from jql_export.settings import read_settings
from jql_export.tensors import read_json

# transformers' classes that take tokenizer.json as it is, whatever tokenizer_config.json says of lower case.
TAKE_THE_FILE = ("PreTrainedTokenizerFast", "TokenizersBackend")
BERT = ("BertTokenizer", "BertTokenizerFast")  # put texts in lower case where do_lower_case is not there
# Settings of transformers' other classes: a text, and what is in it once normalized where the setting is on.
SWITCHES = {
    "do_lower_case": ("A", "a", "puts texts in lower case", "keeps capitals"),
    "strip_accents": ("\u00e9|", "e|", "strips accents", "keeps accents"),
    "tokenize_chinese_chars": ("中中", "中  中", "sets Chinese characters apart", "leaves Chinese characters together"),
}
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


def difference_to_auto(source: Path, file: Path, texts: Sequence[str]) -> str | None:
    """What transformers' AutoTokenizer makes otherwise of `texts` than the tokenizer.json `file`; None for nothing.

    Releases from 5 on rebuild the tokenizers of some classes from their vocabulary; those before took tokenizer.json,
    which published heads and classifiers were trained with, as it is.
    """
    oracle = parse_oracle(file)
    try:
        auto = AutoTokenizer.from_pretrained(source, local_files_only=True)
        found = [auto(text)["input_ids"] for text in texts]
    except Exception as error:  # of transformers' own checks, of a missing library, of custom classes
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return f"not compared with AutoTokenizer, which cannot be loaded ({what})"
    for text, ids in zip(texts, found, strict=True):
        if ids != oracle.encode(text).ids:
            shown = text if len(text) <= SHOWN else text[:SHOWN] + "..."
            return (
                f"transformers {version('transformers')} builds another one from {source} than tokenizer.json "
                f"describes, which this bundle uses: their ids differ for {shown!r}"
            )
    return None


def tokenizer_of(source: Path) -> Mapping[str, Any]:
    """What `source`/tokenizer.json says of ids, which truncation and padding are not; CheckpointError without one."""
    return read_json(source / "tokenizer.json") | {"truncation": None, "padding": None}


def _check_config(source: Path, config: Mapping[str, Any], oracle: OracleTokenizer) -> None:
    kind = config.get("tokenizer_class")
    for key, (before, after, does, does_not) in SWITCHES.items():
        said = config.get(key, True if kind in BERT and key == "do_lower_case" else None)
        is_on = after in _normalize(oracle, before)
        if said in (True, False) and said != is_on and kind not in TAKE_THE_FILE:
            raise CheckpointError(
                f"{source}: tokenizer_config.json has {key} = {said}, but tokenizer.json "
                f"{does if is_on else does_not}; write both anew with "
                f"AutoTokenizer.from_pretrained(...).save_pretrained(...), or correct {key} in a copy"
            )
    side = config.get("truncation_side") or (oracle.truncation or {}).get("direction") or "right"
    if side != "right":
        raise CheckpointError(
            f"{source}: truncation_side = {side!r} in tokenizer_config.json, or direction in tokenizer.json, asks to "
            "cut the beginning of a long text; supported is to cut its end: if that is fine for your heads, say "
            "'right' in a copy"
        )


def _normalize(oracle: OracleTokenizer, text: str) -> str:
    normalizer: Any = oracle.normalizer  # may be None, other than its stub says
    return str(normalizer.normalize_str(text)) if normalizer else text


def _around(oracle: OracleTokenizer) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after a text."""
    content = oracle.encode("a", add_special_tokens=False).ids
    whole = oracle.encode("a").ids
    for start in range(len(whole) - len(content) + 1):
        if whole[start : start + len(content)] == content:
            return whole[:start], whole[start + len(content) :]
    raise TokenizerError("the tokenizer's post-processor changes the ids of a text; only ids around it are supported")
