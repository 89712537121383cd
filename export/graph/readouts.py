"""Pooled vectors -> the two outputs of every graph: scores float32 [B, H] and embedding float32 [B, D]."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper

from jql_export.graph.writer import GraphInput, GraphWriter
from jql_export.readouts.base import Readout

NORM_FLOOR = 1e-12  # of the reference, torch.nn.functional.normalize


def add_outputs(g: GraphWriter, pooled: str, norm: str, readouts: Sequence[Readout]) -> None:
    """The embedding, `pooled` [B, D] over its `norm` [B, 1], and the scores of all readouts: [B, 0] of none."""
    tiny = g.weight("norm_floor", np.array(NORM_FLOOR, np.float32))
    embedding = g.op("Div", pooled, g.op("Max", norm, tiny), output="embedding")
    if not readouts:
        g.op("Slice", embedding, g.ints(0), g.ints(0), g.ints(1), output="scores")
        return
    _stacked(g, embedding, readouts)


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
