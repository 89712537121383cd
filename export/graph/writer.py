"""Nodes and weights of an ONNX graph, collected one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from ml_dtypes import bfloat16
from numpy.typing import NDArray
from onnx import TensorProto, helper

from jql_engine.errors import CheckpointError
from jql_export.tensors import Array, Linear

FloatType = type[np.float32] | type[np.float16] | type[bfloat16]
# Weights from this size on lie outside of the graph, where a runtime can map them into memory.
EXTERNAL_BYTES = 1024


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
    prefix: str = ""  # of names, inside of another graph
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
        names = [name or f"{self.prefix}{op_type}_{number}" + (f"_{i}" if i else "") for i, name in enumerate(outputs)]
        node = helper.make_node(op_type, list(inputs), names, name=names[0], domain=domain, **attributes)
        self.nodes.append(node)
        return names

    def scan(self, body: Callable[..., str], *inputs: str) -> str:
        """Stack `body(writer, *slices)` over the slices of the first axis of `inputs`, one after another.

        `body` adds its nodes to the writer that it gets, and may use names and weights of this one.
        """
        prefix = f"{self.prefix}Scan_{len(self.nodes)}."
        inner = GraphWriter(self.dtype, self.flat, prefix, weights=self.weights)
        slices = [helper.make_empty_tensor_value_info(prefix + name) for name in inputs]
        result = helper.make_empty_tensor_value_info(body(inner, *(value.name for value in slices)))
        graph = helper.make_graph(inner.nodes, prefix + "body", slices, [result])
        return self.op("Scan", *inputs, body=graph, num_scan_inputs=len(inputs))

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
