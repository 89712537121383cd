"""BERT and XLM-R: multilingual e5 and its kin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jql_export.families.base import EncoderWeights, LayerWeights, expect, number, spec_of, weights_of
from jql_export.tensors import TensorFile

# What transformers takes where config.json says nothing, as some do.
DEFAULTS: dict[str, dict[str, Any]] = {
    "bert": {"hidden_act": "gelu", "pad_token_id": 0, "type_vocab_size": 2},
    "xlm-roberta": {"hidden_act": "gelu", "pad_token_id": 1, "type_vocab_size": 2},
}


def read_bert(directory: Path, config: Mapping[str, Any]) -> EncoderWeights:
    """BERT and XLM-R: absolute positions, plain GELU."""
    config = {**DEFAULTS[config["model_type"]], **config}
    expect(directory, config, "hidden_act", "gelu")
    expect(directory, config, "position_embedding_type", "absolute", None)
    expect(directory, config, "is_decoder", False, None)
    for key in ("rope_theta", "rope_parameters", "rope_scaling"):  # of repositories whose own code rotates
        expect(directory, config, key, None)
    tensors = TensorFile(directory)
    rows = number(directory, config, "max_position_embeddings")
    # XLM-R numbers positions from pad + 1: 514 rows are 512 tokens. The row of pad itself serves pad ids.
    counts_from_pad = config["model_type"] == "xlm-roberta"
    first = number(directory, config, "pad_token_id") if counts_from_pad else 0
    spec = spec_of(directory, config, config["model_type"], "gelu", rows - first - counts_from_pad, None)
    spec = replace(spec, counts_from_pad=counts_from_pad)
    d, f = spec.hidden_size, spec.intermediate_size

    def layer(i: int) -> LayerWeights:
        name = f"encoder.layer.{i}"
        return LayerWeights(
            query=tensors.linear(f"{name}.attention.self.query", d, d),
            key=tensors.linear(f"{name}.attention.self.key", d, d),
            value=tensors.linear(f"{name}.attention.self.value", d, d),
            output=tensors.linear(f"{name}.attention.output.dense", d, d),
            attention_norm=tensors.norm(f"{name}.attention.output.LayerNorm", d),
            up=tensors.linear(f"{name}.intermediate.dense", d, f),
            gate=None,
            down=tensors.linear(f"{name}.output.dense", f, d),
            mlp_norm=tensors.norm(f"{name}.output.LayerNorm", d),
        )

    return weights_of(tensors, spec, layer, config["type_vocab_size"], first_position=first)
