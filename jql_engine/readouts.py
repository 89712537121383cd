"""What follows the encoder, in NumPy: the readouts of a bundle applied to embeddings that are there already."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load

from jql_engine.bundle import READOUTS, Bundle, LayerInfo, ReadoutInfo
from jql_engine.errors import BundleError

Matrix: TypeAlias = NDArray[np.float32]
BLOCK_ROWS = 4_096  # vectors in one product: what lies between two layers is [BLOCK_ROWS, K]


def _sigmoid(x: Matrix) -> Matrix:
    return (0.5 * (1 + np.tanh(x / 2))).astype(np.float32)


# Those that are used behind an L2-normalized embedding; see `Readouts.of`.
ACTIVATIONS: dict[str, Callable[[Matrix], Matrix]] = {
    "relu": lambda x: np.maximum(x, 0, out=x),
    "tanh": lambda x: np.tanh(x, out=x),
    "sigmoid": _sigmoid,
}


@dataclass(frozen=True, slots=True)
class _Layer:
    """y = activation(x weight + bias)."""

    weight: Matrix  # [in, out]
    bias: Matrix | None  # [out]
    activation: str | None

    def apply(self, x: Matrix) -> Matrix:
        y = x @ self.weight
        if self.bias is not None:
            y += self.bias
        return y if self.activation is None else ACTIVATIONS[self.activation](y)


@dataclass(frozen=True, slots=True)
class Readouts:
    """All readouts of a bundle, ready to score embeddings."""

    outputs: tuple[str, ...]  # [H], in the order of the score columns
    chains: tuple[tuple[_Layer, ...], ...]  # one per readout

    @classmethod
    def of(cls, bundle: Bundle) -> Readouts:
        """Those of `bundle`; raises BundleError for none, and for one that reads something else than the embedding."""
        if not bundle.heads:
            raise BundleError(f"{bundle.path} has no heads to apply; give a bundle of the same encoder with heads")
        tensors = load(bundle.read(READOUTS))
        chains = tuple(_chain(bundle, readout, tensors) for readout in bundle.manifest.readouts)
        return cls(bundle.heads, chains)

    def score(self, embeddings: Matrix) -> Matrix:
        """Scores [n, H] of L2-normalized `embeddings` [n, D]."""
        scores = np.empty((len(embeddings), len(self.outputs)), np.float32)
        for start in range(0, len(embeddings), BLOCK_ROWS):
            block, at = slice(start, start + BLOCK_ROWS), 0
            for chain in self.chains:
                x = embeddings[block]
                for layer in chain:
                    x = layer.apply(x)
                scores[block, at : at + x.shape[1]] = x
                at += x.shape[1]
        return scores


def _chain(bundle: Bundle, readout: ReadoutInfo, tensors: Mapping[str, Matrix]) -> tuple[_Layer, ...]:
    reads_embedding = readout.normalize and readout.pooling == bundle.manifest.pooling
    if not reads_embedding or any(not _is_known(layer) for layer in readout.layers):
        raise BundleError(
            f"{bundle.path}: readout {readout.name!r} ({readout.kind}) cannot be applied to stored embeddings, which "
            f"are {bundle.manifest.pooling}-pooled and L2-normalized; score the texts again with jql-run"
        )
    layers = [_layer(readout.name, i, layer, tensors) for i, layer in enumerate(readout.layers)]
    widths = [bundle.manifest.encoder.hidden_size, *(layer.weight.shape[1] for layer in layers)]
    if [layer.weight.shape[0] for layer in layers] != widths[:-1] or widths[-1] != len(readout.outputs):
        raise BundleError(
            f"{bundle.path}: readout {readout.name!r} has layers of widths {widths}, expected "
            f"{widths[0]} to {len(readout.outputs)}; export the bundle again"
        )
    return tuple(layers)


def _is_known(layer: LayerInfo) -> bool:
    return layer.norm_epsilon is None and (layer.activation is None or layer.activation in ACTIVATIONS)


def _layer(name: str, i: int, info: LayerInfo, tensors: Mapping[str, Matrix]) -> _Layer:
    weight = np.ascontiguousarray(tensors[f"{name}.{i}.weight"].T)
    return _Layer(weight, tensors.get(f"{name}.{i}.bias"), info.activation)
