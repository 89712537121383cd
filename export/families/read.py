"""Hugging Face directory -> EncoderWeights: one reader for each layout in which encoders are published."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jql_engine.errors import CheckpointError
from jql_export.families.base import EncoderWeights, expect, read_config
from jql_export.families.bert import read_bert
from jql_export.families.gte import read_gte
from jql_export.families.jina_v3 import is_jina_v3, read_jina_v3
from jql_export.families.modernbert import read_modernbert

FAMILIES: dict[str, Callable[[Path, Mapping[str, Any]], EncoderWeights]] = {
    "bert": read_bert,
    "gte": read_gte,
    "modernbert": read_modernbert,
    "new": read_gte,
    "xlm-roberta": read_bert,
}


def read_encoder(directory: Path) -> EncoderWeights:
    """Read the encoder in `directory`; raises CheckpointError naming the field or tensor that is wrong."""
    config = read_config(directory)
    expect(directory, config, "quantization_config", None)  # its integers are no weights without their scales
    family = config.get("model_type")
    if is_jina_v3(config):
        return read_jina_v3(directory, config)
    if not isinstance(family, str) or family not in FAMILIES:
        raise CheckpointError(
            f"{directory}: model_type {family!r} is not supported; known are {', '.join(sorted(FAMILIES))}"
        )
    try:
        weights = FAMILIES[family](directory, config)
    except CheckpointError as error:
        if not config.get("auto_map"):
            raise
        raise CheckpointError(
            f"{error}; config.json names code of the repository's own (auto_map), which is never run: known are "
            f"{', '.join(sorted(FAMILIES))} in transformers' layouts, and Jina v3's"
        ) from error
    if (said := config.get("vocab_size", len(weights.word))) != len(weights.word):
        raise CheckpointError(
            f"{directory}: config.json has vocab_size = {said!r}, the table of the words has {len(weights.word)} rows"
        )
    return weights
