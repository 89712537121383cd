"""What follows the encoder, in NumPy: the readouts of a bundle applied to embeddings that are there already."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from jql_engine.bundle import READOUTS, Bundle, LayerInfo, ReadoutInfo
from jql_engine.errors import BundleError

Matrix: TypeAlias = NDArray[np.float32]
BLOCK_ROWS = 4_096  # vectors in one product: what lies between two layers is [BLOCK_ROWS, K]


def _sigmoid(x: Matrix) -> Matrix:
    y: Matrix = np.tanh(x / 2)
    y += 1
    y /= 2
    return y


def _softmax(x: Matrix) -> Matrix:
    y: Matrix = np.exp(x - x.max(axis=1, keepdims=True))
    y /= y.sum(axis=1, keepdims=True)
    return y


# All of the format but gelu, whose erf NumPy lacks.
ACTIVATIONS: dict[str, Callable[[Matrix], Matrix]] = {
    "relu": lambda x: np.maximum(x, 0, out=x),
    "tanh": lambda x: np.tanh(x, out=x),
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "softmax": _softmax,
}


@dataclass(frozen=True, slots=True)
class _Layer:
    """norm(activation(x weight + bias)), as far as there are a bias, an activation and a norm."""

    weight: Matrix  # [in, out]
    bias: Matrix | None  # [out]
    activation: str | None
    norm: tuple[Matrix, Matrix, float] | None  # scale and shift [out], epsilon

    def apply(self, x: Matrix, room: Matrix) -> Matrix:
        """The layer of `x` [n, in], computed in `room`, a vector of n * out numbers or more."""
        n_out = self.weight.shape[1]
        y: Matrix = np.matmul(x, self.weight, out=room[: len(x) * n_out].reshape(len(x), n_out))
        if self.bias is not None:
            y += self.bias
        if self.activation is not None:
            y = ACTIVATIONS[self.activation](y)
        if self.norm is None:
            return y
        scale, shift, epsilon = self.norm
        normalized: Matrix = y - y.mean(axis=1, keepdims=True)
        normalized /= np.sqrt((normalized * normalized).mean(axis=1, keepdims=True) + np.float32(epsilon))
        return normalized * scale + shift


@dataclass(frozen=True, slots=True)
class Readouts:
    """All readouts of a bundle, ready to score embeddings."""

    outputs: tuple[str, ...]  # [H], in the order of the score columns
    chains: tuple[tuple[_Layer, ...], ...]  # one per readout

    @classmethod
    def of(cls, bundle: Bundle) -> Readouts:
        """Those of `bundle`.

        Raises BundleError where there are none, where one reads something else than the embedding or computes what
        cannot be computed here, and where the file of their weights is damaged.
        """
        if not bundle.heads:
            raise BundleError(f"{bundle.path} has no heads to apply; give a bundle of the same encoder with heads")
        try:
            tensors = load(bundle.read(READOUTS))
        except SafetensorError as error:
            raise BundleError(f"{bundle.path}: {READOUTS} is damaged ({error}); export the bundle again") from error
        return cls(bundle.heads, tuple(_chain(bundle, readout, tensors) for readout in bundle.manifest.readouts))

    def score(self, embeddings: Matrix) -> Matrix:
        """Scores [n, H] of L2-normalized `embeddings` [n, D]."""
        scores = np.empty((len(embeddings), len(self.outputs)), np.float32)
        widest = max(layer.weight.shape[1] for chain in self.chains for layer in chain)
        # Results in turn: with new memory for each product 2,048 vectors and three heads of 1,000 took 22 ms, not 20.
        rooms = [np.empty(min(BLOCK_ROWS, len(embeddings)) * widest, np.float32) for _ in range(2)]
        for start in range(0, len(embeddings), BLOCK_ROWS):
            block, at = slice(start, start + BLOCK_ROWS), 0
            for chain in self.chains:
                x = embeddings[block]
                for i, layer in enumerate(chain):
                    x = layer.apply(x, rooms[i % 2])
                scores[block, at : at + x.shape[1]] = x
                at += x.shape[1]
        return scores


def _chain(bundle: Bundle, readout: ReadoutInfo, tensors: Mapping[str, NDArray[Any]]) -> tuple[_Layer, ...]:
    where = f"{bundle.path}: readout {readout.name!r} ({readout.kind})"
    if not readout.normalize or readout.pooling != bundle.manifest.pooling:
        raise BundleError(
            f"{where} cannot be applied to stored embeddings, which are {bundle.manifest.pooling}-pooled and "
            "L2-normalized; score the texts again with jql-run"
        )
    if "gelu" in (layer.activation for layer in readout.layers):
        raise BundleError(f"{where} has a gelu, which cannot be computed here; score the texts again with jql-run")
    width, layers = bundle.manifest.encoder.hidden_size, []
    for i, info in enumerate(readout.layers):
        n_out = len(readout.outputs) if i == len(readout.layers) - 1 else None
        layers.append(_layer(where, f"{readout.name}.{i}", info, tensors, width, n_out))
        width = layers[-1].weight.shape[1]
    return tuple(layers)


def _layer(
    where: str, name: str, info: LayerInfo, tensors: Mapping[str, NDArray[Any]], n_in: int, n_out: int | None
) -> _Layer:
    """A layer of `n_in` inputs and, unless that is None, `n_out` outputs."""

    def take(part: str, *shape: int | None) -> Matrix:
        found = tensors.get(f"{name}.{part}")
        wanted = f"float32 [{', '.join('*' if n is None else str(n) for n in shape)}]"
        if found is None or found.dtype != np.float32 or found.ndim != len(shape):
            what = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
        elif any(n not in (None, size) for n, size in zip(shape, found.shape, strict=True)):
            what = f"float32 {list(found.shape)}"
        elif not np.isfinite(found).all():
            what = "values that are not finite"
        else:
            return found
        raise BundleError(f"{where}: {READOUTS} has {what} as {name}.{part}, expected {wanted}; export it again")

    weight = take("weight", n_out, n_in)
    size = len(weight)
    norm = None
    if info.norm_epsilon is not None:
        norm = take("norm.weight", size), take("norm.bias", size), info.norm_epsilon
    bias = take("bias", size) if info.bias else None
    return _Layer(np.ascontiguousarray(weight.T), bias, info.activation, norm)
