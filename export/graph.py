"""(EncoderWeights, StackedHeads, Dialect) -> ONNX, written node by node from canonical weights.

One walk over the layers serves every dialect; a dialect only answers how it writes embedding, attention, residual
norm, MLP and pooling. Exact simplifications, all done here once:

- the value bias adds a constant to every context vector, since attention weights sum to one, so it moves into the
  output projection: b_o' = b_o + W_o b_v;
- with CLS pooling the last layer computes queries, output projection and MLP for the first token only;
- the first token is at position 0, where RoPE is the identity: that query is not rotated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from jql_engine.data import Layout
from jql_export.checkpoint import EncoderSpec, EncoderWeights, LayerWeights
from jql_export.heads import StackedHeads
from jql_export.tensors import Array, Linear, Norm

Pooling = Literal["cls", "mean"]
MICROSOFT = "com.microsoft"
# Weights from this size on lie outside of the graph, where a runtime can map them into memory.
EXTERNAL_BYTES = 1024
PAGE = 4096


@dataclass(slots=True)
class GraphWriter:
    """Collects nodes and weights. Weight names are stable: `layer.3.key.bias`, `heads.output.weight`, ..."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, NDArray[Any]] = field(default_factory=dict)

    def op(self, op_type: str, *inputs: str, domain: str = "", output: str = "", **attributes: Any) -> str:
        """Add a node with one output and return that output's name."""
        name = output or f"{op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [name], name=name, domain=domain, **attributes))
        return name

    def weight(self, name: str, value: NDArray[Any]) -> str:
        """Add a constant; the same name means the same constant."""
        self.weights.setdefault(name, value)
        return name

    def ints(self, *values: int) -> str:
        """An int64 vector constant."""
        return self.weight(f"ints.{'.'.join(map(str, values))}", np.array(values, np.int64))

    def project(self, x: str, name: str, linear: Linear) -> str:
        """X weight^T, without the bias."""
        return self.op("MatMul", x, self.weight(f"{name}.weight", linear.weight.T))

    def project_and_add(self, x: str, name: str, linear: Linear) -> str:
        """X weight^T + bias."""
        y = self.project(x, name, linear)
        return y if linear.bias is None else self.op("Add", y, self.weight(f"{name}.bias", linear.bias))


class Dialect(Protocol):
    """How one family of runtimes wants the graph written; activations are [B, L, D]."""

    layout: Layout
    inputs: tuple[str, ...]
    opsets: dict[str, int]
    ir_version: int

    def prepare(self, g: GraphWriter, spec: EncoderSpec) -> None:
        """Add what all layers share."""

    def attend(
        self, g: GraphWriter, name: str, layer: LayerWeights, spec: EncoderSpec, x: str, queries: str, rotate: bool
    ) -> str:
        """Context vectors of `queries` over x, before the output projection; `rotate` False at position 0."""

    def add_norm(
        self, g: GraphWriter, name: str, y: str, bias: Array | None, residual: str, norm: Norm, eps: float
    ) -> str:
        """LayerNorm(residual + y + bias)."""

    def activate(self, g: GraphWriter, name: str, up: str, bias: Array | None) -> str:
        """Gelu(up + bias), the exact one with erf."""

    def mean(self, g: GraphWriter, x: str) -> str:
        """Mean over the tokens of each document, [B, D]."""


class CpuDialect:
    """ONNX Runtime's fused CPU operators; a batch holds documents of one length, so there is no mask.

    The flash path of MultiHeadAttention exists on the CPU only for fp32 without a mask: at 8,192 tokens it needs
    57 MiB where a masked call takes 3.2 GiB and seven times as long.
    """

    layout: Layout = "exact"
    inputs: tuple[str, ...] = ("input_ids",)
    opsets: dict[str, int] = {"": 20, MICROSOFT: 1}  # noqa: RUF012
    ir_version = 10

    def prepare(self, g: GraphWriter, spec: EncoderSpec) -> None:
        """RoPE caches, each [max_positions, head_size / 2]."""
        if spec.positions == "rope":
            _rope_caches(g, spec)

    def attend(
        self, g: GraphWriter, name: str, layer: LayerWeights, spec: EncoderSpec, x: str, queries: str, rotate: bool
    ) -> str:
        """See Dialect."""
        q = g.project_and_add(queries, f"{name}.query", layer.query)
        k = g.project_and_add(x, f"{name}.key", layer.key)
        v = g.project(x, f"{name}.value", layer.value)
        if spec.positions == "rope":
            k = self._rotate(g, k, spec)
            q = self._rotate(g, q, spec) if rotate else q
        return g.op("MultiHeadAttention", q, k, v, domain=MICROSOFT, num_heads=spec.n_attention_heads)

    def _rotate(self, g: GraphWriter, x: str, spec: EncoderSpec) -> str:
        # A position_ids of one element is the offset of the first token.
        inputs = (x, g.ints(0), "rope.cos", "rope.sin")
        return g.op("RotaryEmbedding", *inputs, domain=MICROSOFT, num_heads=spec.n_attention_heads)

    def add_norm(
        self, g: GraphWriter, name: str, y: str, bias: Array | None, residual: str, norm: Norm, eps: float
    ) -> str:
        """See Dialect."""
        scale, shift = g.weight(f"{name}.weight", norm.weight), g.weight(f"{name}.bias", norm.bias)
        extra = [] if bias is None else [g.weight(f"{name}.residual_bias", bias)]
        return g.op("SkipLayerNormalization", y, residual, scale, shift, *extra, domain=MICROSOFT, epsilon=eps)

    def activate(self, g: GraphWriter, name: str, up: str, bias: Array | None) -> str:
        """See Dialect."""
        if bias is None:
            return g.op("Gelu", up, domain=MICROSOFT)
        return g.op("BiasGelu", up, g.weight(f"{name}.bias", bias), domain=MICROSOFT)

    def mean(self, g: GraphWriter, x: str) -> str:
        """See Dialect."""
        return g.op("ReduceMean", x, g.ints(1), keepdims=0)


class StandardDialect:
    """ONNX opset 23 and nothing else: [B, L] padded, with a mask. For TensorRT, OpenVINO and any other runtime."""

    layout: Layout = "padded"
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    opsets: dict[str, int] = {"": 23}  # noqa: RUF012
    ir_version = 11

    def prepare(self, g: GraphWriter, spec: EncoderSpec) -> None:
        """`attend`: bool [B, 1, L, L]; `attend_first`: its first query; `positions`: int64 [B, L] for RoPE."""
        mask = g.op(
            "Cast", g.op("Unsqueeze", "attention_mask", g.ints(1, 2)), to=TensorProto.BOOL, output="attend_first"
        )
        shape = g.op("Shape", "input_ids")
        length = g.op("Gather", shape, g.ints(1))
        # The operator lets a mask broadcast over the queries; ONNX Runtime 1.32 on the CPU refuses one that does.
        g.op("Expand", mask, g.op("Concat", g.ints(1, 1), length, g.ints(1), axis=0), output="attend")
        if spec.positions == "rope":
            _rope_caches(g, spec)
            zero, one = g.weight("zero", np.array(0, np.int64)), g.weight("one", np.array(1, np.int64))
            g.op("Expand", g.op("Range", zero, g.op("Squeeze", length), one), shape, output="positions")

    def attend(
        self, g: GraphWriter, name: str, layer: LayerWeights, spec: EncoderSpec, x: str, queries: str, rotate: bool
    ) -> str:
        """See Dialect."""
        q = g.project_and_add(queries, f"{name}.query", layer.query)
        k = g.project_and_add(x, f"{name}.key", layer.key)
        v = g.project(x, f"{name}.value", layer.value)
        heads = spec.n_attention_heads
        if spec.positions == "rope":
            k = g.op("RotaryEmbedding", k, "rope.cos", "rope.sin", "positions", num_heads=heads)
            q = g.op("RotaryEmbedding", q, "rope.cos", "rope.sin", "positions", num_heads=heads) if rotate else q
        mask = "attend" if queries == x else "attend_first"
        return g.op("Attention", q, k, v, mask, q_num_heads=heads, kv_num_heads=heads)

    def add_norm(
        self, g: GraphWriter, name: str, y: str, bias: Array | None, residual: str, norm: Norm, eps: float
    ) -> str:
        """See Dialect."""
        if bias is not None:
            y = g.op("Add", y, g.weight(f"{name}.residual_bias", bias))
        return _layer_norm(g, name, g.op("Add", y, residual), norm, eps)

    def activate(self, g: GraphWriter, name: str, up: str, bias: Array | None) -> str:
        """See Dialect."""
        return g.op("Gelu", up if bias is None else g.op("Add", up, g.weight(f"{name}.bias", bias)))

    def mean(self, g: GraphWriter, x: str) -> str:
        """See Dialect."""
        mask = g.op("Cast", g.op("Unsqueeze", "attention_mask", g.ints(2)), to=TensorProto.FLOAT)
        total = g.op("ReduceSum", g.op("Mul", x, mask), g.ints(1), keepdims=0)
        return g.op("Div", total, g.op("ReduceSum", mask, g.ints(1), keepdims=0))


@dataclass(frozen=True, slots=True)
class VariantKind:
    """What a --variant name stands for."""

    dialect: Callable[[], Dialect]
    layout: Layout
    precision: str
    provider: str  # the execution provider it is written for; "any" runs on the CPU too


VARIANTS = {
    "cpu-fp32": VariantKind(CpuDialect, CpuDialect.layout, "fp32", "cpu"),
    "standard-fp32": VariantKind(StandardDialect, StandardDialect.layout, "fp32", "any"),
}


def write_graph(file: Path, weights: EncoderWeights, heads: StackedHeads, pooling: Pooling, dialect: Dialect) -> None:
    """Write `file` (.onnx) and its weights beside it (.onnx.data); see jql_engine.bundle for inputs and outputs."""
    g = GraphWriter()
    dialect.prepare(g, weights.spec)
    x = _embed(g, weights)
    for i, layer in enumerate(weights.layers):
        cls_only = pooling == "cls" and i == len(weights.layers) - 1
        x = _layer(g, dialect, weights.spec, f"layer.{i}", layer, x, cls_only)
    # [B, 1, D] after a layer for the CLS token only
    pooled = g.op("Squeeze", x, g.ints(1)) if pooling == "cls" else dialect.mean(g, x)
    add_outputs(g, pooled, g.op("ReduceL2", pooled, g.ints(1), keepdims=1), heads)
    _save(file, g, dialect, heads)


def _embed(g: GraphWriter, weights: EncoderWeights) -> str:
    """Word, type and position embeddings, normalised. The one token type in use is folded into a table."""
    word, position = weights.word, weights.position
    if weights.token_type is not None:
        if position is None:
            word = word + weights.token_type
        else:
            position = position + weights.token_type
    x = g.op("Gather", g.weight("word", word), "input_ids")
    if position is not None:
        x = g.op("Add", x, _positions(g, weights.spec, g.weight("position", position)))
    return _layer_norm(g, "embedding_norm", x, weights.embedding_norm, weights.spec.norm_epsilon)


def _positions(g: GraphWriter, spec: EncoderSpec, table: str) -> str:
    if not spec.counts_from_pad:
        length = g.op("Gather", g.op("Shape", "input_ids"), g.ints(1))
        return g.op("Slice", table, g.ints(0), length, g.ints(0))
    is_pad = g.op("Equal", "input_ids", g.weight("pad", np.array(spec.pad_id, np.int64)))
    counted = g.op("Cast", g.op("Not", is_pad), to=TensorProto.INT64)
    axis = g.weight("one", np.array(1, np.int64))
    return g.op("Gather", table, g.op("Mul", g.op("CumSum", counted, axis), counted))


def _layer(
    g: GraphWriter, d: Dialect, spec: EncoderSpec, name: str, layer: LayerWeights, x: str, cls_only: bool
) -> str:
    queries = g.op("Slice", x, g.ints(0), g.ints(1), g.ints(1)) if cls_only else x
    context = d.attend(g, name, layer, spec, x, queries, rotate=not cls_only)
    y = g.project(context, f"{name}.output", layer.output)
    attention_norm = f"{name}.attention_norm"
    x = d.add_norm(g, attention_norm, y, _output_bias(layer), queries, layer.attention_norm, spec.norm_epsilon)
    up = g.project(x, f"{name}.up", layer.up)
    if layer.gate is None:
        inner = d.activate(g, f"{name}.up", up, layer.up.bias)
    else:
        gate = g.project(x, f"{name}.gate", layer.gate)
        inner = g.op("Mul", d.activate(g, f"{name}.gate", gate, layer.gate.bias), up)
    y = g.project(inner, f"{name}.down", layer.down)
    return d.add_norm(g, f"{name}.mlp_norm", y, layer.down.bias, x, layer.mlp_norm, spec.norm_epsilon)


def _output_bias(layer: LayerWeights) -> Array | None:
    if layer.value.bias is None:
        return layer.output.bias
    folded = layer.output.weight.astype(np.float64) @ layer.value.bias
    return (folded + (0 if layer.output.bias is None else layer.output.bias)).astype(np.float32)


def _layer_norm(g: GraphWriter, name: str, x: str, norm: Norm, epsilon: float) -> str:
    scale, shift = g.weight(f"{name}.weight", norm.weight), g.weight(f"{name}.bias", norm.bias)
    return g.op("LayerNormalization", x, scale, shift, axis=-1, epsilon=epsilon)


def _rope_caches(g: GraphWriter, spec: EncoderSpec) -> None:
    """Cos and sin of position * frequency: the angle in fp32, as the reference rounds it."""
    assert spec.inverse_frequencies is not None
    angles = np.arange(spec.max_positions, dtype=np.float32)[:, None] * spec.inverse_frequencies
    g.weight("rope.cos", np.cos(angles))
    g.weight("rope.sin", np.sin(angles))


def add_outputs(g: GraphWriter, pooled: str, norm: str, heads: StackedHeads) -> None:
    """The embedding, `pooled` [B, D] over its `norm` [B, 1], and all heads as one stacked product: [B, 0] of none."""
    tiny = g.weight("norm_floor", np.array(1e-12, np.float32))
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
    input_names: Sequence[str], heads: StackedHeads
) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    """The inputs [B, L] and outputs of a graph; both lengths are symbolic, since L differs from batch to batch."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["B", "L"]) for name in input_names]
    widths = {"scores": len(heads.output_bias), "embedding": heads.hidden_weight.shape[1]}
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", width]) for name, width in widths.items()]
    return inputs, outputs


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
            raw = np.ascontiguousarray(value).data.cast("B") if value.size else b""
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
