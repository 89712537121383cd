"""jina-embeddings-v3, with one of its adapters merged into the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jql_engine.errors import CheckpointError
from jql_export.families.base import (
    EncoderWeights,
    LayerWeights,
    expect,
    frequencies,
    head_size,
    mapping,
    number,
    positive,
    spec_of,
    thirds,
    weights_of,
)
from jql_export.tensors import Adapter, TensorFile

# The adapter that JQL's embedder asks for; it puts no instruction before the text.
LORA_TASK = "text-matching"


def is_jina_v3(config: Mapping[str, Any]) -> bool:
    """Whether this is the published layout of jina-embeddings-v3, whose config.json says xlm-roberta."""
    return config.get("model_type") == "xlm-roberta" and config.get("position_embedding_type") == "rotary"


def read_jina_v3(directory: Path, config: Mapping[str, Any]) -> EncoderWeights:
    """jina-embeddings-v3 (jinaai/xlm-roberta-flash-implementation): XLM-R with RoPE, and LoRA everywhere."""
    if "lora_adaptations" not in config:
        raise CheckpointError(
            f"{directory}: config.json has position_embedding_type = 'rotary', and no lora_adaptations: of XLM-R with "
            "RoPE jina-embeddings-v3 is known, and nothing else"
        )
    expect(directory, config, "hidden_act", "gelu")
    expect(directory, config, "rotary_emb_interleaved", False, None)
    expect(directory, config, "rotary_emb_scale_base", None)
    expect(directory, config, "rotary_emb_dim", None)
    inverse = frequencies(positive(directory, config, "rotary_emb_base"), head_size(directory, config))
    adapter = _adapter(directory, config)
    tensors = TensorFile(directory, adapter)
    longest = number(directory, config, "max_position_embeddings")  # positions count from 0, other than in XLM-R
    spec = spec_of(directory, config, "jina_embeddings_v3", "gelu", longest, inverse)
    d, f = spec.hidden_size, spec.intermediate_size

    def layer(i: int) -> LayerWeights:
        name = f"encoder.layers.{i}"
        query, key, value = thirds(tensors.linear(f"{name}.mixer.Wqkv", d, 3 * d))
        return LayerWeights(
            query, key, value,
            output=tensors.linear(f"{name}.mixer.out_proj", d, d),
            attention_norm=tensors.norm(f"{name}.norm1", d),
            up=tensors.linear(f"{name}.mlp.fc1", d, f),
            gate=None,
            down=tensors.linear(f"{name}.mlp.fc2", f, d),
            mlp_norm=tensors.norm(f"{name}.norm2", d),
        )  # fmt: skip

    weights = weights_of(tensors, spec, layer, config.get("type_vocab_size", 1), embedding_norm="emb_ln")
    return replace(weights, adapter=adapter.name)


def _adapter(directory: Path, config: Mapping[str, Any]) -> Adapter:
    tasks = config.get("lora_adaptations")
    if not isinstance(tasks, list) or LORA_TASK not in tasks:
        raise CheckpointError(
            f"{directory}: config.json has lora_adaptations = {tasks!r}, expected a list with {LORA_TASK!r}"
        )
    if instruction := mapping(directory, config, "task_instructions").get(LORA_TASK):
        raise CheckpointError(
            f"{directory}: config.json has task_instructions[{LORA_TASK!r}] = {instruction!r}, to be put before every "
            "text; supported is none"
        )
    rank = number(directory, config, "lora_rank")
    return Adapter(
        LORA_TASK, tasks.index(LORA_TASK), len(tasks), rank, positive(directory, config, "lora_alpha") / rank
    )
