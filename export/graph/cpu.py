"""The encoder in ONNX Runtime's fused operators for the CPU."""

from __future__ import annotations

import numpy as np

from jql_engine.data import Layout
from jql_export.families.base import EncoderSpec, LayerWeights
from jql_export.graph.dialect import INPUT_IDS, MICROSOFT, FusedDialect, first_token, rope_caches, rows_of_positions
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
            k = self._rotate(g, k, spec)
            q = q if cls_only else self._rotate(g, q, spec)
        return g.op("MultiHeadAttention", q, k, v, domain=MICROSOFT, num_heads=spec.n_attention_heads), queries

    def _rotate(self, g: GraphWriter, x: str, spec: EncoderSpec) -> str:
        # A position_ids of one element is the offset of the first token.
        inputs = (x, g.ints(0), "rope.cos", "rope.sin")
        return g.op("RotaryEmbedding", *inputs, domain=MICROSOFT, num_heads=spec.n_attention_heads)

    def mean(self, g: GraphWriter, spec: EncoderSpec, x: str) -> str:  # noqa: ARG002
        return g.op("ReduceMean", x, g.ints(1), keepdims=0)
