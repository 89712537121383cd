"""The encoder in ONNX Runtime's fused operators for the CPU."""

from __future__ import annotations

import numpy as np

from jql_engine.data import Layout
from jql_export.families.base import EncoderSpec, LayerWeights
from jql_export.graph.dialect import (
    INPUT_IDS,
    MICROSOFT,
    FusedDialect,
    caches_of,
    first_token,
    rope_caches,
    rows_of_positions,
)
from jql_export.graph.windows import (
    BIAS,
    HEAD_KEYS,
    HEAD_QUERIES,
    joined_heads,
    number_rectangle,
    prepare_heads,
    prepare_windows,
    rows,
    seen_by_first,
    unseen_bias,
)
from jql_export.graph.writer import FloatType, GraphInput, GraphWriter

# Tokens whose windows are computed together: their scores stay in the cache (benchmarks/windows.py).
TOGETHER = 512
# Scores further below the largest of their row count as so far below: exp(-60) is nothing to a sum of 1 or more in
# fp32, and the subnormal numbers that exp gives further down take six times as long on an Intel Xeon.
FURTHEST = 60.0


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
        if spec.window is not None:
            prepare_windows(g, spec, number_rectangle(g), max(1, TOGETHER // spec.window))
            prepare_heads(g, spec)
            unseen_bias(g)

    def position_rows(self, g: GraphWriter, spec: EncoderSpec) -> str:
        return rows_of_positions(g, spec)

    def attend(
        self, g: GraphWriter, name: str, layer: LayerWeights, spec: EncoderSpec, x: str, cls_only: bool
    ) -> tuple[str, str]:
        queries = first_token(g, x) if cls_only else x
        q = g.project_and_add(queries, f"{name}.query", layer.query)
        k = g.project_and_add(x, f"{name}.key", layer.key)
        v = g.project(x, f"{name}.value", layer.value)
        if spec.positions == "rope":
            k = self._rotate(g, k, layer, spec)
            q = q if cls_only else self._rotate(g, q, layer, spec)
        if layer.windowed and not cls_only:
            return self._windowed(g, q, k, v, spec), queries
        if layer.windowed:
            k, v = (seen_by_first(g, one, spec) for one in (k, v))
        return g.op("MultiHeadAttention", q, k, v, domain=MICROSOFT, num_heads=spec.n_attention_heads), queries

    def _windowed(self, g: GraphWriter, q: str, k: str, v: str, spec: EncoderSpec) -> str:
        q, k, v = (rows(g, x, spec.head_size) for x in (q, k, v))
        furthest = g.weight("window.furthest", np.array(FURTHEST, np.float32))

        def contexts(b: GraphWriter, queries: str, keys: str, bias: str) -> str:
            """[blocks, heads, w, d] of one group of blocks."""
            pairs = b.op("Gather", q, queries), b.op("Gather", k, keys)
            scores = b.op("FusedMatMul", *pairs, domain=MICROSOFT, transB=1, alpha=spec.head_size**-0.5)
            scores = b.op("Add", scores, bias)
            least = b.op("Sub", b.op("ReduceMax", scores, g.ints(-1)), furthest)
            shares = b.op("Softmax", b.op("Max", scores, least), axis=-1)
            return b.op("MatMul", shares, b.op("Gather", v, keys))

        return joined_heads(g, g.scan(contexts, HEAD_QUERIES, HEAD_KEYS, BIAS), spec)

    def _rotate(self, g: GraphWriter, x: str, layer: LayerWeights, spec: EncoderSpec) -> str:
        # A position_ids of one element is the offset of the first token.
        inputs = (x, g.ints(0), *caches_of(layer))
        return g.op("RotaryEmbedding", *inputs, domain=MICROSOFT, num_heads=spec.n_attention_heads)

    def mean(self, g: GraphWriter, spec: EncoderSpec, x: str) -> str:  # noqa: ARG002
        return g.op("ReduceMean", x, g.ints(1), keepdims=0)
