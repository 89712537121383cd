"""The encoder in plain ONNX, for TensorRT, OpenVINO and any other runtime."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from jql_engine.data import Layout
from jql_export.families.base import EncoderSpec, LayerWeights
from jql_export.graph.dialect import (
    ATTENTION_MASK,
    INPUT_IDS,
    expand,
    first_token,
    project_and_rotate,
    rope_caches,
    rows_of_positions,
)
from jql_export.graph.windows import (
    HEAD_BLOCKS,
    MASK,
    blocks_of,
    joined_heads,
    number_rectangle,
    prepare_heads,
    prepare_windows,
    seen_by_first,
)
from jql_export.graph.writer import FloatType, GraphInput, GraphWriter
from jql_export.tensors import Array, Linear, Norm


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
        if spec.window is not None:
            prepare_windows(g, spec, number_rectangle(g, "attention_mask" if self.layout == "padded" else None))
            prepare_heads(g, spec)

    def position_rows(self, g: GraphWriter, spec: EncoderSpec) -> str:
        return rows_of_positions(g, spec)

    def attend(
        self, g: GraphWriter, name: str, layer: LayerWeights, spec: EncoderSpec, x: str, cls_only: bool
    ) -> tuple[str, str]:
        queries = first_token(g, x) if cls_only else x
        heads, qkv = spec.n_attention_heads, project_and_rotate(g, name, layer, spec, x, queries)
        if layer.windowed and not cls_only:
            blocks = blocks_of(g, qkv, spec.head_size, HEAD_BLOCKS)
            return joined_heads(g, g.op("Attention", *blocks, MASK), spec), queries
        masks = [] if self.layout == "exact" else ["attend_first" if cls_only else "attend"]
        if layer.windowed:
            qkv = (qkv[0], seen_by_first(g, qkv[1], spec), seen_by_first(g, qkv[2], spec))
            masks = [seen_by_first(g, mask, spec, axis=3) for mask in masks]
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

    def expand(self, g: GraphWriter, name: str, layer: LayerWeights, spec: EncoderSpec, x: str) -> str:
        return expand(g, name, layer, spec, x, self._gelu)

    def _gelu(self, g: GraphWriter, x: str, name: str, linear: Linear) -> str:
        return g.op("Gelu", g.project_and_add(x, name, linear))

    def first_tokens(self, g: GraphWriter, x: str) -> str:
        return first_token(g, x)

    def first(self, g: GraphWriter, x: str) -> str:
        return g.op("Squeeze", x, g.ints(1))

    def mean(self, g: GraphWriter, spec: EncoderSpec, x: str) -> str:  # noqa: ARG002
        x = self._widen(g, x)  # a sum over thousands of tokens
        if self.layout == "exact":
            return g.op("ReduceMean", x, g.ints(1), keepdims=0)
        mask = g.op("Cast", g.op("Unsqueeze", "attention_mask", g.ints(2)), to=TensorProto.FLOAT)
        total = g.op("ReduceSum", g.op("Mul", x, mask), g.ints(1), keepdims=0)
        return g.op("Div", total, g.op("ReduceSum", mask, g.ints(1), keepdims=0))
