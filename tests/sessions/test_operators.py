"""tests.operators against ONNX Runtime's own on the CPU, and against PyTorch where it has none."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator
from torch.nn import functional

from jql_export.graph.dialect import MICROSOFT
from tests.operators import OPERATORS


def model_of(op_type, inputs, **attributes):
    """A model of one node, None where an optional input is left out, and its feeds."""
    feeds = {f"x{i}": x for i, x in enumerate(inputs) if x is not None}
    types = {name: helper.np_dtype_to_tensor_dtype(x.dtype) for name, x in feeds.items()}
    values = [helper.make_tensor_value_info(name, types[name], x.shape) for name, x in feeds.items()]
    names = ["" if x is None else f"x{i}" for i, x in enumerate(inputs)]
    node = helper.make_node(op_type, names, ["y"], domain=MICROSOFT, **attributes)
    graph = helper.make_graph([node], "one", values, [helper.make_tensor_value_info("y", types["x0"], None)])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10), feeds


def compute(op_type, inputs, **attributes):
    model, feeds = model_of(op_type, inputs, **attributes)
    return ReferenceEvaluator(model, new_ops=OPERATORS).run(None, feeds)[0]


def assert_that_of_onnx_runtime(op_type, inputs, **attributes):
    model, feeds = model_of(op_type, inputs, **attributes)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, feeds)[0]
    np.testing.assert_allclose(compute(op_type, inputs, **attributes), expected, rtol=0, atol=1e-5)


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("positions", [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 0, 1, 0, 6]], ids=str)
@pytest.mark.parametrize("packed", [0, 1])
@pytest.mark.parametrize("interleaved", [0, 1])
def test_rotary_embedding(positions, packed, interleaved):
    inputs = [normal(1, 7, 12), np.array([positions]), normal(7, 2), normal(7, 2)]
    settings = {"num_heads": 3, "is_packed_batching": packed, "interleaved": interleaved}
    assert_that_of_onnx_runtime("RotaryEmbedding", inputs, **settings)


def test_rotary_embedding_of_more_tokens_than_positions_where_they_are_packed():
    inputs = [normal(1, 7, 12), np.array([[0, 1, 2, 0, 1, 0, 2]]), normal(3, 2), normal(3, 2)]
    assert_that_of_onnx_runtime("RotaryEmbedding", inputs, num_heads=3, is_packed_batching=1)
    with pytest.raises(AssertionError, match="more tokens than positions"):
        compute("RotaryEmbedding", inputs, num_heads=3)


@pytest.mark.parametrize("n_inputs", [4, 5])
def test_skip_layer_normalization(n_inputs):
    inputs = [normal(5, 16), normal(5, 16) * 3, normal(16), normal(16) * 2, normal(16) + 1][:n_inputs]
    assert_that_of_onnx_runtime("SkipLayerNormalization", inputs, epsilon=1e-5)


def test_gelu():
    assert_that_of_onnx_runtime("Gelu", [normal(5, 16) * 3])


def test_bias_gelu():
    assert_that_of_onnx_runtime("BiasGelu", [normal(5, 16) * 3, normal(16)])


def test_bias_split_gelu_is_the_left_half_times_gelu_of_the_right_one():
    x, bias = normal(1, 3, 2560), normal(2560)
    left, right = (torch.from_numpy(x) + torch.from_numpy(bias)).chunk(2, dim=-1)
    expected = (left * functional.gelu(right)).numpy()
    np.testing.assert_allclose(compute("BiasSplitGelu", [x, bias]), expected, rtol=0, atol=1e-5)


def half(*shape):
    return normal(*shape).astype(np.float16)


def test_in_half_sums_are_rounded_before_the_norm_and_before_gelu():
    x, skip, bias, gamma, beta = half(5, 16) * 40, half(5, 16) * 9, half(16), half(16), half(16) + 1
    settings = {"epsilon": 1e-5}
    found = compute("SkipLayerNormalization", [x, skip, gamma, beta, bias], **settings)
    rounded = ((x + bias) + skip).astype(np.float16)
    expected = compute("SkipLayerNormalization", [rounded, np.zeros_like(x), gamma, beta], **settings)
    np.testing.assert_array_equal(found, expected)
    x, bias = half(1, 3, 2560) * 3, half(2560)
    expected = compute("BiasSplitGelu", [(x + bias).astype(np.float16), np.zeros_like(bias)])
    np.testing.assert_array_equal(compute("BiasSplitGelu", [x, bias]), expected)


def test_in_half_every_step_of_bias_gelu_is_rounded_and_none_of_gelu():
    x = half(200, 16) * 2
    exact = functional.gelu(torch.from_numpy(x).double()).numpy()
    error = np.abs(compute("Gelu", [x]) - exact).max(), np.abs(compute("BiasGelu", [x, half(16) * 0]) - exact).max()
    assert error[0] <= 2**-11 * np.abs(exact).max() and error[1] > 1.5 * error[0]


def test_in_half_the_product_with_the_sine_is_rounded():
    x, cos, sin = half(1, 7, 4), half(7, 2), half(7, 2)
    found = compute("RotaryEmbedding", [x, np.arange(7)[None], cos, sin], num_heads=1)
    wide = lambda array: array.astype(np.float64)  # noqa: E731
    left, right = x[0, :, :2], x[0, :, 2:]
    expected = np.concatenate([wide(left) * cos - wide(right * sin), wide(right) * cos + wide(left * sin)], axis=-1)
    np.testing.assert_array_equal(found[0], expected.astype(np.float16))


def test_packed_attention_is_that_of_each_document_alone():
    q, k, v = normal(9, 12), normal(9, 12) * 2, normal(9, 12) + 1
    bounds, rectangle = np.array([0, 4, 5, 9], np.int32), np.zeros((3, 4), np.int32)
    found = compute("PackedMultiHeadAttention", [q, k, v, None, rectangle, bounds], num_heads=3)
    for i, j in pairwise(bounds):
        heads = [torch.from_numpy(x[i:j].reshape(1, j - i, 3, 4)).transpose(1, 2) for x in (q, k, v)]
        expected = functional.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(j - i, 12).numpy()
        np.testing.assert_allclose(found[i:j], expected, rtol=0, atol=1e-5)


def test_packed_attention_without_queries_and_keys_is_the_mean_of_each_document():
    zeros, v = np.zeros((9, 12), np.float32), normal(9, 12)
    bounds, rectangle = np.array([0, 4, 5, 9], np.int32), np.zeros((3, 4), np.int32)
    found = compute("PackedMultiHeadAttention", [zeros, zeros, v, None, rectangle, bounds], num_heads=3)
    for i, j in pairwise(bounds):
        np.testing.assert_allclose(found[i:j], np.broadcast_to(v[i:j].mean(0), (j - i, 12)), rtol=0, atol=1e-6)
