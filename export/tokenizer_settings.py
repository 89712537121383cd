"""What the files beside tokenizer.json say of ids: all of it must be in tokenizer.json, which alone enters a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as OracleTokenizer

from jql_engine.errors import CheckpointError, TokenizerError
from jql_engine.rust import rust_errors
from jql_engine.tokenizer_libraries import parse_oracle, read_oracle
from jql_export.settings import read_settings

CONFIG = "tokenizer_config.json"
# transformers' classes that take tokenizer.json as it is, whatever tokenizer_config.json says of lower case.
TAKE_THE_FILE = ("PreTrainedTokenizerFast", "TokenizersBackend")
BERT = ("BertTokenizer", "BertTokenizerFast")  # put texts in lower case where do_lower_case is not there
# Settings of transformers' other classes: a text, and what is in it once normalized where the setting is on.
SWITCHES = {
    "do_lower_case": ("A", "a", "puts texts in lower case", "keeps capitals"),
    "strip_accents": ("\u00e9|", "e|", "strips accents", "keeps accents"),
    "tokenize_chinese_chars": ("中中", "中  中", "sets Chinese characters apart", "leaves Chinese characters together"),
}


def check_tokenizer(source: Path) -> None:
    """Raise CheckpointError where a file beside `source`/tokenizer.json asks for other ids than that gives."""
    check_settings(source, parse_oracle(source / "tokenizer.json"))


def check_settings(source: Path, oracle: OracleTokenizer) -> None:
    """The same of a tokenizer.json that is read, with the truncation that it has."""
    config = read_settings(source / CONFIG, dict)
    with rust_errors(TokenizerError, f"{source / 'tokenizer.json'} cannot tokenize a text"):
        _check_switches(source, config, oracle)
    if config.get("split_special_tokens"):
        raise CheckpointError(
            f"{source}: {CONFIG} has split_special_tokens = {config['split_special_tokens']!r}, so that a text with a "
            "special token like </s> in it gets other ids than from tokenizer.json; supported is false: set it to that "
            "in a copy, if that is fine for your heads"
        )
    model: Any = oracle.model  # its stub knows no dropout, which BPE alone has
    if dropout := getattr(model, "dropout", None):
        raise CheckpointError(
            f"{source / 'tokenizer.json'} has dropout = {dropout:.3g}: it draws ids at random, which is for training; "
            "set it to null in a copy"
        )
    side = config.get("truncation_side") or (oracle.truncation or {}).get("direction") or "right"
    if side != "right":
        raise CheckpointError(
            f"{source}: truncation_side = {side!r} in {CONFIG}, or direction in tokenizer.json, asks to "
            "cut the beginning of a long text; supported is to cut its end: if that is fine for your heads, say "
            "'right' in a copy"
        )


def check_token_types(source: Path, texts: Sequence[str]) -> None:
    """Raise CheckpointError where the model would get another token type than 0 for a text: a graph adds that of 0."""
    file, config = source / "tokenizer.json", read_settings(source / CONFIG, dict)
    fed = config.get("model_input_names")
    if isinstance(fed, list) and "token_type_ids" not in fed:
        return
    oracle = read_oracle(file)
    with rust_errors(TokenizerError, f"{file} cannot tokenize a text"):
        types = {kind for text in texts for kind in oracle.encode(text).type_ids}
    if types - {0}:
        raise CheckpointError(
            f"{file} gives the tokens of a single text the types {', '.join(map(str, sorted(types)))}; supported is "
            "0 alone: in a copy, set type_id to 0 in its post_processor, or leave token_type_ids out of "
            f"model_input_names in {CONFIG}, if your heads were trained so"
        )


def _check_switches(source: Path, config: Mapping[str, Any], oracle: OracleTokenizer) -> None:
    kind = config.get("tokenizer_class")
    for key, (before, after, does, does_not) in SWITCHES.items():
        said = config.get(key, True if kind in BERT and key == "do_lower_case" else None)
        is_on = after in _normalize(oracle, before)
        if said in (True, False) and said != is_on and kind not in TAKE_THE_FILE:
            raise CheckpointError(
                f"{source}: {CONFIG} has {key} = {said}, but tokenizer.json "
                f"{does if is_on else does_not}; write both anew with "
                f"AutoTokenizer.from_pretrained(...).save_pretrained(...), or correct {key} in a copy"
            )


def _normalize(oracle: OracleTokenizer, text: str) -> str:
    normalizer: Any = oracle.normalizer  # may be None, other than its stub says
    return str(normalizer.normalize_str(text)) if normalizer else text
