"""The padded graph of ONNX Runtime's CUDA provider, for types that its packed attention does not take: bf16.

Inputs are those of a padded graph; every document begins at the left of its row and has a token. Attention is ONNX's
own operator with the length of each row, which the provider computes with flash attention; its MultiHeadAttention has
no fast kernel for rows of different lengths. As in the packed graph no node computes with shapes.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from jql_engine.data import Layout
from jql_export.families.base import EncoderSpec, LayerWeights
from jql_export.graph.dialect import (
    ATTENTION_MASK,
    INPUT_IDS,
    MICROSOFT,
    FusedDialect,
    counted_positions,
    project_and_rotate,
    rope_caches,
)
from jql_export.graph.windows import BIAS, blocks_of, joined, number_rectangle, prepare_windows, unseen_bias
from jql_export.graph.writer import FloatType, GraphInput, GraphWriter


class PaddedCudaDialect(FusedDialect):
    """ONNX Runtime's fused CUDA operators around ONNX's attention of opset 24; activations are [B, L, D].

    Rotary embedding is the standard's as well.
    """

    layout: Layout = "padded"
    inputs: tuple[GraphInput, ...] = (INPUT_IDS, ATTENTION_MASK)
    opsets = {"": 24, MICROSOFT: 1}  # noqa: RUF012
    ir_version = 11

    def __init__(self, dtype: FloatType) -> None:
        self.dtype = dtype

    def prepare(self, g: GraphWriter, spec: EncoderSpec) -> None:
        """`lengths`: int64 [B]; `positions`: int64 [B, L], in the padding that of the last token; RoPE caches."""
        one = g.weight("one", np.array(1, np.int64))
        counted = g.op("CumSum", "attention_mask", one)
        g.op("Gather", counted, g.weight("last", np.array(-1, np.int64)), axis=1, output="lengths")
        g.op("Sub", counted, one, output="positions")
        if spec.positions == "rope":
            rope_caches(g, spec)
        if spec.window is not None:
            prepare_windows(g, spec, number_rectangle(g, "attention_mask"))
            unseen_bias(g)

    def position_rows(self, g: GraphWriter, spec: EncoderSpec) -> str:
        return g.op("Gather", "position", counted_positions(g, spec) if spec.counts_from_pad else "positions")

    def attend(
        self, g: GraphWriter, name: str, layer: LayerWeights, spec: EncoderSpec, x: str, cls_only: bool
    ) -> tuple[str, str]:
        heads, first = spec.n_attention_heads, g.ints(0)
        queries = g.op("Gather", x, first, axis=1) if cls_only else x
        qkv = project_and_rotate(g, name, layer, spec, x, x if layer.windowed else queries)
        if not layer.windowed:
            lengths = ("", "", "", "lengths")
            return g.op("Attention", *qkv, *lengths, q_num_heads=heads, kv_num_heads=heads), queries
        blocks = blocks_of(g, qkv, spec.hidden_size)
        context = joined(g, g.op("Attention", *blocks, BIAS, q_num_heads=heads, kv_num_heads=heads), spec)
        return g.op("Gather", context, first, axis=1) if cls_only else context, queries

    def mean(self, g: GraphWriter, spec: EncoderSpec, x: str) -> str:  # noqa: ARG002
        """A product, since a sum over the middle axis would need cuDNN."""
        mask = g.op("Cast", g.op("Unsqueeze", "attention_mask", g.ints(1)), to=TensorProto.FLOAT)
        total = g.op("MatMul", mask, g.op("Cast", x, to=TensorProto.FLOAT))
        n_tokens = g.op("Cast", g.op("Unsqueeze", "lengths", g.ints(1)), to=TensorProto.FLOAT)
        return g.op("Div", g.op("Squeeze", total, g.ints(1)), n_tokens)
