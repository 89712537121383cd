"""Ways to write the same encoder: with ONNX Runtime's fused CPU operators, and in plain ONNX for everybody else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from jql_engine.data import Layout
from jql_export.families.base import EncoderSpec, LayerWeights
from jql_export.graph.encoder import FloatType, GraphInput, GraphWriter
from jql_export.tensors import Array, Linear, Norm

MICROSOFT = "com.microsoft"
INPUT_IDS = GraphInput("input_ids", ("B", "L"))
ATTENTION_MASK = GraphInput("attention_mask", ("B", "L"))


class FusedDialect:
    """What is the same wherever ONNX Runtime's fused operators run."""

    dtype: FloatType

    def norm(self, g: GraphWriter, name: str, x: str, norm: Norm, eps: float) -> str:
        return g.op("LayerNormalization", x, *_affine(g, name, norm), axis=-1, epsilon=eps)

    def add_norm(
        self, g: GraphWriter, name: str, y: str, bias: Array | None, residual: str, norm: Norm, eps: float
    ) -> str:
        """One operator for the sum and the norm."""
        extra = [] if bias is None else [g.parameter(f"{name}.residual_bias", bias)]
        inputs = (y, residual, *_affine(g, name, norm), *extra)
        return g.op("SkipLayerNormalization", *inputs, domain=MICROSOFT, epsilon=eps)

    def expand(self, g: GraphWriter, name: str, layer: LayerWeights, x: str) -> str:
        return expand(g, name, layer, x, bias_gelu if self.dtype == np.float32 else gelu_of_sum)

    def first(self, g: GraphWriter, x: str) -> str:
        return g.op("Squeeze", x, g.ints(1))


class CpuDialect(FusedDialect):
    """ONNX Runtime's fused CPU operators; a batch holds documents of one length, so there is no mask.

    The flash path of MultiHeadAttention exists on the CPU only for fp32 without a mask: at 8,192 tokens it needs
    57 MiB where a masked call takes 3.2 GiB and seven times as long.
    """

    layout: Layout = "exact"
    dtype: FloatType = np.float32
    inputs: tuple[GraphInput, ...] = (INPUT_IDS,)
    opsets = {"": 20, MICROSOFT: 1}  # noqa: RUF012
    ir_version = 10

    def prepare(self, g: GraphWriter, spec: EncoderSpec) -> None:
        """RoPE caches, each [max_positions, head_size / 2]."""
        if spec.positions == "rope":
            rope_caches(g, spec)

    def position_rows(self, g: GraphWriter, spec: EncoderSpec) -> str:
        return _position_rows(g, spec)

    def attend(
        self, g: GraphWriter, name: str, layer: LayerWeights, spec: EncoderSpec, x: str, cls_only: bool
    ) -> tuple[str, str]:
        queries = _first_token(g, x) if cls_only else x
        q = g.project_and_add(queries, f"{name}.query", layer.query)
        k = g.project_and_add(x, f"{name}.key", layer.key)
        v = g.project(x, f"{name}.value", layer.value)
        if spec.positions == "rope":
            k = self._rotate(g, k, spec)
            q = q if cls_only else self._rotate(g, q, spec)
        return g.op("MultiHeadAttention", q, k, v, domain=MICROSOFT, num_heads=spec.n_attention_heads), queries

    def _rotate(self, g: GraphWriter, x: str, spec: EncoderSpec) -> str:
        # A position_ids of one element is the offset of the first token.
        inputs = (x, g.ints(0), "rope.cos", "rope.sin")
        return g.op("RotaryEmbedding", *inputs, domain=MICROSOFT, num_heads=spec.n_attention_heads)

    def mean(self, g: GraphWriter, spec: EncoderSpec, x: str) -> str:  # noqa: ARG002
        return g.op("ReduceMean", x, g.ints(1), keepdims=0)


class StandardDialect:
    """ONNX opset 23 and nothing else, for TensorRT, OpenVINO and any other runtime.

    `padded` batches come with a mask; where a batch holds documents of one `exact` length there is none. In fp16 the
    residual sums and norms, the mean and the heads are computed in fp32. No node states the precision of
    the softmax: TensorRT's parser refuses the attribute softmax_precision (TensorRT-RTX 1.7.1), and the precision
    inside of its fused kernel is its own.
    """

    opsets = {"": 23}  # noqa: RUF012
    ir_version = 11

    def __init__(self, layout: Layout, dtype: FloatType = np.float32) -> None:
        assert layout != "packed", "the standard has no packed attention"
        self.layout: Layout = layout
        self.dtype = dtype
        self.inputs: tuple[GraphInput, ...] = (INPUT_IDS, ATTENTION_MASK) if layout == "padded" else (INPUT_IDS,)

    def prepare(self, g: GraphWriter, spec: EncoderSpec) -> None:
        """`attend`: bool [B, 1, L, L]; `attend_first`: its first query; `positions`: int64 [B, L] for RoPE."""
        shape = g.op("Shape", "input_ids")
        length = g.op("Gather", shape, g.ints(1))
        if self.layout == "padded":
            mask = g.op("Unsqueeze", "attention_mask", g.ints(1, 2))
            mask = g.op("Cast", mask, to=TensorProto.BOOL, output="attend_first")
            # The operator lets a mask broadcast over the queries; ONNX Runtime 1.32 on the CPU refuses one that does.
            g.op("Expand", mask, g.op("Concat", g.ints(1, 1), length, g.ints(1), axis=0), output="attend")
        if spec.positions == "rope":
            rope_caches(g, spec)
            zero, one = g.weight("zero", np.array(0, np.int64)), g.weight("one", np.array(1, np.int64))
            g.op("Expand", g.op("Range", zero, g.op("Squeeze", length), one), shape, output="positions")

    def position_rows(self, g: GraphWriter, spec: EncoderSpec) -> str:
        return _position_rows(g, spec)

    def attend(
        self, g: GraphWriter, name: str, layer: LayerWeights, spec: EncoderSpec, x: str, cls_only: bool
    ) -> tuple[str, str]:
        queries = _first_token(g, x) if cls_only else x
        heads, qkv = spec.n_attention_heads, project_and_rotate(g, name, layer, spec, x, queries)
        masks = [] if self.layout == "exact" else ["attend_first" if cls_only else "attend"]
        return g.op("Attention", *qkv, *masks, q_num_heads=heads, kv_num_heads=heads), queries

    def norm(self, g: GraphWriter, name: str, x: str, norm: Norm, eps: float) -> str:
        return self._narrow(g, self._norm(g, name, self._widen(g, x), norm, eps))

    def add_norm(
        self, g: GraphWriter, name: str, y: str, bias: Array | None, residual: str, norm: Norm, eps: float
    ) -> str:
        y = self._widen(g, y)
        if bias is not None:
            y = g.op("Add", y, g.weight(f"{name}.residual_bias", bias))
        return self._narrow(g, self._norm(g, name, g.op("Add", y, self._widen(g, residual)), norm, eps))

    def _norm(self, g: GraphWriter, name: str, x: str, norm: Norm, eps: float) -> str:
        scale, shift = g.weight(f"{name}.weight", norm.weight), g.weight(f"{name}.bias", norm.bias)
        return g.op("LayerNormalization", x, scale, shift, axis=-1, epsilon=eps)

    def _widen(self, g: GraphWriter, x: str) -> str:
        return x if self.dtype == np.float32 else g.op("Cast", x, to=TensorProto.FLOAT)

    def _narrow(self, g: GraphWriter, x: str) -> str:
        return x if self.dtype == np.float32 else g.op("Cast", x, to=TensorProto.FLOAT16)

    def expand(self, g: GraphWriter, name: str, layer: LayerWeights, x: str) -> str:
        return expand(g, name, layer, x, self._gelu)

    def _gelu(self, g: GraphWriter, x: str, name: str, linear: Linear) -> str:
        return g.op("Gelu", g.project_and_add(x, name, linear))

    def first(self, g: GraphWriter, x: str) -> str:
        return g.op("Squeeze", x, g.ints(1))

    def mean(self, g: GraphWriter, spec: EncoderSpec, x: str) -> str:  # noqa: ARG002
        x = self._widen(g, x)  # a sum over thousands of tokens
        if self.layout == "exact":
            return g.op("ReduceMean", x, g.ints(1), keepdims=0)
        mask = g.op("Cast", g.op("Unsqueeze", "attention_mask", g.ints(2)), to=TensorProto.FLOAT)
        total = g.op("ReduceSum", g.op("Mul", x, mask), g.ints(1), keepdims=0)
        return g.op("Div", total, g.op("ReduceSum", mask, g.ints(1), keepdims=0))


def project_and_rotate(
    g: GraphWriter, name: str, layer: LayerWeights, spec: EncoderSpec, x: str, queries: str
) -> tuple[str, str, str]:
    """Queries, keys and values, where there is RoPE turned by ONNX's operator at `positions`.

    `queries` are the rows of x to ask for: all, or first tokens, which are at position 0 and not turned.
    """
    q = g.project_and_add(queries, f"{name}.query", layer.query)
    k = g.project_and_add(x, f"{name}.key", layer.key)
    v = g.project(x, f"{name}.value", layer.value)
    if spec.positions == "rope":
        turn, heads = ("rope.cos", "rope.sin", "positions"), spec.n_attention_heads
        k = g.op("RotaryEmbedding", k, *turn, num_heads=heads)
        q = g.op("RotaryEmbedding", q, *turn, num_heads=heads) if queries == x else q
    return q, k, v


def bias_gelu(g: GraphWriter, x: str, name: str, linear: Linear) -> str:
    """ONNX Runtime's gelu of a projection; its bias goes into the operator."""
    if linear.bias is None:
        return gelu_of_sum(g, x, name, linear)
    bias = g.parameter(f"{name}.bias", linear.bias)
    return g.op("BiasGelu", g.project(x, name, linear), bias, domain=MICROSOFT)


def gelu_of_sum(g: GraphWriter, x: str, name: str, linear: Linear) -> str:
    """The same for types narrower than fp32: BiasGelu rounds each step of its arithmetic, Gelu the result alone."""
    return g.op("Gelu", g.project_and_add(x, name, linear), domain=MICROSOFT)


def _affine(g: GraphWriter, name: str, norm: Norm) -> tuple[str, str]:
    return g.parameter(f"{name}.weight", norm.weight), g.parameter(f"{name}.bias", norm.bias)


def rope_caches(g: GraphWriter, spec: EncoderSpec) -> None:
    """Cos and sin of position * frequency, each [max_positions, head_size / 2]: angles in fp32, as the reference."""
    assert spec.inverse_frequencies is not None
    angles = np.arange(spec.max_positions, dtype=np.float32)[:, None] * spec.inverse_frequencies
    g.parameter("rope.cos", np.cos(angles))
    g.parameter("rope.sin", np.sin(angles))


def _first_token(g: GraphWriter, x: str) -> str:
    return g.op("Slice", x, g.ints(0), g.ints(1), g.ints(1))


def expand(
    g: GraphWriter, name: str, layer: LayerWeights, x: str, gelu: Callable[[GraphWriter, str, str, Linear], str]
) -> str:
    """gelu(gate) * up, or gelu(up), each of them a product; `gelu` projects as well."""
    if layer.gate is None:
        return gelu(g, x, f"{name}.up", layer.up)
    up = g.project_and_add(x, f"{name}.up", layer.up)
    return g.op("Mul", gelu(g, x, f"{name}.gate", layer.gate), up)


def _position_rows(g: GraphWriter, spec: EncoderSpec) -> str:
    """The rows themselves for a rectangle of ids, [L, D] or [B, L, D]."""
    if not spec.counts_from_pad:
        length = g.op("Gather", g.op("Shape", "input_ids"), g.ints(1))
        return g.op("Slice", "position", g.ints(0), length, g.ints(0))
    return g.op("Gather", "position", counted_positions(g, spec))


def counted_positions(g: GraphWriter, spec: EncoderSpec) -> str:
    """XLM-R's row of each token [B, L]: 0 for a pad id, else how many other ids the document has up to it."""
    is_pad = g.op("Equal", "input_ids", g.weight("pad", np.array(spec.pad_id, np.int64)))
    counted = g.op("Cast", g.op("Not", is_pad), to=TensorProto.INT64)
    axis = g.weight("one", np.array(1, np.int64))
    return g.op("Mul", g.op("CumSum", counted, axis), counted)
