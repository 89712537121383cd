"""GTE, Snowflake arctic-embed v2, gte-multilingual-base."""

from __future__ import annotations

from collections.abc import Mapping
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
from jql_export.tensors import Array, Linear, TensorFile


def read_gte(directory: Path, config: Mapping[str, Any]) -> EncoderWeights:
    """GTE and Snowflake arctic-embed v2: RoPE, gated GELU, published key layout.

    `gte` is transformers' own class; `new` is the repository's code (Alibaba-NLP/new-impl), which knows one more RoPE
    type: gte-multilingual-base has it.
    """
    expect(directory, config, "hidden_act", "gelu")
    expect(directory, config, "layer_norm_type", "layer_norm", None)
    expect(directory, config, "position_embedding_type", "rope", None)
    expect(directory, config, "logn_attention_scale", False, None)
    expect(directory, config, "pack_qkv", True, None)
    types = ("default", "ntk") if config["model_type"] == "new" else ("default",)
    inverse = _scaled_frequencies(directory, config, types)
    tensors = TensorFile(directory)
    longest = number(directory, config, "max_position_embeddings")
    spec = spec_of(directory, config, "gte", "geglu", longest, inverse)
    d, f = spec.hidden_size, spec.intermediate_size

    def layer(i: int) -> LayerWeights:
        name = f"encoder.layer.{i}"
        query, key, value = thirds(tensors.linear(f"{name}.attention.qkv_proj", d, 3 * d))
        up_gate = tensors.take(f"{name}.mlp.up_gate_proj.weight", (2 * f, d))
        return LayerWeights(
            query, key, value,
            output=tensors.linear(f"{name}.attention.o_proj", d, d),
            attention_norm=tensors.norm(f"{name}.attn_ln", d),
            up=Linear(up_gate[:f], None),
            gate=Linear(up_gate[f:], None),
            down=tensors.linear(f"{name}.mlp.down_proj", f, d),
            mlp_norm=tensors.norm(f"{name}.mlp_ln", d),
        )  # fmt: skip

    return weights_of(tensors, spec, layer, config.get("type_vocab_size", 1))


def _scaled_frequencies(directory: Path, config: Mapping[str, Any], types: tuple[str, ...]) -> Array:
    """Frequencies of a config with RoPE parameters.

    Type `ntk` is fixed NTK scaling (https://kexue.fm/archives/9706, equation 6): base times factor, all frequencies
    divided by factor^(2/d). Alibaba-NLP/new-impl applies it at every length, short texts too.
    """
    scaling = mapping(directory, config, "rope_scaling")
    rope = mapping(directory, config, "rope_parameters")
    if rope and scaling:
        raise CheckpointError(
            f"{directory}: config.json has rope_scaling = {scaling!r} beside rope_parameters; expected is "
            "one of them: in a copy, remove that with which the model was not trained"
        )
    rope = rope or {"rope_theta": config.get("rope_theta"), **scaling}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in types or not rope.get("rope_theta"):
        raise CheckpointError(
            f"{directory}: config.json has RoPE type {kind!r} with theta {rope.get('rope_theta')}; "
            f"supported is the type {' or '.join(map(repr, types))} with a theta"
        )
    theta, width = positive(directory, rope, "rope_theta"), head_size(directory, config)
    if kind == "default":
        return frequencies(theta, width)
    expect(directory, rope, "mixed_b", None)
    factor = positive(directory, rope, "factor")
    if factor < 1:  # below, the original code silently leaves the scaling out
        raise CheckpointError(f"{directory}: config.json has RoPE factor {factor}, expected 1 or more")
    return frequencies(theta * factor, width, factor ** (2 / width))
