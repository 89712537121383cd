"""What the files beside tokenizer.json say of ids: all of it must be in tokenizer.json, which alone enters a bundle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as OracleTokenizer

from jql_engine.errors import CheckpointError, TokenizerError
from jql_engine.rust import rust_errors
from jql_engine.tokenizer_libraries import parse_oracle, read_oracle
from jql_engine.truncation import normalize
from jql_export.settings import read_settings

CONFIG = "tokenizer_config.json"
MAP = "special_tokens_map.json"
# Where both of these files name tokens.
NAMED = (
    *(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")),
    "additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens",
)  # fmt: skip
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
    _check_tokens(source, config, oracle)
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
        is_on = after in normalize(oracle, before)
        if said in (True, False) and said != is_on and kind not in TAKE_THE_FILE:
            raise CheckpointError(
                f"{source}: {CONFIG} has {key} = {said}, but tokenizer.json "
                f"{does if is_on else does_not}; write both anew with "
                f"AutoTokenizer.from_pretrained(...).save_pretrained(...), or correct {key} in a copy"
            )


def _check_tokens(source: Path, config: Mapping[str, Any], oracle: OracleTokenizer) -> None:
    """Raise CheckpointError for a token of another file that tokenizer.json does not have, under its id.

    transformers adds such a token, and never splits it; a text that has it would get other ids here.
    """
    known = {token.content: str(number) for number, token in oracle.get_added_tokens_decoder().items()}
    for name, token, number in _named_tokens(source, config):
        if known.get(token) is None or number not in (None, known[token]):
            found = f"has under id {known[token]}" if token in known else "lacks among its added tokens"
            under = "" if number is None else f" under id {number}"
            raise CheckpointError(
                f"{source}: {name} has the token {token!r}{under}, which tokenizer.json {found}; if the model knows "
                "it, write all of them anew with AutoTokenizer.from_pretrained(...).save_pretrained(...), else remove "
                "it in a copy"
            )


def _named_tokens(source: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, str, str | None]]:
    """File, token and id, where it says one, of each token that the files beside tokenizer.json name."""
    added = read_settings(source / "added_tokens.json", dict)
    yield from (("added_tokens.json", token, str(number)) for token, number in added.items())
    decoder = config.get("added_tokens_decoder")
    for number, token in (decoder if isinstance(decoder, dict) else {}).items():
        yield from ((CONFIG, content, number) for content in _contents(token))
    for name, settings in ((CONFIG, config), (MAP, read_settings(source / MAP, dict))):
        yield from ((name, content, None) for key in NAMED for content in _contents(settings.get(key)))


def _contents(value: object) -> Iterator[str]:
    """The texts of tokens: one as a text or an object with `content`, or several in a list or by name."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict) and "content" in value:
        yield str(value["content"])
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _contents(one)
