"""The packed graph of ONNX Runtime's CUDA provider: the documents of a batch one after another, without padding.

Inputs, for B documents of T tokens in all, the longest of S tokens:

    input_ids     int64 [T]
    position_ids  int64 [1, T]    counts from 0 in each document
    cu_seqlens    int32 [B + 1]   where each document starts, and T
    token_offset  int32 [B, S]    where the tokens lie in a rectangle [B, S], then where its padding does; kernels other
                                  than flash attention read it
    cls_index     int64 [B]       where each document starts

No node computes with shapes: what consumes a shape runs on the CPU, and a session that may not use the CPU would refuse
the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import TensorProto

from jql_engine.data import Layout
from jql_export.families.base import EncoderSpec, LayerWeights
from jql_export.graph.dialect import MICROSOFT, FusedDialect, caches_of, rope_caches
from jql_export.graph.windows import BIAS, TOKENS, blocks_of, joined, prepare_windows, unseen_bias
from jql_export.graph.writer import FloatType, GraphInput, GraphWriter
from jql_export.tensors import Linear

# Widths of each half for which BiasSplitGelu has a kernel.
SPLIT_GELU_WIDTHS = (1280, 2560, 3072, 5120, 6144)


class CudaDialect(FusedDialect):
    """ONNX Runtime's fused CUDA operators; activations are [T, D].

    RotaryEmbedding and BiasSplitGelu take three dimensions: a first one of 1 is put before the two and taken off again,
    which moves no data. What could be faster is tried in benchmarks.gpu.alternatives.
    """

    layout: Layout = "packed"
    inputs: tuple[GraphInput, ...] = (
        GraphInput("input_ids", ("T",)),
        GraphInput("position_ids", (1, "T")),
        GraphInput("cu_seqlens", ("B_plus_1",), TensorProto.INT32),
        GraphInput("token_offset", ("B", "S"), TensorProto.INT32),
        GraphInput("cls_index", ("B",)),
    )
    opsets: dict[str, int] = {"": 24, MICROSOFT: 1}  # noqa: RUF012
    ir_version = 11

    def __init__(self, dtype: FloatType = np.float16) -> None:
        self.dtype = dtype

    def prepare(self, g: GraphWriter, spec: EncoderSpec) -> None:
        """RoPE caches, each [max_positions, head_size / 2]."""
        if spec.positions == "rope":
            rope_caches(g, spec)
        if spec.window is not None:
            prepare_windows(g, spec, _numbered(g))
            unseen_bias(g)

    def position_rows(self, g: GraphWriter, spec: EncoderSpec) -> str:
        positions = g.op("Squeeze", "position_ids", g.ints(0))
        return g.op("Gather", "position", _counted(g, spec, positions) if spec.counts_from_pad else positions)

    def attend(
        self, g: GraphWriter, name: str, layer: LayerWeights, spec: EncoderSpec, x: str, cls_only: bool
    ) -> tuple[str, str]:
        """See Dialect.

        Queries are of as many tokens as keys in the packed operator: for first tokens alone it is the context that is
        cut. Their queries need no rotation, and nobody looks at the others.
        """
        q, k, v = self.project(g, name, layer, x)
        if spec.positions == "rope":
            k = self.rotate(g, k, layer, spec)
            q = q if cls_only else self.rotate(g, q, layer, spec)
        context = (_windowed if layer.windowed else _attention)(g, q, k, v, spec)
        return (first_rows(g, context), first_rows(g, x)) if cls_only else (context, x)

    def project(self, g: GraphWriter, name: str, layer: LayerWeights, x: str) -> Sequence[str]:
        """Queries, keys and values; the bias of the last is in the output projection."""
        q = g.project_and_add(x, f"{name}.query", layer.query)
        k = g.project_and_add(x, f"{name}.key", layer.key)
        return q, k, g.project(x, f"{name}.value", layer.value)

    def rotate(self, g: GraphWriter, x: str, layer: LayerWeights, spec: EncoderSpec) -> str:
        """RoPE of each head, of queries or keys."""
        return rotated(g, x, layer, spec.n_attention_heads)

    def expand(self, g: GraphWriter, name: str, layer: LayerWeights, spec: EncoderSpec, x: str) -> str:
        """Up and gate are one product where one kernel takes both: a split would only move them."""
        width = len(layer.up.weight)
        if layer.gate is None or spec.activation != "gelu" or width not in SPLIT_GELU_WIDTHS:
            return super().expand(g, name, layer, spec, x)
        merged, name = stacked(layer.up, layer.gate), f"{name}.up_gate"
        bias = np.zeros(2 * width, np.float32) if merged.bias is None else merged.bias
        both = g.op("Unsqueeze", g.project(x, name, merged), g.ints(0))
        y = g.op("BiasSplitGelu", both, g.parameter(f"{name}.bias", bias), domain=MICROSOFT)
        return g.op("Squeeze", y, g.ints(0))

    def first_tokens(self, g: GraphWriter, x: str) -> str:
        return first_rows(g, x)

    def first(self, g: GraphWriter, x: str) -> str:  # noqa: ARG002
        """See Dialect; `attend` has left nothing else."""
        return x

    def mean(self, g: GraphWriter, spec: EncoderSpec, x: str) -> str:
        """See Dialect.

        Attention whose queries and keys are zero weighs every token of a document alike: what it gives is the mean,
        summed up in fp32 by the kernels.
        """
        zeros = g.op("Mul", x, g.parameter("no_query", np.zeros((), np.float32)))
        return first_rows(g, _attention(g, zeros, zeros, x, spec))


def _attention(g: GraphWriter, q: str, k: str, v: str, spec: EncoderSpec) -> str:
    inputs = (q, k, v, "", "token_offset", "cu_seqlens")
    return g.op("PackedMultiHeadAttention", *inputs, domain=MICROSOFT, num_heads=spec.n_attention_heads)


def _windowed(g: GraphWriter, q: str, k: str, v: str, spec: EncoderSpec) -> str:
    """ONNX's operator: com.microsoft's needs cuDNN where it gets a bias (1.31)."""
    heads = spec.n_attention_heads
    blocks = blocks_of(g, (q, k, v), spec.hidden_size)
    return joined(g, g.op("Attention", *blocks, BIAS, q_num_heads=heads, kv_num_heads=heads), spec)


def _numbered(g: GraphWriter) -> str:
    """Number the tokens as TOKENS; return the numbers of their documents [T], from 1."""
    zero, one = g.weight("zero", np.array(0, np.int64)), g.weight("one", np.array(1, np.int64))
    positions = g.op("Squeeze", "position_ids", g.ints(0))
    each, first = (g.op("Cast", g.op("Equal", positions, x), to=TensorProto.INT64) for x in (positions, zero))
    g.op("Sub", g.op("CumSum", each, zero), one, output=TOKENS)
    return g.op("CumSum", first, zero)


def rotated(g: GraphWriter, x: str, layer: LayerWeights, n_heads: int, interleaved: bool = False) -> str:
    """RotaryEmbedding of [T, D]: the halves of each head are turned, or, `interleaved`, neighbors."""
    row = g.op("Unsqueeze", x, g.ints(0))
    # Without is_packed_batching the operator refuses more tokens than the caches have positions.
    settings: dict[str, Any] = {"num_heads": n_heads, "interleaved": int(interleaved), "is_packed_batching": 1}
    y = g.op("RotaryEmbedding", row, "position_ids", *caches_of(layer), domain=MICROSOFT, **settings)
    return g.op("Squeeze", y, g.ints(0))


def first_rows(g: GraphWriter, x: str) -> str:
    """Rows of every document's first token [B]."""
    return g.op("Gather", x, "cls_index")


def stacked(*linears: Linear) -> Linear:
    """One projection that gives what each of `linears` does, side by side."""
    weight = np.concatenate([linear.weight for linear in linears])
    if all(linear.bias is None for linear in linears):
        return Linear(weight, None)
    biases = [np.zeros(len(x.weight), np.float32) if x.bias is None else x.bias for x in linears]
    return Linear(weight, np.concatenate(biases))


def _counted(g: GraphWriter, spec: EncoderSpec, positions: str) -> str:
    """XLM-R's row of each token [T]: 0 for a pad id, else how many other ids the document has up to it."""
    zero, one = g.weight("zero", np.array(0, np.int64)), g.weight("one", np.array(1, np.int64))
    is_pad = g.op("Equal", "input_ids", g.weight("pad", np.array(spec.pad_id, np.int64)))
    counted = g.op("Cast", g.op("Not", is_pad), to=TensorProto.INT64)
    total = g.op("CumSum", counted, zero)
    before = g.op("Gather", g.op("Sub", total, counted), "cls_index")  # [B], counted in the documents before
    is_first = g.op("Cast", g.op("Equal", positions, zero), to=TensorProto.INT64)
    document = g.op("Sub", g.op("CumSum", is_first, zero), one)  # [T], its number
    return g.op("Mul", g.op("Sub", total, g.op("Gather", before, document)), counted)
