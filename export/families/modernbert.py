"""ModernBERT (arXiv:2412.13663) and its kin: mmBERT, Granite embedding R2, gte-modernbert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

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
from jql_export.tensors import Array, Linear, Norm, TensorFile

WORD = "embeddings.tok_embeddings"
ROOTS = ("embeddings", "layers", "final_norm")
KINDS = ("full_attention", "sliding_attention")
THETAS = {"full_attention": ("global_rope_theta", 160_000.0), "sliding_attention": ("local_rope_theta", 10_000.0)}
EVERY = 3  # layers, of which the first attends to the whole document
WINDOW = 128  # tokens, half of them on either side


def read_modernbert(directory: Path, config: Mapping[str, Any]) -> EncoderWeights:
    """RoPE of two bases, normalization before attention and MLP, gated MLP, two layers of three with windows."""
    activation = config.get("hidden_activation", "gelu")
    expect(directory, {"hidden_activation": activation}, "hidden_activation", "gelu", "silu")
    expect(directory, config, "rope_scaling", None)
    kinds = _kinds(directory, config)
    width = head_size(directory, config)
    inverse = {kind: _frequencies(directory, config, kind, width) for kind in KINDS}
    window = number(directory, {"local_attention": WINDOW, **config}, "local_attention") // 2
    if not window:
        raise CheckpointError(f"{directory}: config.json has local_attention = 1, expected 2 or more")
    longest = number(directory, config, "max_position_embeddings")
    known = {**config, "layer_norm_eps": config.get("norm_eps", 1e-5)}
    tensors = TensorFile(directory, word=WORD, roots=ROOTS)
    spec = replace(
        spec_of(directory, known, "modernbert", "geglu", longest, inverse["full_attention"]),
        normalizes_first=True,
        activation=activation,
        window=window if "sliding_attention" in kinds else None,
        window_frequencies=inverse["sliding_attention"] if "sliding_attention" in kinds else None,
    )
    d, f = spec.hidden_size, spec.intermediate_size

    def linear(name: str, n_in: int, n_out: int, flag: str) -> Linear:
        weight = tensors.take(f"{name}.weight", (n_out, n_in))
        return Linear(weight, tensors.take(f"{name}.bias", (n_out,)) if config.get(flag, False) else None)

    def norm(name: str) -> Norm:
        bias = tensors.take(f"{name}.bias", (d,)) if config.get("norm_bias", False) else np.zeros(d, np.float32)
        return Norm(tensors.take(f"{name}.weight", (d,)), bias)

    def layer(i: int) -> LayerWeights:
        name = f"layers.{i}"
        query, key, value = thirds(linear(f"{name}.attn.Wqkv", d, 3 * d, "attention_bias"))
        wide = linear(f"{name}.mlp.Wi", d, 2 * f, "mlp_bias")
        # The first half is activated; GTE activates the second.
        gate, up = (Linear(wide.weight[rows], None if wide.bias is None else wide.bias[rows]) for rows in _halves(f))
        return LayerWeights(
            query, key, value,
            output=linear(f"{name}.attn.Wo", d, d, "attention_bias"),
            attention_norm=None if i == 0 else norm(f"{name}.attn_norm"),
            up=up,
            gate=gate,
            down=linear(f"{name}.mlp.Wo", f, d, "mlp_bias"),
            mlp_norm=norm(f"{name}.mlp_norm"),
            windowed=kinds[i] == "sliding_attention",
        )  # fmt: skip

    first = norm("embeddings.norm")
    return weights_of(tensors, spec, layer, 0, embedding_norm=first, word=WORD, final_norm=lambda: norm("final_norm"))


def _halves(n: int) -> tuple[slice, slice]:
    return slice(0, n), slice(n, 2 * n)


def _kinds(directory: Path, config: Mapping[str, Any]) -> list[str]:
    """What each layer attends to; `layer_types` wins over `global_attn_every_n_layers`, as in transformers."""
    n_layers = number(directory, config, "num_hidden_layers")
    kinds = config.get("layer_types")
    if kinds is None:
        every = number(directory, {"global_attn_every_n_layers": EVERY, **config}, "global_attn_every_n_layers")
        return [KINDS[int(i % every > 0)] for i in range(n_layers)]
    if not isinstance(kinds, list) or len(kinds) != n_layers or any(kind not in KINDS for kind in kinds):
        raise CheckpointError(
            f"{directory}: config.json has layer_types = {kinds!r}, expected {n_layers} of {' and '.join(KINDS)}"
        )
    return kinds


def _frequencies(directory: Path, config: Mapping[str, Any], kind: str, width: int) -> Array:
    rope = mapping(directory, mapping(directory, config, "rope_parameters"), kind)
    expect(directory, rope, "rope_type", "default", None)
    key, default = THETAS[kind]
    theta = rope.get("rope_theta", config.get(key, default))
    return frequencies(positive(directory, {key: theta}, key), width)
