"""What the chip can give: GFLOP/s of a large matrix product, by each library that an encoder runs with."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import numpy as np

from benchmarks.table import Row

Product = Callable[[np.ndarray], object]
ROWS, IN, OUT = 2048, 768, 3072


def ceilings(bf16: bool) -> list[Row]:
    """Rows for x [2048, 768] times w [768, 3072]."""
    values = np.random.default_rng(0).standard_normal(ROWS * IN + IN * OUT, np.float32)
    x, w = values[: ROWS * IN].reshape(ROWS, IN), values[ROWS * IN :].reshape(IN, OUT)
    products = [("onnxruntime", "fp32", onnx_product(w)), ("torch", "fp32", _torch_product(w, bf16=False))]
    if bf16:
        products += [("torch", "bf16", _torch_product(w, bf16=True))]
        products += [("openvino", kind, product) for kind, product in _openvino_products(w)]
    return [_measure(f"matrix product, {name}", kind, product, x) for name, kind, product in products]


def _measure(name: str, kind: str, product: Product, x: np.ndarray) -> Row:
    product(x)
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        product(x)
        seconds.append(time.perf_counter() - start)
    row = Row("ceiling", name, kind, 0, 0, [round(s, 5) for s in seconds])
    row.gflops = round(2 * ROWS * IN * OUT / statistics.median(seconds) / 1e9, 1)
    return row


def onnx_product(w: np.ndarray) -> Product:
    """ONNX Runtime's product with `w`, fp32."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "product", [x], [y], [numpy_helper.from_array(w, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda value: session.run(None, {"x": value})


def _torch_product(w: np.ndarray, bf16: bool) -> Product:
    import torch

    dtype = torch.bfloat16 if bf16 else torch.float32
    weight = torch.from_numpy(np.ascontiguousarray(w.T)).to(dtype)
    return lambda value: torch.nn.functional.linear(torch.from_numpy(value).to(dtype), weight)


def _openvino_products(w: np.ndarray) -> list[tuple[str, Product]]:
    try:
        import openvino
        from openvino import opset13 as op
    except ImportError:
        return []

    def compiled(hint: str) -> Product:
        x = op.parameter([ROWS, IN], np.float32)
        model = openvino.Model([op.matmul(x, op.constant(w), False, False)], [x])
        settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0))}
        request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
        return lambda value: request.infer({0: value})

    return [("fp32", compiled("f32")), ("bf16", compiled("bf16"))]
