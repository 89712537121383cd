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
from jql_export.graph.windows import MASK, blocks_of, joined, prepare_windows, seen_by_first
from jql_export.graph.writer import FloatType, GraphInput, GraphWriter


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
            prepare_windows(g, spec)
            zero, never = (
                g.weight(f"window.{n}", np.array(v, np.float32)) for n, v in (("seen", 0), ("unseen", -1e30))
            )
            g.op("Where", MASK, zero, never, output="window.bias")

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
        q, k, v = blocks_of(g, q, k, v, spec)
        scale = g.weight("window.scale", np.array(spec.head_size**-0.5, np.float32))
        scores = g.op("MatMul", g.op("Mul", q, scale), g.op("Transpose", k, perm=[0, 1, 3, 2]))
        shares = g.op("Softmax", g.op("Add", scores, "window.bias"), axis=-1)
        return joined(g, g.op("MatMul", shares, v), spec)

    def _rotate(self, g: GraphWriter, x: str, layer: LayerWeights, spec: EncoderSpec) -> str:
        # A position_ids of one element is the offset of the first token.
        inputs = (x, g.ints(0), *caches_of(layer))
        return g.op("RotaryEmbedding", *inputs, domain=MICROSOFT, num_heads=spec.n_attention_heads)

    def mean(self, g: GraphWriter, spec: EncoderSpec, x: str) -> str:  # noqa: ARG002
        return g.op("ReduceMean", x, g.ints(1), keepdims=0)
