"""Pooled vectors -> the two outputs of every graph: scores float32 [B, H] and embedding float32 [B, D]."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper

from jql_engine.bundle import Activation, Pooling
from jql_export.graph.writer import GraphInput, GraphWriter
from jql_export.readouts.base import Readout

NORM_FLOOR = 1e-12  # of the reference, torch.nn.functional.normalize


def poolings_of(readouts: Sequence[Readout], embedding: Pooling) -> tuple[Pooling, ...]:
    """All poolings of a graph, that of the `embedding` first."""
    return tuple(dict.fromkeys([embedding, *(readout.pooling or embedding for readout in readouts)]))


def add_outputs(
    g: GraphWriter, pooled: Mapping[Pooling, str], norm: Callable[[str], str], readouts: Sequence[Readout]
) -> None:
    """The embedding, the first of `pooled` [B, D] L2-normalized, and the scores of all readouts: [B, 0] of none.

    `norm` writes the L2 norm [B, 1] of a pooled vector.
    """
    own = next(iter(pooled))
    norms = {pooling: norm(x) for pooling, x in pooled.items() if pooling == own or _normalizes(readouts, pooling)}
    tiny = g.weight("norm_floor", np.array(NORM_FLOOR, np.float32))
    normalized = {
        pooling: g.op("Div", pooled[pooling], g.op("Max", norms[pooling], tiny), output="embedding" * (pooling == own))
        for pooling in norms
    }
    if not readouts:
        g.op("Slice", normalized[own], g.ints(0), g.ints(0), g.ints(1), output="scores")
    elif all(_is_jql_head(readout, own) for readout in readouts):
        _stacked(g, normalized[own], readouts)
    else:
        inputs = [(normalized if r.normalize else pooled)[r.pooling or own] for r in readouts]
        scores = [_chain(g, readout, x) for readout, x in zip(readouts, inputs, strict=True)]
        g.op("Concat", *scores, axis=1, output="scores")


def _normalizes(readouts: Sequence[Readout], pooling: Pooling) -> bool:
    return any(readout.normalize and readout.pooling == pooling for readout in readouts)


def _is_jql_head(readout: Readout, embedding: Pooling) -> bool:
    """Whether it is relu between two layers with biases, one output, on the embedding: then it can be stacked."""
    activations = [layer.activation for layer in readout.layers]
    plain = all(layer.norm is None and layer.linear.bias is not None for layer in readout.layers)
    reads_embedding = readout.normalize and readout.pooling in (None, embedding)
    return activations == ["relu", None] and plain and reads_embedding and len(readout.outputs) == 1


def _chain(g: GraphWriter, readout: Readout, x: str) -> str:
    """The layers of one readout, [B, D] to [B, outputs]."""
    for i, layer in enumerate(readout.layers):
        name, linear = f"heads.{readout.name}.{i}", layer.linear
        bias = [] if linear.bias is None else [g.weight(f"{name}.bias", linear.bias)]
        x = g.op("Gemm", x, g.weight(f"{name}.weight", linear.weight), *bias, transB=1)
        if layer.activation is not None:
            x = _activate(g, x, layer.activation)
        if layer.norm is not None:
            scale, shift = (g.weight(f"{name}.norm.{part}", getattr(layer.norm, part)) for part in ("weight", "bias"))
            x = g.op("LayerNormalization", x, scale, shift, axis=-1, epsilon=layer.norm_epsilon)
    return x


def _activate(g: GraphWriter, x: str, activation: Activation) -> str:
    if activation == "softmax":
        return g.op("Softmax", x, axis=1)
    if activation == "silu":
        return g.op("Mul", x, g.op("Sigmoid", x))
    if activation == "gelu":  # written out: the operator is younger than some graphs
        half, root = (g.weight(f"gelu.{n}", np.array(v, np.float32)) for n, v in (("half", 0.5), ("root", 0.5**0.5)))
        one = g.weight("gelu.one", np.array(1, np.float32))
        return g.op("Mul", g.op("Mul", x, half), g.op("Add", g.op("Erf", g.op("Mul", x, root)), one))
    return g.op({"relu": "Relu", "tanh": "Tanh", "sigmoid": "Sigmoid"}[activation], x)


def _stacked(g: GraphWriter, embedding: str, heads: Sequence[Readout]) -> None:
    """All of JQL's heads as two products: the hidden layers side by side, the outputs block-diagonal."""
    hidden, outputs = zip(*((layer.linear for layer in head.layers) for head in heads), strict=True)
    scattered = np.zeros((sum(len(layer.weight) for layer in hidden), len(heads)), np.float32)
    start = 0
    for i, layer in enumerate(outputs):
        scattered[start : start + layer.weight.shape[1], i] = layer.weight[0]
        start += layer.weight.shape[1]
    x = g.op(
        "Gemm",
        embedding,
        g.weight("heads.hidden.weight", np.concatenate([layer.weight for layer in hidden])),
        g.weight("heads.hidden.bias", np.concatenate([layer.bias for layer in hidden])),
        transB=1,
    )
    weight = g.weight("heads.output.weight", scattered)
    bias = g.weight("heads.output.bias", np.concatenate([layer.bias for layer in outputs]))
    g.op("Gemm", g.op("Relu", x), weight, bias, output="scores")


def value_infos(
    inputs: Sequence[GraphInput], readouts: Sequence[Readout], hidden_size: int
) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    """The inputs of a graph, and its outputs [B, H] and [B, hidden_size]."""
    widths = {"scores": sum(len(readout.outputs) for readout in readouts), "embedding": hidden_size}
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", width]) for name, width in widths.items()]
    return [helper.make_tensor_value_info(value.name, value.type, list(value.axes)) for value in inputs], outputs
