"""Hugging Face directory or hub id -> EncoderWeights, in one canonical naming.

Checkpoints are read as tensors and a config, never as code. Every tensor is used or named as unused, and a tensor that
belongs to the encoder but fits nowhere is an error: a layer can neither stay random nor be dropped unseen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from jql_engine.errors import CheckpointError

Array = NDArray[np.float32]
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
# What a snapshot from the hub needs; other formats of the same weights would only be downloaded for nothing.
HUB_PATTERNS = ["*.json", "*/config.json", "model*.safetensors", "pytorch_model.bin"]


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x weight^T + bias."""

    weight: Array  # [out, in]
    bias: Array | None  # [out]


@dataclass(frozen=True, slots=True)
class Norm:
    """Layer normalisation."""

    weight: Array  # [D]
    bias: Array  # [D]


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


class TensorFile:
    """The tensors of a checkpoint, by canonical name, each to be taken once."""

    def __init__(self, directory: Path) -> None:
        """Open model.safetensors, its sharded form, or pytorch_model.bin (weights only); raises CheckpointError."""
        self.path = directory
        self._tensors = _open_tensors(directory)
        prefixes = [n.removesuffix(_WORD) for n in self._tensors if n.endswith(_WORD)]
        if len(prefixes) != 1:
            raise CheckpointError(
                f"{directory}: expected one tensor named {_WORD}, after any prefix, found {len(prefixes)}; "
                f"the checkpoint holds {_some(self._tensors)}"
            )
        self.prefix = prefixes[0]
        self._left = set(self._tensors)

    def take(self, name: str, shape: tuple[int, ...]) -> Array:
        """The tensor `name` in fp32; raises CheckpointError where it is missing or of another shape."""
        full = self.prefix + name
        if full not in self._tensors:
            raise CheckpointError(f"{self.path}: tensor {full} is missing; the checkpoint holds {_some(self._tensors)}")
        tensor = self._tensors[full]()
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{self.path}: tensor {full} is {list(tensor.shape)}, config.json says {list(shape)}")
        self._left.discard(full)
        array: Array = tensor.to(torch.float32).numpy()
        return array

    def take_rows(self, name: str, width: int) -> Array:
        """A table [any number of rows, width]."""
        full = self.prefix + name
        return self.take(name, (len(self._tensors[full]()) if full in self._tensors else 0, width))

    def linear(self, name: str, n_in: int, n_out: int, bias: bool = True) -> Linear:
        """`name`.weight [n_out, n_in] and `name`.bias [n_out]."""
        weight = self.take(f"{name}.weight", (n_out, n_in))
        return Linear(weight, self.take(f"{name}.bias", (n_out,)) if bias else None)

    def norm(self, name: str, size: int) -> Norm:
        """`name`.weight and `name`.bias, both [size]."""
        return Norm(self.take(f"{name}.weight", (size,)), self.take(f"{name}.bias", (size,)))

    def unused(self) -> tuple[str, ...]:
        """Names never taken; raises CheckpointError where one of them belongs to the encoder."""
        part_of_encoder = re.compile(rf"{re.escape(self.prefix)}(embeddings|encoder)\.(?!position_ids$)")
        if lost := sorted(filter(part_of_encoder.match, self._left)):
            raise CheckpointError(
                f"{self.path}: {len(lost)} tensors of the encoder have no place in the model that config.json "
                f"describes: {_some(lost)}"
            )
        return tuple(sorted(self._left))


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a checkpoint directory."""
    return _read_json(directory / "config.json")


def read_encoder(directory: Path) -> EncoderWeights:
    """Read the encoder in `directory`; raises CheckpointError naming the field or tensor that is wrong."""
    config = read_config(directory)
    family = config.get("model_type")
    if family not in FAMILIES:
        raise CheckpointError(
            f"{directory}: model_type {family!r} is not supported; known are {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[family](directory, config)


def _read_gte(directory: Path, config: Mapping[str, Any]) -> EncoderWeights:
    """GTE and Snowflake arctic-embed v2: RoPE, gated GELU, published key layout."""
    _expect(directory, config, "hidden_act", "gelu")
    _expect(directory, config, "layer_norm_type", "layer_norm", None)
    _expect(directory, config, "position_embedding_type", "rope", None)
    _expect(directory, config, "logn_attention_scale", False, None)
    tensors = TensorFile(directory)
    spec = _spec(directory, config, "rope", "geglu", _number(directory, config, "max_position_embeddings"))
    d, f = spec.hidden_size, spec.intermediate_size

    def layer(i: int) -> LayerWeights:
        name = f"encoder.layer.{i}"
        qkv = tensors.linear(f"{name}.attention.qkv_proj", d, 3 * d)
        assert qkv.bias is not None
        query, key, value = (Linear(qkv.weight[j : j + d], qkv.bias[j : j + d]) for j in (0, d, 2 * d))
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

    return _finish(tensors, spec, layer, config.get("type_vocab_size", 1), first_position=None)


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
    spec = _spec(directory, config, "absolute", "gelu", rows - first - counts_from_pad)
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
    "xlm-roberta": _read_bert,
}


def _spec(
    directory: Path,
    config: Mapping[str, Any],
    positions: Literal["rope", "absolute"],
    mlp: Literal["geglu", "gelu"],
    max_positions: int,
) -> EncoderSpec:
    hidden, heads = (_number(directory, config, key) for key in ("hidden_size", "num_attention_heads"))
    if hidden % heads:
        raise CheckpointError(f"{directory}: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    return EncoderSpec(
        architecture=config["model_type"],
        n_layers=_number(directory, config, "num_hidden_layers"),
        hidden_size=hidden,
        n_attention_heads=heads,
        intermediate_size=_number(directory, config, "intermediate_size"),
        positions=positions,
        mlp=mlp,
        max_positions=max_positions,
        norm_epsilon=float(config.get("layer_norm_eps", 1e-12)),
        pad_id=_number(directory, config, "pad_token_id"),
        inverse_frequencies=_inverse_frequencies(directory, config, hidden // heads) if positions == "rope" else None,
    )


def _inverse_frequencies(directory: Path, config: Mapping[str, Any], head_size: int) -> Array:
    """theta^(-2i/d) for i < d/2, RoFormer (arXiv:2104.09864) section 3.3; in fp32 as the reference computes it."""
    rope = config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta"),
        **(config.get("rope_scaling") or {}),
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or not rope.get("rope_theta"):
        raise CheckpointError(
            f"{directory}: config.json has RoPE type {kind!r} with theta {rope.get('rope_theta')}; "
            "supported is the type 'default' with a theta"
        )
    exponent = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
    frequencies: Array = (1.0 / (float(rope["rope_theta"]) ** exponent)).numpy()
    return frequencies


def _finish(
    tensors: TensorFile,
    spec: EncoderSpec,
    layer: Callable[[int], LayerWeights],
    n_types: int,
    first_position: int | None,
) -> EncoderWeights:
    d = spec.hidden_size
    types = tensors.take("embeddings.token_type_embeddings.weight", (n_types, d)) if n_types else None
    position = None
    if first_position is not None:
        rows = first_position + spec.counts_from_pad + spec.max_positions
        position = tensors.take("embeddings.position_embeddings.weight", (rows, d))[first_position:]
    return EncoderWeights(
        spec,
        word=tensors.take_rows(_WORD, d),
        token_type=None if types is None else types[0],
        position=position,
        embedding_norm=tensors.norm("embeddings.LayerNorm", d),
        layers=tuple(layer(i) for i in range(spec.n_layers)),
        unused_tensors=tensors.unused(),
    )


_WORD = "embeddings.word_embeddings.weight"


def _open_tensors(directory: Path) -> dict[str, Callable[[], torch.Tensor]]:
    for name in WEIGHT_FILES:
        file = directory / name
        if not file.is_file():
            continue
        try:
            if name.endswith(".bin"):
                state = torch.load(file, map_location="cpu", weights_only=True)
                return {key: partial(_same, tensor) for key, tensor in state.items()}
            shards = {name}
            if name.endswith(".index.json"):
                shards = set(_read_json(file)["weight_map"].values())
            return {key: get for shard in sorted(shards) for key, get in _open_shard(directory / shard).items()}
        except Exception as error:  # safetensors, pickle and torch each have their own
            raise CheckpointError(f"{file} cannot be read: {error}") from error
    raise CheckpointError(f"{directory} holds no weights: expected one of {', '.join(WEIGHT_FILES)}")


def _open_shard(file: Path) -> dict[str, Callable[[], torch.Tensor]]:
    shard: Any = safe_open(file, framework="pt")  # untyped; reads a tensor when asked for it
    return {key: partial(shard.get_tensor, key) for key in shard.keys()}  # noqa: SIM118 (no mapping)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, expected an object")
    return content


def _number(directory: Path, config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < (key != "pad_token_id"):
        raise CheckpointError(f"{directory}: config.json has {key} = {value!r}, expected a positive integer")
    return value


def _expect(directory: Path, config: Mapping[str, Any], key: str, *allowed: object) -> None:
    found = config.get(key)
    if found not in allowed:
        names = " or ".join(repr(value) for value in allowed if value is not None)
        raise CheckpointError(f"{directory}: config.json has {key} = {found!r}; supported is {names}")


def _some(names: Any, limit: int = 5) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more
