"""Pooling and input length, from what a checkpoint's own files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

from jql_export.graph import Pooling

from jql_engine.errors import CheckpointError

# sentence-transformers' module types that change nothing here: the embedding is L2-normalised in any case.
KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")
NO_LIMIT = 10**9  # tokenizers without a limit of their own say 1e30


def pooling_of(directory: Path, requested: str | None) -> Pooling:
    """The pooling that sentence-transformers' modules name, or `requested`; CheckpointError where neither does."""
    found = _pooling_of_modules(directory)
    if requested is not None and requested not in get_args(Pooling):
        raise CheckpointError(f"pooling {requested!r} is unknown; known are {', '.join(get_args(Pooling))}")
    chosen = requested or found
    if chosen is None:
        raise CheckpointError(
            f"{directory} does not say how its tokens are pooled (no modules.json with a Pooling module): "
            "give --pooling cls or --pooling mean, as the model's card says"
        )
    return "cls" if chosen == "cls" else "mean"


def max_tokens_of(directory: Path, max_positions: int, requested: int | None) -> int:
    """`requested`, or the smallest limit that the checkpoint's files name; never more than `max_positions`.

    Looks at sentence_bert_config.json and tokenizer_config.json. Raises CheckpointError where no file names a limit
    or the request exceeds the model's positions.
    """
    if requested is not None:
        if not 2 < requested <= max_positions:
            raise CheckpointError(
                f"--max-tokens {requested} is out of range: {directory} has {max_positions} positions"
            )
        return requested
    limits = (
        _read(directory / "sentence_bert_config.json").get("max_seq_length"),
        _read(directory / "tokenizer_config.json").get("model_max_length"),
    )
    named = [int(limit) for limit in limits if isinstance(limit, int | float) and 0 < limit < NO_LIMIT]
    if not named:
        raise CheckpointError(
            f"{directory} does not say how long an input may be (sentence_bert_config.json or tokenizer_config.json): "
            f"give --max-tokens, at most {max_positions}"
        )
    return min(*named, max_positions)


def _pooling_of_modules(directory: Path) -> Pooling | None:
    modules = _read(directory / "modules.json")
    for module in modules if isinstance(modules, list) else []:
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind not in KNOWN_MODULES:
            raise CheckpointError(
                f"{directory}/modules.json has a module {kind!r}, which the graph does not compute; "
                f"supported are {', '.join(KNOWN_MODULES)}"
            )
        if kind == "Pooling":
            return _pooling_of_module(directory / str(module.get("path", "")) / "config.json")
    return None


def _pooling_of_module(file: Path) -> Pooling:
    settings = _read(file)
    # Two generations of the format: one flag a mode, or a mode by name.
    on = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value is True]
    flags = {key.removeprefix("pooling_mode_").removesuffix("_token").removesuffix("_tokens") for key in on}
    names = flags or {str(settings.get("pooling_mode"))}
    if names == {"cls"}:
        return "cls"
    if names == {"mean"}:
        return "mean"
    raise CheckpointError(f"{file} asks for pooling {', '.join(sorted(names))}; supported are cls and mean")


def _read(file: Path) -> Any:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is no JSON: {error}") from error
