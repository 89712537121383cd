"""Pooling, input length and what is done to a text first, from what a checkpoint's own files say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

from jql_engine.bundle import Pooling
from jql_engine.errors import CheckpointError, UnsafeNameError
from jql_engine.names import RelativeName
from jql_export.defaults import SNOWFLAKE

T = TypeVar("T", dict[str, Any], list[Any])

# sentence-transformers' module types that change nothing here: the embedding is L2-normalized in any case.
KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")
KNOWN_POOLING: dict[str, Pooling] = {SNOWFLAKE: "cls"}  # of hub ids, for copies without sentence-transformers' files
NO_LIMIT = 10**9  # tokenizers without a limit of their own say 1e30


def pooling_of(
    directory: Path, requested: str | None, report: Callable[[str], None], known: Pooling | None = None
) -> Pooling:
    """`requested`, or the pooling that sentence-transformers' modules name, or what is `known` of this encoder.

    Raises CheckpointError where none of them says it.
    """
    found = _pooling_of_modules(directory)
    if requested is not None and requested not in get_args(Pooling):
        raise CheckpointError(f"pooling {requested!r} is unknown; known are {', '.join(get_args(Pooling))}")
    chosen = requested or found or known
    if chosen is None:
        raise CheckpointError(
            f"{directory} does not say how its tokens are pooled (no modules.json with a Pooling module): "
            "give --pooling cls or --pooling mean, as the model's card says"
        )
    if found is not None and found != chosen:
        report(f"pooling: {chosen} as requested, although {directory}/modules.json says {found}")
    return "cls" if chosen == "cls" else "mean"


def max_tokens_of(directory: Path, max_positions: int, requested: int | None) -> int:
    """`requested`, or the smallest limit that the checkpoint's files name; never more than `max_positions`.

    Looks at sentence_bert_config.json and tokenizer_config.json. Raises CheckpointError where no file names a limit
    or the request exceeds the model's positions.
    """
    limits = (
        read_settings(directory / "sentence_bert_config.json", dict).get("max_seq_length"),
        read_settings(directory / "tokenizer_config.json", dict).get("model_max_length"),
    )
    named = [int(limit) for limit in limits if isinstance(limit, int | float) and 0 < limit < NO_LIMIT]
    if requested is None and not named:
        raise CheckpointError(
            f"{directory} does not say how long an input may be (sentence_bert_config.json or tokenizer_config.json): "
            f"give --max-tokens, at most {max_positions}"
        )
    chosen = min(*named, max_positions) if requested is None else requested
    if not 2 < chosen <= max_positions:
        said = "the checkpoint's files say" if requested is None else "--max-tokens says"
        raise CheckpointError(f"{said} {chosen} tokens, expected 3 to {max_positions}, the positions of {directory}")
    return chosen


def check_texts(directory: Path) -> None:
    """Raise CheckpointError where sentence-transformers' files ask to change a text before it is tokenized.

    That is a default prompt, which would be tokenized together with the text, and Python's lower(), which no normalizer
    of `tokenizers` equals: of a Greek word's last sigma it makes another letter than of the others.
    """
    for file in sorted(directory.glob("sentence_*_config.json")):
        if read_settings(file, dict).get("do_lower_case"):
            raise CheckpointError(
                f"{file} has do_lower_case = true, which is not supported; in a copy, set it to false and let "
                'tokenizer.json do it (a normalizer {"type": "Lowercase"} before the others, where none does)'
            )
    file = directory / "config_sentence_transformers.json"
    settings = read_settings(file, dict)
    name = settings.get("default_prompt_name")
    prompts = settings.get("prompts") or {}
    known = isinstance(prompts, dict) and isinstance(name, str)
    if name is not None and (prompt := prompts.get(name, name) if known else name):
        raise CheckpointError(
            f"{file} has default_prompt_name = {name!r}, to put {prompt!r} before every text; supported is none: if "
            "your heads were trained without it, set default_prompt_name to null in a copy"
        )


def read_settings(file: Path, kind: type[T]) -> T:
    """The JSON in `file`, empty where there is none; CheckpointError where it cannot be read, or is no `kind`."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return kind()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is no JSON: {error}") from error
    if not isinstance(content, kind):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, expected a {kind.__name__}")
    return content


def _pooling_of_modules(directory: Path) -> Pooling | None:
    pooling: Pooling | None = None
    for module in read_settings(directory / "modules.json", list):
        kind = str(module.get("type") if isinstance(module, dict) else module).rpartition(".")[2]
        if kind not in KNOWN_MODULES:
            raise CheckpointError(
                f"{directory}/modules.json has a module {kind!r}, which the graph does not compute; "
                f"supported are {', '.join(KNOWN_MODULES)}"
            )
        if kind == "Pooling":
            pooling = _pooling_of_module(_folder_of(directory, module) / "config.json")
    return pooling


def _folder_of(directory: Path, module: Any) -> Path:
    path = str(module.get("path", "")) if isinstance(module, dict) else ""
    try:
        return directory / RelativeName(path).text if path else directory
    except UnsafeNameError as error:
        raise CheckpointError(f"{directory}/modules.json has a module at {path!r}: {error}") from error


def _pooling_of_module(file: Path) -> Pooling:
    settings = read_settings(file, dict)
    # Two generations of the format: one flag a mode, or a mode by name.
    on = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value is True]
    flags = {key.removeprefix("pooling_mode_").removesuffix("_token").removesuffix("_tokens") for key in on}
    names = flags or {str(settings.get("pooling_mode"))}
    if names == {"cls"}:
        return "cls"
    if names == {"mean"}:
        return "mean"
    raise CheckpointError(f"{file} asks for pooling {', '.join(sorted(names))}; supported are cls and mean")
