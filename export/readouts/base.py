"""What follows the encoder, as weights: every published head is read as a Readout."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save

from jql_engine.bundle import Activation, LayerInfo, Pooling, ReadoutInfo
from jql_engine.errors import HeadError
from jql_export.tensors import Array, Linear, Norm, not_plain

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of a readout: a part of columns and tensors


@dataclass(frozen=True, slots=True)
class Layer:
    """norm(activation(x weight^T + bias)), as far as there are an activation and a norm."""

    linear: Linear
    activation: Activation | None = None
    norm: Norm | None = None
    norm_epsilon: float | None = None  # where there is a norm

    def __post_init__(self) -> None:
        assert (self.norm is None) == (self.norm_epsilon is None)


@dataclass(frozen=True, slots=True)
class Readout:
    """Pooling, and layers that turn the pooled vector [D] into scores."""

    name: str
    kind: str  # "jql-head", ...
    layers: tuple[Layer, ...]
    sha256: str  # of the checkpoint
    outputs: tuple[str, ...]  # score_<output> is the column
    pooling: Pooling | None = None  # None: that of the embedding
    normalize: bool = True  # divide the pooled vector by its L2 norm
    source: str | None = None  # repository and file on the hub
    revision: str | None = None  # commit there
    checkpoint: Path | None = None  # of a classifier, whose own class computes the reference
    tensors: tuple[str, ...] = ()  # that were taken from it

    def __post_init__(self) -> None:
        widths = [self.input_size, *(len(layer.linear.weight) for layer in self.layers)]
        inputs = [layer.linear.weight.shape[1] for layer in self.layers]
        assert inputs == widths[:-1] and widths[-1] == len(self.outputs), "layers do not fit each other"

    @property
    def input_size(self) -> int:
        """Width of the vectors that it reads."""
        return int(self.layers[0].linear.weight.shape[1])

    def info(self, pooling: Pooling) -> ReadoutInfo:
        """Its entry in the manifest of a bundle whose embedding has this `pooling`."""
        return ReadoutInfo(
            name=self.name,
            kind=self.kind,
            pooling=self.pooling or pooling,
            normalize=self.normalize,
            layers=[
                LayerInfo(layer.linear.bias is not None, layer.activation, layer.norm_epsilon) for layer in self.layers
            ],
            outputs=list(self.outputs),
            sha256=self.sha256,
            source=self.source,
            revision=self.revision,
        )


def to_fp32(where: str, key: str, tensor: torch.Tensor) -> Array:
    """A weight as an array; raises HeadError, begun with `where`, for what holds no finite floating-point numbers."""
    if wrong := not_plain(tensor):
        raise HeadError(f"{where}: {key} is {wrong}")
    array: Array = tensor.detach().to(torch.float32).numpy()
    if not np.isfinite(array).all():
        raise HeadError(f"{where}: {key} holds NaN, or what is infinite in fp32; train the head again")
    return array


def check_readouts(readouts: Sequence[Readout], hidden_size: int) -> None:
    """Raise HeadError where two readouts share a name or one does not read vectors [hidden_size]."""
    names = [readout.name for readout in readouts]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise HeadError(f"two heads are named {twice[0]}; each head needs a name of its own")
    outputs = [output for readout in readouts for output in readout.outputs]
    if twice := sorted({output for output in outputs if outputs.count(output) > 1}):
        raise HeadError(f"two outputs would be the column score_{twice[0]}; choose other names")
    for readout in readouts:
        if readout.input_size != hidden_size:
            raise HeadError(
                f"head {readout.name} reads embeddings of size {readout.input_size}, the encoder gives {hidden_size}; "
                "it was trained for another encoder"
            )


def write_readouts(file: Path, readouts: Sequence[Readout]) -> None:
    """Write the weights of all readouts, as docs/bundle-format.md names them."""
    tensors = {}
    for readout in readouts:
        for i, layer in enumerate(readout.layers):
            name = f"{readout.name}.{i}"
            tensors[f"{name}.weight"] = layer.linear.weight
            if layer.linear.bias is not None:
                tensors[f"{name}.bias"] = layer.linear.bias
            if layer.norm is not None:
                tensors |= {f"{name}.norm.weight": layer.norm.weight, f"{name}.norm.bias": layer.norm.bias}
    # save_file would give the file to its owner alone, whatever the umask says.
    file.write_bytes(save({name: np.ascontiguousarray(value) for name, value in tensors.items()}))
