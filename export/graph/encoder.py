"""(EncoderWeights, readouts, Dialect) -> ONNX, written node by node from canonical weights.

One walk over the layers serves every dialect; a dialect (dialect.py) only answers how it writes positions, attention,
norm, MLP and pooling. Exact simplifications:

- the value bias adds a constant to every context vector, since attention weights sum to one, so it moves into the
  output projection: b_o' = b_o + W_o b_v;
- with CLS pooling the last layer computes queries, output projection and MLP for the first token only;
- the first token is at position 0, where RoPE is the identity: that query is not rotated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from jql_engine.bundle import Pooling
from jql_export.families.base import EncoderSpec, EncoderWeights, LayerWeights
from jql_export.graph.dialect import Dialect
from jql_export.graph.readouts import add_outputs, poolings_of, value_infos
from jql_export.graph.writer import EXTERNAL_BYTES, GraphWriter
from jql_export.readouts.base import Readout
from jql_export.tensors import Array

PAGE = 4096


def write_graph(
    file: Path, weights: EncoderWeights, readouts: Sequence[Readout], pooling: Pooling, dialect: Dialect
) -> None:
    """Write `file` (.onnx) and its weights beside it (.onnx.data); its inputs and outputs: docs/bundle-format.md."""
    g = GraphWriter(dialect.dtype, flat=dialect.layout == "packed")
    dialect.prepare(g, weights.spec)
    x = _embed(g, dialect, weights)
    poolings = poolings_of(readouts, pooling)
    for i, layer in enumerate(weights.layers):
        cls_only = poolings == ("cls",) and i == len(weights.layers) - 1
        x = _layer(g, dialect, weights.spec, f"layer.{i}", layer, x, cls_only)
    if weights.final_norm is not None:
        x = dialect.norm(g, "final_norm", x, weights.final_norm, weights.spec.norm_epsilon)
    pooled = {one: _pool(g, dialect, weights.spec, x, one, poolings) for one in poolings}
    # Not ReduceL2: on CUDA it would be the only operator that needs cuDNN.
    add_outputs(g, pooled, lambda x: g.op("Sqrt", g.op("ReduceSumSquare", x, g.ints(1), keepdims=1)), readouts)
    inputs, outputs = value_infos(dialect.inputs, readouts, weights.spec.hidden_size)
    data = file.with_suffix(".onnx.data")
    graph = helper.make_graph(g.nodes, "jql", inputs, outputs, _write_weights(data, g.weights))
    opsets = [helper.make_opsetid(domain, version) for domain, version in dialect.opsets.items()]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=dialect.ir_version, producer_name="jql-export")
    onnx.save_model(model, file)


def _embed(g: GraphWriter, d: Dialect, weights: EncoderWeights) -> str:
    """Word, type and position embeddings, normalized. The one token type in use is folded into a table."""
    word, position = weights.word, weights.position
    if weights.token_type is not None:
        if position is None:
            word = word + weights.token_type
        else:
            position = position + weights.token_type
    x = g.op("Gather", g.parameter("word", word), "input_ids")
    if position is not None:
        g.parameter("position", position)
        x = g.op("Add", x, d.position_rows(g, weights.spec))
    return d.norm(g, "embedding_norm", x, weights.embedding_norm, weights.spec.norm_epsilon)


def _pool(
    g: GraphWriter, d: Dialect, spec: EncoderSpec, x: str, pooling: Pooling, poolings: tuple[Pooling, ...]
) -> str:
    """[B, D] in fp32; where "cls" is the only pooling, the last layer has left first tokens alone."""
    if pooling == "mean":
        pooled = d.mean(g, spec, x)
    else:
        pooled = d.first(g, x if poolings == ("cls",) else d.first_tokens(g, x))
    return pooled if d.dtype == np.float32 else g.op("Cast", pooled, to=TensorProto.FLOAT)


def _layer(
    g: GraphWriter, d: Dialect, spec: EncoderSpec, name: str, layer: LayerWeights, x: str, cls_only: bool
) -> str:
    if spec.normalizes_first:
        return _layer_that_normalizes_first(g, d, spec, name, layer, x, cls_only)
    assert layer.attention_norm is not None
    context, residual = d.attend(g, name, layer, spec, x, cls_only)
    y = g.project(context, f"{name}.output", layer.output)
    attention_norm = f"{name}.attention_norm"
    x = d.add_norm(g, attention_norm, y, _output_bias(layer), residual, layer.attention_norm, spec.norm_epsilon)
    y = g.project(d.expand(g, name, layer, spec, x), f"{name}.down", layer.down)
    return d.add_norm(g, f"{name}.mlp_norm", y, layer.down.bias, x, layer.mlp_norm, spec.norm_epsilon)


def _layer_that_normalizes_first(
    g: GraphWriter, d: Dialect, spec: EncoderSpec, name: str, layer: LayerWeights, x: str, cls_only: bool
) -> str:
    """X + attention(norm(x)), then x + mlp(norm(x)), as in ModernBERT."""
    normed = x
    if layer.attention_norm is not None:
        normed = d.norm(g, f"{name}.attention_norm", x, layer.attention_norm, spec.norm_epsilon)
    context, _ = d.attend(g, name, layer, spec, normed, cls_only)
    output = replace(layer.output, bias=_output_bias(layer))
    x = g.op("Add", d.first_tokens(g, x) if cls_only else x, g.project_and_add(context, f"{name}.output", output))
    normed = d.norm(g, f"{name}.mlp_norm", x, layer.mlp_norm, spec.norm_epsilon)
    return g.op("Add", x, g.project_and_add(d.expand(g, name, layer, spec, normed), f"{name}.down", layer.down))


def _output_bias(layer: LayerWeights) -> Array | None:
    if layer.value.bias is None:
        return layer.output.bias
    folded = layer.output.weight.astype(np.float64) @ layer.value.bias
    return (folded + (0 if layer.output.bias is None else layer.output.bias)).astype(np.float32)


def _write_weights(file: Path, weights: dict[str, NDArray[Any]]) -> Sequence[TensorProto]:
    """Write large weights to `file`, each from a page border on; return a tensor for every weight."""
    tensors = []
    with file.open("wb") as stream:
        for name, value in weights.items():
            tensor = TensorProto(name=name, dims=value.shape, data_type=helper.np_dtype_to_tensor_dtype(value.dtype))
            raw = np.ascontiguousarray(value).reshape(-1).view(np.uint8).data  # not cast: nobody else knows bf16
            if len(raw) < EXTERNAL_BYTES:
                tensor.raw_data = bytes(raw)
            else:
                stream.seek(-(-stream.tell() // PAGE) * PAGE)
                tensor.data_location = TensorProto.EXTERNAL
                where = {"location": file.name, "offset": stream.tell(), "length": len(raw)}
                for key, setting in where.items():
                    tensor.external_data.add(key=key, value=str(setting))
                stream.write(raw)
            tensors.append(tensor)
    return tensors
