"""(EncoderWeights, StackedHeads, Dialect) -> ONNX, written node by node from canonical weights.

One walk over the layers serves every dialect; a dialect (dialects.py) only answers how it writes positions, attention,
norm, MLP and pooling. Exact simplifications:

- the value bias adds a constant to every context vector, since attention weights sum to one, so it moves into the
  output projection: b_o' = b_o + W_o b_v;
- with CLS pooling the last layer computes queries, output projection and MLP for the first token only;
- the first token is at position 0, where RoPE is the identity: that query is not rotated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import onnx
from ml_dtypes import bfloat16
from numpy.typing import NDArray
from onnx import TensorProto, helper

from jql_engine.data import Layout
from jql_engine.errors import CheckpointError
from jql_export.families.base import EncoderSpec, EncoderWeights, LayerWeights
from jql_export.readouts.jql_head import StackedHeads
from jql_export.tensors import Array, Linear, Norm

Pooling = Literal["cls", "mean"]
FloatType = type[np.float32] | type[np.float16] | type[bfloat16]
# Weights from this size on lie outside of the graph, where a runtime can map them into memory.
EXTERNAL_BYTES = 1024
PAGE = 4096
NORM_FLOOR = 1e-12


@dataclass(frozen=True, slots=True)
class GraphInput:
    """One input of a graph; its axes are symbolic, since they differ from batch to batch."""

    name: str
    axes: tuple[str | int, ...]
    type: int = TensorProto.INT64


@dataclass(slots=True)
class GraphWriter:
    """Collects nodes and weights. Weight names are stable: `layer.3.key.bias`, `heads.output.weight`, ..."""

    dtype: FloatType = np.float32  # of what the encoder computes in
    flat: bool = False  # activations are [T, D]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, NDArray[Any]] = field(default_factory=dict)

    def op(self, op_type: str, *inputs: str, domain: str = "", output: str = "", **attributes: Any) -> str:
        """Add a node with one output and return that output's name."""
        return self.ops(op_type, *inputs, domain=domain, outputs=(output,), **attributes)[0]

    def ops(
        self, op_type: str, *inputs: str, domain: str = "", outputs: Sequence[str], **attributes: Any
    ) -> Sequence[str]:
        """Add a node with several outputs; an empty name asks for a new one."""
        number = len(self.nodes)
        names = [name or f"{op_type}_{number}" + (f"_{i}" if i else "") for i, name in enumerate(outputs)]
        node = helper.make_node(op_type, list(inputs), names, name=names[0], domain=domain, **attributes)
        self.nodes.append(node)
        return names

    def weight(self, name: str, value: NDArray[Any]) -> str:
        """Add a constant; the same name means the same constant."""
        self.weights.setdefault(name, value)
        return name

    def parameter(self, name: str, value: Array) -> str:
        """Add a weight of the encoder, in the type it computes in; raises CheckpointError where it does not fit."""
        if self.dtype == np.float16 and np.abs(value).max(initial=0) > np.finfo(np.float16).max:
            raise CheckpointError(
                f"{name} holds {np.abs(value).max():.3g}, fp16 ends at 65,504: this encoder needs "
                "cuda-bf16 or an fp32 variant"
            )
        return self.weight(name, value.astype(self.dtype, copy=False))

    def ints(self, *values: int) -> str:
        """An int64 vector constant."""
        return self.weight(f"ints.{'.'.join(map(str, values))}", np.array(values, np.int64))

    def project(self, x: str, name: str, linear: Linear) -> str:
        """X weight^T, without the bias."""
        return self.op("MatMul", x, self.parameter(f"{name}.weight", linear.weight.T))

    def project_and_add(self, x: str, name: str, linear: Linear) -> str:
        """X weight^T + bias; where activations are flat one operator, which rounds once."""
        if linear.bias is None:
            return self.project(x, name, linear)
        bias = self.parameter(f"{name}.bias", linear.bias)
        if self.flat:
            return self.op("Gemm", x, self.parameter(f"{name}.weight", linear.weight.T), bias)
        return self.op("Add", self.project(x, name, linear), bias)


class Dialect(Protocol):
    """How one family of runtimes wants the graph written; activations are [B, L, D], or [T, D] where it packs."""

    layout: Layout
    dtype: FloatType
    inputs: tuple[GraphInput, ...]
    opsets: dict[str, int]
    ir_version: int

    def prepare(self, g: GraphWriter, spec: EncoderSpec) -> None:
        """Add what all layers share."""

    def position_rows(self, g: GraphWriter, spec: EncoderSpec) -> str:
        """What the table `position` adds to each token, where positions is absolute."""

    def attend(
        self, g: GraphWriter, name: str, layer: LayerWeights, spec: EncoderSpec, x: str, cls_only: bool
    ) -> tuple[str, str]:
        """Context vectors before the output projection, and the rows of x they belong to: first tokens or all."""

    def norm(self, g: GraphWriter, name: str, x: str, norm: Norm, eps: float) -> str:
        """LayerNorm(x)."""

    def add_norm(
        self, g: GraphWriter, name: str, y: str, bias: Array | None, residual: str, norm: Norm, eps: float
    ) -> str:
        """LayerNorm(residual + y + bias)."""

    def expand(self, g: GraphWriter, name: str, layer: LayerWeights, x: str) -> str:
        """The wide inside of the MLP: gelu(gate) * up, or gelu(up); gelu is the exact one, with erf."""

    def first(self, g: GraphWriter, x: str) -> str:
        """[B, D] from what a layer for first tokens gives."""

    def mean(self, g: GraphWriter, spec: EncoderSpec, x: str) -> str:
        """Mean over the tokens of each document, [B, D]."""


def write_graph(file: Path, weights: EncoderWeights, heads: StackedHeads, pooling: Pooling, dialect: Dialect) -> None:
    """Write `file` (.onnx) and its weights beside it (.onnx.data); see jql_engine.bundle for inputs and outputs."""
    g = GraphWriter(dialect.dtype, flat=dialect.layout == "packed")
    dialect.prepare(g, weights.spec)
    x = _embed(g, dialect, weights)
    for i, layer in enumerate(weights.layers):
        cls_only = pooling == "cls" and i == len(weights.layers) - 1
        x = _layer(g, dialect, weights.spec, f"layer.{i}", layer, x, cls_only)
    pooled = dialect.first(g, x) if pooling == "cls" else dialect.mean(g, weights.spec, x)
    if dialect.dtype != np.float32:
        pooled = g.op("Cast", pooled, to=TensorProto.FLOAT)
    # Not ReduceL2: on CUDA it would be the only operator that needs cuDNN.
    squares = g.op("ReduceSumSquare", pooled, g.ints(1), keepdims=1)
    add_outputs(g, pooled, g.op("Sqrt", squares), heads)
    _save(file, g, dialect, heads)


def _embed(g: GraphWriter, d: Dialect, weights: EncoderWeights) -> str:
    """Word, type and position embeddings, normalized. The one token type in use is folded into a table."""
    word, position = weights.word, weights.position
    if weights.token_type is not None:
        if position is None:
            word = word + weights.token_type
        else:
            position = position + weights.token_type
    x = g.op("Gather", g.parameter("word", word), "input_ids")
    if position is not None:
        g.parameter("position", position)
        x = g.op("Add", x, d.position_rows(g, weights.spec))
    return d.norm(g, "embedding_norm", x, weights.embedding_norm, weights.spec.norm_epsilon)


def _layer(
    g: GraphWriter, d: Dialect, spec: EncoderSpec, name: str, layer: LayerWeights, x: str, cls_only: bool
) -> str:
    context, residual = d.attend(g, name, layer, spec, x, cls_only)
    y = g.project(context, f"{name}.output", layer.output)
    attention_norm = f"{name}.attention_norm"
    x = d.add_norm(g, attention_norm, y, _output_bias(layer), residual, layer.attention_norm, spec.norm_epsilon)
    y = g.project(d.expand(g, name, layer, x), f"{name}.down", layer.down)
    return d.add_norm(g, f"{name}.mlp_norm", y, layer.down.bias, x, layer.mlp_norm, spec.norm_epsilon)


def _output_bias(layer: LayerWeights) -> Array | None:
    if layer.value.bias is None:
        return layer.output.bias
    folded = layer.output.weight.astype(np.float64) @ layer.value.bias
    return (folded + (0 if layer.output.bias is None else layer.output.bias)).astype(np.float32)


def add_outputs(g: GraphWriter, pooled: str, norm: str, heads: StackedHeads) -> None:
    """The embedding, `pooled` [B, D] over its `norm` [B, 1], and all heads as one stacked product: [B, 0] of none."""
    tiny = g.weight("norm_floor", np.array(NORM_FLOOR, np.float32))
    embedding = g.op("Div", pooled, g.op("Max", norm, tiny), output="embedding")
    if not len(heads.output_bias):
        g.op("Slice", embedding, g.ints(0), g.ints(0), g.ints(1), output="scores")
        return
    hidden = g.op(
        "Gemm",
        embedding,
        g.weight("heads.hidden.weight", heads.hidden_weight),
        g.weight("heads.hidden.bias", heads.hidden_bias),
        transB=1,
    )
    output = g.weight("heads.output.weight", heads.output_weight)
    g.op("Gemm", g.op("Relu", hidden), output, g.weight("heads.output.bias", heads.output_bias), output="scores")


def value_infos(
    inputs: Sequence[GraphInput], heads: StackedHeads
) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    """The inputs of a graph, and its outputs [B, H] and [B, D]."""
    widths = {"scores": len(heads.output_bias), "embedding": heads.hidden_weight.shape[1]}
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", width]) for name, width in widths.items()]
    return [helper.make_tensor_value_info(value.name, value.type, list(value.axes)) for value in inputs], outputs


def _save(file: Path, g: GraphWriter, dialect: Dialect, heads: StackedHeads) -> None:
    inputs, outputs = value_infos(dialect.inputs, heads)
    data = file.with_suffix(".onnx.data")
    graph = helper.make_graph(g.nodes, "jql", inputs, outputs, _write_weights(data, g.weights))
    opsets = [helper.make_opsetid(domain, version) for domain, version in dialect.opsets.items()]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=dialect.ir_version, producer_name="jql-export")
    onnx.save_model(model, file)


def _write_weights(file: Path, weights: dict[str, NDArray[Any]]) -> Sequence[TensorProto]:
    """Write large weights to `file`, each from a page border on; return a tensor for every weight."""
    tensors = []
    with file.open("wb") as stream:
        for name, value in weights.items():
            tensor = TensorProto(name=name, dims=value.shape, data_type=helper.np_dtype_to_tensor_dtype(value.dtype))
            raw = np.ascontiguousarray(value).reshape(-1).view(np.uint8).data  # not cast: nobody else knows bf16
            if len(raw) < EXTERNAL_BYTES:
                tensor.raw_data = bytes(raw)
            else:
                stream.seek(-(-stream.tell() // PAGE) * PAGE)
                tensor.data_location = TensorProto.EXTERNAL
                where = {"location": file.name, "offset": stream.tell(), "length": len(raw)}
                for key, setting in where.items():
                    tensor.external_data.add(key=key, value=str(setting))
                stream.write(raw)
            tensors.append(tensor)
    return tensors
