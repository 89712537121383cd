"""Hugging Face directory or hub id -> EncoderWeights, in one canonical naming.

One reader for each layout in which encoders are published. Every tensor is used or named as unused (tensors.py), and
every field of config.json that would change the arithmetic is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from jql_engine.errors import CheckpointError
from jql_export.tensors import WORD, Adapter, Array, Linear, Norm, TensorFile, read_json

# What a snapshot from the hub needs; other formats of the same weights would only be downloaded for nothing.
HUB_PATTERNS = ["*.json", "*/config.json", "model*.safetensors", "pytorch_model.bin"]
# The adapter of jina-embeddings-v3 that JQL's embedder asks for; it puts no instruction before the text.
LORA_TASK = "text-matching"
LARGEST_SIZE = 1 << 24  # of anything in a config; tables as long are computed of it
MOST = 1e30  # of what is computed with in fp32, which ends at 3e38


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One transformer layer with LayerNorm after each residual sum."""

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    attention_norm: Norm
    up: Linear
    gate: Linear | None  # geglu: down(gelu(gate(x)) * up(x)); without it: down(gelu(up(x)))
    down: Linear
    mlp_norm: Norm


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """The shape of an encoder; every supported family is one of these."""

    architecture: str
    n_layers: int
    hidden_size: int
    n_attention_heads: int
    intermediate_size: int
    positions: Literal["rope", "absolute"]
    mlp: Literal["geglu", "gelu"]
    max_positions: int  # longest input in tokens
    norm_epsilon: float
    pad_id: int
    inverse_frequencies: Array | None  # [head size / 2] where positions is rope
    counts_from_pad: bool = False  # XLM-R: a pad id, a literal "<pad>" too, has position row 0 and is not counted

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.n_attention_heads


@dataclass(frozen=True, slots=True)
class EncoderWeights:
    """All weights of an encoder, fp32."""

    spec: EncoderSpec
    word: Array  # [V, D]
    token_type: Array | None  # [D], the row of type 0
    position: Array | None  # [max_positions, D] where positions is absolute; one row more where counts_from_pad
    embedding_norm: Norm
    layers: tuple[LayerWeights, ...]
    unused_tensors: tuple[str, ...]
    adapter: str | None = None  # the LoRA adapter that is merged into the weights


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a checkpoint directory."""
    return read_json(directory / "config.json")


def read_encoder(directory: Path) -> EncoderWeights:
    """Read the encoder in `directory`; raises CheckpointError naming the field or tensor that is wrong."""
    config = read_config(directory)
    family = config.get("model_type")
    if is_jina_v3(config):
        return _read_jina_v3(directory, config)
    if not isinstance(family, str) or family not in FAMILIES:
        raise CheckpointError(
            f"{directory}: model_type {family!r} is not supported; known are {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[family](directory, config)


def is_jina_v3(config: Mapping[str, Any]) -> bool:
    """Whether this is the published layout of jina-embeddings-v3, whose config.json says xlm-roberta."""
    return config.get("model_type") == "xlm-roberta" and config.get("position_embedding_type") == "rotary"


def _read_gte(directory: Path, config: Mapping[str, Any]) -> EncoderWeights:
    """GTE and Snowflake arctic-embed v2: RoPE, gated GELU, published key layout.

    `gte` is transformers' own class; `new` is the repository's code (Alibaba-NLP/new-impl), which knows one more RoPE
    type: gte-multilingual-base has it.
    """
    _expect(directory, config, "hidden_act", "gelu")
    _expect(directory, config, "layer_norm_type", "layer_norm", None)
    _expect(directory, config, "position_embedding_type", "rope", None)
    _expect(directory, config, "logn_attention_scale", False, None)
    _expect(directory, config, "pack_qkv", True, None)
    types = ("default", "ntk") if config["model_type"] == "new" else ("default",)
    frequencies = _scaled_frequencies(directory, config, types)
    tensors = TensorFile(directory)
    longest = _number(directory, config, "max_position_embeddings")
    spec = _spec(directory, config, "gte", "geglu", longest, frequencies)
    d, f = spec.hidden_size, spec.intermediate_size

    def layer(i: int) -> LayerWeights:
        name = f"encoder.layer.{i}"
        query, key, value = _thirds(tensors.linear(f"{name}.attention.qkv_proj", d, 3 * d))
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

    return _finish(tensors, spec, layer, config.get("type_vocab_size", 1))


def _read_jina_v3(directory: Path, config: Mapping[str, Any]) -> EncoderWeights:
    """jina-embeddings-v3 (jinaai/xlm-roberta-flash-implementation): XLM-R with RoPE, and LoRA everywhere."""
    _expect(directory, config, "hidden_act", "gelu")
    _expect(directory, config, "rotary_emb_interleaved", False, None)
    _expect(directory, config, "rotary_emb_scale_base", None)
    _expect(directory, config, "rotary_emb_dim", None)
    frequencies = _frequencies(_positive(directory, config, "rotary_emb_base"), _head_size(directory, config))
    adapter = _adapter(directory, config)
    tensors = TensorFile(directory, adapter)
    longest = _number(directory, config, "max_position_embeddings")  # positions count from 0, other than in XLM-R
    spec = _spec(directory, config, "jina_embeddings_v3", "gelu", longest, frequencies)
    d, f = spec.hidden_size, spec.intermediate_size

    def layer(i: int) -> LayerWeights:
        name = f"encoder.layers.{i}"
        query, key, value = _thirds(tensors.linear(f"{name}.mixer.Wqkv", d, 3 * d))
        return LayerWeights(
            query, key, value,
            output=tensors.linear(f"{name}.mixer.out_proj", d, d),
            attention_norm=tensors.norm(f"{name}.norm1", d),
            up=tensors.linear(f"{name}.mlp.fc1", d, f),
            gate=None,
            down=tensors.linear(f"{name}.mlp.fc2", f, d),
            mlp_norm=tensors.norm(f"{name}.norm2", d),
        )  # fmt: skip

    weights = _finish(tensors, spec, layer, config.get("type_vocab_size", 1), embedding_norm="emb_ln")
    return replace(weights, adapter=adapter.name)


def _adapter(directory: Path, config: Mapping[str, Any]) -> Adapter:
    tasks = config.get("lora_adaptations")
    if not isinstance(tasks, list) or LORA_TASK not in tasks:
        raise CheckpointError(
            f"{directory}: config.json has lora_adaptations = {tasks!r}, expected a list with {LORA_TASK!r}"
        )
    if instruction := _object(directory, config, "task_instructions").get(LORA_TASK):
        raise CheckpointError(
            f"{directory}: config.json has task_instructions[{LORA_TASK!r}] = {instruction!r}, to be put before every "
            "text; supported is none"
        )
    rank = _number(directory, config, "lora_rank")
    return Adapter(
        LORA_TASK, tasks.index(LORA_TASK), len(tasks), rank, _positive(directory, config, "lora_alpha") / rank
    )


def _read_bert(directory: Path, config: Mapping[str, Any]) -> EncoderWeights:
    """BERT and XLM-R: absolute positions, plain GELU."""
    _expect(directory, config, "hidden_act", "gelu")
    _expect(directory, config, "position_embedding_type", "absolute", None)
    _expect(directory, config, "is_decoder", False, None)
    tensors = TensorFile(directory)
    rows = _number(directory, config, "max_position_embeddings")
    # XLM-R numbers positions from pad + 1: 514 rows are 512 tokens. The row of pad itself serves pad ids.
    counts_from_pad = config["model_type"] == "xlm-roberta"
    first = _number(directory, config, "pad_token_id") if counts_from_pad else 0
    spec = _spec(directory, config, config["model_type"], "gelu", rows - first - counts_from_pad, None)
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

    return _finish(tensors, spec, layer, config.get("type_vocab_size", 0), first_position=first)


FAMILIES: dict[str, Callable[[Path, Mapping[str, Any]], EncoderWeights]] = {
    "bert": _read_bert,
    "gte": _read_gte,
    "new": _read_gte,
    "xlm-roberta": _read_bert,
}


def _spec(
    directory: Path,
    config: Mapping[str, Any],
    architecture: str,
    mlp: Literal["geglu", "gelu"],
    max_positions: int,
    frequencies: Array | None,
) -> EncoderSpec:
    n_heads = _number(directory, config, "num_attention_heads")
    return EncoderSpec(
        architecture=architecture,
        n_layers=_number(directory, config, "num_hidden_layers"),
        hidden_size=_head_size(directory, config) * n_heads,
        n_attention_heads=n_heads,
        intermediate_size=_number(directory, config, "intermediate_size"),
        positions="absolute" if frequencies is None else "rope",
        mlp=mlp,
        max_positions=max_positions,
        norm_epsilon=_positive(directory, {"layer_norm_eps": 1e-12, **config}, "layer_norm_eps"),
        pad_id=_number(directory, config, "pad_token_id"),
        inverse_frequencies=frequencies,
    )


def _head_size(directory: Path, config: Mapping[str, Any]) -> int:
    hidden, heads = (_number(directory, config, key) for key in ("hidden_size", "num_attention_heads"))
    if hidden % heads:
        raise CheckpointError(f"{directory}: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    return hidden // heads


def _scaled_frequencies(directory: Path, config: Mapping[str, Any], types: tuple[str, ...]) -> Array:
    """Frequencies of a config with RoPE parameters.

    Type `ntk` is fixed NTK scaling (https://kexue.fm/archives/9706, equation 6): base times factor, all frequencies
    divided by factor^(2/d). Alibaba-NLP/new-impl applies it at every length, short texts too.
    """
    scaling = _object(directory, config, "rope_scaling")
    rope = _object(directory, config, "rope_parameters") or {"rope_theta": config.get("rope_theta"), **scaling}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in types or not rope.get("rope_theta"):
        raise CheckpointError(
            f"{directory}: config.json has RoPE type {kind!r} with theta {rope.get('rope_theta')}; "
            f"supported is the type {' or '.join(map(repr, types))} with a theta"
        )
    theta, head_size = _positive(directory, rope, "rope_theta"), _head_size(directory, config)
    if kind == "default":
        return _frequencies(theta, head_size)
    _expect(directory, rope, "mixed_b", None)
    factor = _positive(directory, rope, "factor")
    if factor < 1:  # below, the original code silently leaves the scaling out
        raise CheckpointError(f"{directory}: config.json has RoPE factor {factor}, expected 1 or more")
    return _frequencies(theta * factor, head_size, factor ** (2 / head_size))


def _frequencies(theta: float, head_size: int, divisor: float = 1.0) -> Array:
    """theta^(-2i/d) for i < d/2, RoFormer (arXiv:2104.09864) section 3.3; in fp32 as the reference computes it."""
    exponent = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
    frequencies: Array = (1.0 / (theta**exponent) / divisor).numpy()
    return frequencies


def _thirds(linear: Linear) -> Iterator[Linear]:
    """Query, key and value of one stacked projection."""
    assert linear.bias is not None
    return (Linear(*third) for third in zip(np.split(linear.weight, 3), np.split(linear.bias, 3), strict=True))


def _finish(
    tensors: TensorFile,
    spec: EncoderSpec,
    layer: Callable[[int], LayerWeights],
    n_types: int,
    first_position: int | None = None,
    embedding_norm: str = "embeddings.LayerNorm",
) -> EncoderWeights:
    d = spec.hidden_size
    if spec.pad_id >= tensors.vocab_size:
        raise CheckpointError(
            f"{tensors.path}: config.json has pad_token_id = {spec.pad_id}, the vocabulary has {tensors.vocab_size} ids"
        )
    types = tensors.table("embeddings.token_type_embeddings", n_types, d) if n_types else None
    position = None
    if first_position is not None:
        rows = first_position + spec.counts_from_pad + spec.max_positions
        position = tensors.table("embeddings.position_embeddings", rows, d)[first_position:]
    return EncoderWeights(
        spec,
        word=tensors.table(WORD, tensors.vocab_size, d),
        token_type=None if types is None else types[0],
        position=position,
        embedding_norm=tensors.norm(embedding_norm, d),
        layers=tuple(layer(i) for i in range(spec.n_layers)),
        unused_tensors=tensors.unused(),
    )


def _number(directory: Path, config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    least = int(key != "pad_token_id")
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= LARGEST_SIZE:
        raise CheckpointError(
            f"{directory}: config.json has {key} = {value!r}, expected a positive integer up to {LARGEST_SIZE:,}"
        )
    return value


def _positive(directory: Path, config: Mapping[str, Any], key: str) -> float:
    value = config.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < MOST:
        raise CheckpointError(f"{directory}: config.json has {key} = {value!r}, expected a positive number")
    return float(value)


def _object(directory: Path, config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{directory}: config.json has {key} = {value!r}, expected an object")
    return value


def _expect(directory: Path, config: Mapping[str, Any], key: str, *allowed: object) -> None:
    found = config.get(key)
    if found not in allowed:
        names = " or ".join(repr(value) for value in allowed if value is not None) or "no such setting"
        raise CheckpointError(f"{directory}: config.json has {key} = {found!r}; supported is {names}")
