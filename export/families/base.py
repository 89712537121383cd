"""What all readers of checkpoints share: the canonical names of an encoder's weights, and checks of config.json.

Every tensor is used or named as unused (jql_export.tensors), and every field of config.json that would change the
arithmetic is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from jql_engine.errors import CheckpointError
from jql_export.tensors import WORD, Array, Linear, Norm, TensorFile, read_json

ADAPTER = "adapter_config.json"  # of the package peft
LARGEST_SIZE = 1 << 24  # of anything in a config; tables as long are computed of it
MOST = 1e30  # of what is computed with in fp32, which ends at 3e38


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One transformer layer, with layer normalization after each residual sum, or before what is added to it."""

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    attention_norm: Norm | None  # None: none before the first layer's attention
    up: Linear
    gate: Linear | None  # down(act(gate(x)) * up(x)); without it: down(act(up(x)))
    down: Linear
    mlp_norm: Norm
    windowed: bool = False  # attends to the spec's window alone, with its frequencies


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
    normalizes_first: bool = False  # layer normalization before attention and MLP, and once more at the end
    window: int | None = None  # the largest distance between tokens that see each other in layers with windows
    window_frequencies: Array | None = None  # [head size / 2], of RoPE in these layers
    activation: Literal["gelu", "silu"] = "gelu"
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
    final_norm: Norm | None = None  # where the spec normalizes first
    adapter: str | None = None  # the LoRA adapter that is merged into the weights


def first_difference(one: EncoderWeights, other: EncoderWeights) -> str | None:
    """The name of a field in which two encoders differ, None where they compute the same."""

    def differ(a: object, b: object) -> bool:
        if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
            return not np.array_equal(np.asarray(a), np.asarray(b))
        if is_dataclass(a) and is_dataclass(b):
            return any(differ(getattr(a, one.name), getattr(b, one.name)) for one in fields(a))
        if isinstance(a, tuple) and isinstance(b, tuple):
            return len(a) != len(b) or any(map(differ, a, b))
        return a != b

    names = [one.name for one in fields(EncoderWeights) if one.name != "unused_tensors"]
    return next((name for name in names if differ(getattr(one, name), getattr(other, name))), None)


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a checkpoint directory; raises CheckpointError where an adapter lies beside it.

    transformers adds that to the weights where the package peft is installed, and ignores it where it is not: neither
    the graph nor the reference would have it.
    """
    if (directory / ADAPTER).exists():
        raise CheckpointError(
            f"{directory} has an adapter ({ADAPTER}), without which its weights are of another model: merge it first, "
            "with peft's merge_and_unload() and save_pretrained(), or remove it in a copy if your heads were trained so"
        )
    return read_json(directory / "config.json")


def spec_of(
    directory: Path,
    config: Mapping[str, Any],
    architecture: str,
    mlp: Literal["geglu", "gelu"],
    max_positions: int,
    inverse_frequencies: Array | None,
) -> EncoderSpec:
    """What config.json says of an encoder, checked; `inverse_frequencies` None stands for absolute positions."""
    n_heads = number(directory, config, "num_attention_heads")
    return EncoderSpec(
        architecture=architecture,
        n_layers=number(directory, config, "num_hidden_layers"),
        hidden_size=head_size(directory, config) * n_heads,
        n_attention_heads=n_heads,
        intermediate_size=number(directory, config, "intermediate_size"),
        positions="absolute" if inverse_frequencies is None else "rope",
        mlp=mlp,
        max_positions=max_positions,
        norm_epsilon=positive(directory, {"layer_norm_eps": 1e-12, **config}, "layer_norm_eps"),
        pad_id=number(directory, config, "pad_token_id"),
        inverse_frequencies=inverse_frequencies,
    )


def head_size(directory: Path, config: Mapping[str, Any]) -> int:
    """Width of an attention head."""
    hidden, heads = (number(directory, config, key) for key in ("hidden_size", "num_attention_heads"))
    if hidden % heads:
        raise CheckpointError(f"{directory}: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    return hidden // heads


def frequencies(theta: float, head_size: int, divisor: float = 1.0) -> Array:
    """theta^(-2i/d) for i < d/2, RoFormer (arXiv:2104.09864) section 3.3; in fp32 as the reference computes it."""
    exponent = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
    found: Array = (1.0 / (theta**exponent) / divisor).numpy()
    return found


def thirds(linear: Linear) -> Iterator[Linear]:
    """Query, key and value of one stacked projection."""
    biases = [None] * 3 if linear.bias is None else np.split(linear.bias, 3)
    return (Linear(*third) for third in zip(np.split(linear.weight, 3), biases, strict=True))


def weights_of(
    tensors: TensorFile,
    spec: EncoderSpec,
    layer: Callable[[int], LayerWeights],
    n_types: int,
    first_position: int | None = None,
    embedding_norm: str | Norm = "embeddings.LayerNorm",
    word: str = WORD,
    final_norm: Callable[[], Norm] | None = None,
) -> EncoderWeights:
    """All weights of an encoder, of which `layer(i)` reads layer i; raises CheckpointError for one that does not fit.

    `n_types`: rows of the token types' table, of which the first is used; `first_position`: the first row that is used
    of the positions' table, None where there is none; `embedding_norm`: its name, or the norm itself; `final_norm`
    reads the one behind the last layer.
    """
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
        word=tensors.table(word, tensors.vocab_size, d),
        token_type=None if types is None else types[0],
        position=position,
        embedding_norm=tensors.norm(embedding_norm, d) if isinstance(embedding_norm, str) else embedding_norm,
        layers=tuple(layer(i) for i in range(spec.n_layers)),
        final_norm=None if final_norm is None else final_norm(),
        unused_tensors=tensors.unused(),
    )


def number(directory: Path, config: Mapping[str, Any], key: str) -> int:
    """A positive integer of config.json; for pad_token_id 0 will do."""
    value = config.get(key)
    least = int(key != "pad_token_id")
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= LARGEST_SIZE:
        raise CheckpointError(
            f"{directory}: config.json has {key} = {value!r}, expected a positive integer up to {LARGEST_SIZE:,}"
        )
    return value


def positive(directory: Path, config: Mapping[str, Any], key: str) -> float:
    """A positive number of config.json."""
    value = config.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < MOST:
        raise CheckpointError(f"{directory}: config.json has {key} = {value!r}, expected a positive number")
    return float(value)


def mapping(directory: Path, config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object of config.json; empty where it is missing or null."""
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{directory}: config.json has {key} = {value!r}, expected an object")
    return value


def expect(directory: Path, config: Mapping[str, Any], key: str, *allowed: object) -> None:
    """Raise CheckpointError where a field of config.json is none of the values whose arithmetic is known."""
    found = config.get(key)
    if found not in allowed:
        names = " or ".join(repr(value) for value in allowed if value is not None) or "no such setting"
        raise CheckpointError(f"{directory}: config.json has {key} = {found!r}; supported is {names}")
