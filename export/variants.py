"""The graphs that export can write, by the name of their variant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from ml_dtypes import bfloat16

from jql_engine.data import Layout
from jql_export.graph.cpu import CpuDialect
from jql_export.graph.cuda_packed import CudaDialect
from jql_export.graph.cuda_padded import PaddedCudaDialect
from jql_export.graph.dialect import Dialect
from jql_export.graph.standard import StandardDialect


@dataclass(frozen=True, slots=True)
class VariantKind:
    """What a --variant name stands for."""

    dialect: Callable[[], Dialect]
    precision: str
    provider: str  # the session it is written for; "any" runs with ONNX Runtime on the CPU too
    graph: str  # variants that differ in what a runtime makes of it share a graph

    @property
    def layout(self) -> Layout:
        """How it takes a batch."""
        return self.dialect().layout


VARIANTS = {
    "cpu-fp32": VariantKind(CpuDialect, "fp32", "cpu", "cpu-fp32.onnx"),
    "openvino-fp32": VariantKind(lambda: StandardDialect("exact"), "fp32", "openvino", "openvino.onnx"),
    "openvino-bf16": VariantKind(lambda: StandardDialect("exact"), "bf16", "openvino", "openvino.onnx"),
    "standard-fp32": VariantKind(lambda: StandardDialect("padded"), "fp32", "any", "standard-fp32.onnx"),
    "tensorrt-fp16": VariantKind(
        lambda: StandardDialect("padded", np.float16), "fp16", "tensorrt", "tensorrt-fp16.onnx"
    ),
    "cuda-fp16": VariantKind(lambda: CudaDialect(np.float16), "fp16", "cuda", "cuda-fp16.onnx"),
    "cuda-bf16": VariantKind(lambda: PaddedCudaDialect(bfloat16), "bf16", "cuda", "cuda-bf16.onnx"),
    "cuda-fp32": VariantKind(lambda: CudaDialect(np.float32), "fp32", "cuda", "cuda-fp32.onnx"),
}
