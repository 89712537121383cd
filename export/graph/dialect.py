"""What a runtime's operators must offer to write an encoder, and what several of them write alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from onnx import TensorProto

from jql_engine.data import Layout
from jql_export.families.base import EncoderSpec, LayerWeights
from jql_export.graph.writer import FloatType, GraphInput, GraphWriter
from jql_export.tensors import Array, Linear, Norm

MICROSOFT = "com.microsoft"
INPUT_IDS = GraphInput("input_ids", ("B", "L"))
ATTENTION_MASK = GraphInput("attention_mask", ("B", "L"))
Activate = Callable[[GraphWriter, str, str, Linear], str]  # projects, and activates


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

    def expand(self, g: GraphWriter, name: str, layer: LayerWeights, spec: EncoderSpec, x: str) -> str:
        """The wide inside of the MLP: act(gate) * up, or act(up); gelu is the exact one, with erf."""

    def first_tokens(self, g: GraphWriter, x: str) -> str:
        """What a layer for first tokens alone would give, of a layer for all."""

    def first(self, g: GraphWriter, x: str) -> str:
        """[B, D] from what a layer for first tokens gives."""

    def mean(self, g: GraphWriter, spec: EncoderSpec, x: str) -> str:
        """Mean over the tokens of each document, [B, D]."""


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

    def expand(self, g: GraphWriter, name: str, layer: LayerWeights, spec: EncoderSpec, x: str) -> str:
        return expand(g, name, layer, spec, x, bias_gelu if self.dtype == np.float32 else gelu_of_sum)

    def first_tokens(self, g: GraphWriter, x: str) -> str:
        return first_token(g, x)

    def first(self, g: GraphWriter, x: str) -> str:
        return g.op("Squeeze", x, g.ints(1))


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
        turn, heads = (*caches_of(layer), "positions"), spec.n_attention_heads
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
    for prefix, frequencies in (("rope", spec.inverse_frequencies), ("rope.window", spec.window_frequencies)):
        if frequencies is not None:
            angles = np.arange(spec.max_positions, dtype=np.float32)[:, None] * frequencies
            g.parameter(f"{prefix}.cos", np.cos(angles))
            g.parameter(f"{prefix}.sin", np.sin(angles))


def caches_of(layer: LayerWeights) -> tuple[str, str]:
    """The names of a layer's RoPE caches."""
    prefix = "rope.window" if layer.windowed else "rope"
    return f"{prefix}.cos", f"{prefix}.sin"


def first_token(g: GraphWriter, x: str) -> str:
    """The first token of each document, [B, 1, D] of x [B, L, D]."""
    return g.op("Slice", x, g.ints(0), g.ints(1), g.ints(1))


def expand(g: GraphWriter, name: str, layer: LayerWeights, spec: EncoderSpec, x: str, gelu: Activate) -> str:
    """act(gate) * up, or act(up), each of them a product; `gelu` projects as well."""
    activate = gelu if spec.activation == "gelu" else silu
    if layer.gate is None:
        return activate(g, x, f"{name}.up", layer.up)
    up = g.project_and_add(x, f"{name}.up", layer.up)
    return g.op("Mul", activate(g, x, f"{name}.gate", layer.gate), up)


def silu(g: GraphWriter, x: str, name: str, linear: Linear) -> str:
    """Y sigmoid(y) of a projection y."""
    y = g.project_and_add(x, name, linear)
    return g.op("Mul", y, g.op("Sigmoid", y))


def rows_of_positions(g: GraphWriter, spec: EncoderSpec) -> str:
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
