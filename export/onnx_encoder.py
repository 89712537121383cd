"""An ONNX encoder made elsewhere (optimum-cli, a model repository's own export) -> a graph of a bundle.

Pooling, L2 normalization and the stacked heads are added behind it. What it computes inside is its maker's affair: the
parity run against the checkpoint's PyTorch class decides whether it becomes a bundle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, compose, numpy_helper
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from jql_engine.bundle import Pooling
from jql_engine.errors import CheckpointError, EngineError
from jql_export.families.base import read_config
from jql_export.graph.readouts import add_outputs, poolings_of, value_infos
from jql_export.graph.writer import EXTERNAL_BYTES, GraphInput, GraphWriter
from jql_export.readouts.base import Readout

VARIANT = "foreign-fp32"
INPUTS = ("input_ids", "attention_mask")
MADE_UP = ("token_type_ids", "position_ids")  # zeros, and positions from 0 on
# By preference: where tokens are there, the pooling is the bundle's own.
OUTPUTS = {"last_hidden_state": 3, "token_embeddings": 3, "sentence_embedding": 2}
PREFIX = "foreign/"  # before every name of the foreign graph, so that none meets one of ours
OLDEST_OPSET = 11


@dataclass(frozen=True, slots=True)
class ForeignEncoder:
    """A graph whose inputs and output are understood."""

    model: onnx.ModelProto
    output: str

    @property
    def is_pooled(self) -> bool:
        """Whether the graph gives one vector a document, pooled as its maker saw fit."""
        return OUTPUTS[self.output] == 2

    @property
    def opset(self) -> int:
        """Version of the standard operators."""
        return max((entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a bundle must know of an encoder whose graph export does not write itself."""

    architecture: str
    n_layers: int
    hidden_size: int
    max_positions: int
    pad_id: int


def read_shape(directory: Path) -> Shape:
    """From config.json, of any architecture; raises CheckpointError."""
    config = read_config(directory)
    keys = ("num_hidden_layers", "hidden_size", "max_position_embeddings", "pad_token_id")
    for key in keys:
        if not isinstance(config.get(key), int):
            raise CheckpointError(f"{directory}: config.json has {key} = {config.get(key)!r}, expected an integer")
    return Shape(str(config.get("model_type")), *(config[key] for key in keys))


def read_foreign(file: Path, hidden_size: int) -> ForeignEncoder:
    """Read `file` and its external data; raises CheckpointError that names what it takes and gives, and what it may."""
    try:
        model = onnx.load(file, load_external_data=False)
    except Exception as error:  # of the disk, and protobuf's own
        raise CheckpointError(f"{file} cannot be read as ONNX: {' '.join(str(error).split())}") from error
    _check_inputs(file, model.graph)
    encoder = ForeignEncoder(model, _output(file, model.graph, hidden_size))
    if encoder.opset < OLDEST_OPSET:
        raise CheckpointError(f"{file} has opset {encoder.opset}, expected {OLDEST_OPSET} or newer; export it again")
    for tensor in model.graph.initializer:
        if uses_external_data(tensor):
            _load(file, tensor)
    return encoder


def write_foreign(
    file: Path, encoder: ForeignEncoder, readouts: Sequence[Readout], pooling: Pooling, hidden_size: int
) -> None:
    """Write `file` (.onnx) and its weights beside it (.onnx.data), with the inputs and outputs of a padded variant.

    Modifies encoder.model in place, since it may hold gigabytes.
    """
    g, graph = GraphWriter(), encoder.model.graph
    for value in _inputs(graph):
        _feed(g, value.name, value.type.tensor_type.elem_type)
    compose.add_prefix(encoder.model, PREFIX, inplace=True)
    g.nodes.extend(graph.node)
    states, poolings = PREFIX + encoder.output, poolings_of(readouts, pooling)
    for readout in readouts:
        if not readout.normalize and (encoder.is_pooled or readout.pooling == "mean"):
            raise CheckpointError(
                f"{readout.name} reads a vector that is not normalized, which an ONNX encoder made elsewhere does not "
                "give; leave out --encoder-onnx"
            )
    pooled = {one: states if encoder.is_pooled else _pool(g, states, one) for one in poolings}
    add_outputs(g, pooled, lambda x: _norm(g, x, encoder.opset), readouts)
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(g.nodes)
    inputs, outputs = value_infos([GraphInput(name, ("B", "L")) for name in INPUTS], readouts, hidden_size)
    graph.input.extend(inputs)
    graph.output.extend(outputs)
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in g.weights.items())
    encoder.model.ir_version = max(encoder.model.ir_version, 4)  # before, every weight had to be an input as well
    where = f"{file.name}.data"
    onnx.save_model(encoder.model, file, save_as_external_data=True, location=where, size_threshold=EXTERNAL_BYTES)


@contextmanager
def explained(file: Path) -> Iterator[None]:
    """What ONNX Runtime says of the graph made from `file`, as a CheckpointError."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:  # onnxruntime's errors share no class
        raise CheckpointError(f"{file} cannot be run by ONNX Runtime: {' '.join(str(error).split())}") from error


def _inputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    weights = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in weights]


def _check_inputs(file: Path, graph: onnx.GraphProto) -> None:
    found = {value.name: value.type.tensor_type.elem_type for value in _inputs(graph)}
    integers = (TensorProto.INT64, TensorProto.INT32)
    if set(INPUTS) <= found.keys() <= {*INPUTS, *MADE_UP} and set(found.values()) <= set(integers):
        return
    raise CheckpointError(
        f"{file} takes {_listed(found)}; expected are the integers {' and '.join(INPUTS)} and at most "
        f"{' and '.join(MADE_UP)} besides"
    )


def _output(file: Path, graph: onnx.GraphProto, hidden_size: int) -> str:
    kinds = {value.name: value.type.tensor_type for value in graph.output}
    name = next((name for name in OUTPUTS if name in kinds), None)
    if name is None:
        raise CheckpointError(
            f"{file} gives {_listed({key: kind.elem_type for key, kind in kinds.items()})}; expected is "
            "last_hidden_state or token_embeddings [B, L, D], or sentence_embedding [B, D]"
        )
    sizes = [axis.dim_value or axis.dim_param or "?" for axis in kinds[name].shape.dim]
    width = sizes[-1] if sizes else "?"  # unknown where the maker wrote a name or nothing: the parity run decides
    has_rank = not kinds[name].HasField("shape") or len(sizes) == OUTPUTS[name]
    if kinds[name].elem_type == TensorProto.FLOAT and has_rank and (isinstance(width, str) or width == hidden_size):
        return name
    axes = ["B", "L", hidden_size] if OUTPUTS[name] == 3 else ["B", hidden_size]
    raise CheckpointError(
        f"{file}: output {name} is {_type(kinds[name].elem_type)} [{', '.join(map(str, sizes))}], expected float "
        f"[{', '.join(map(str, axes))}]"
    )


def _load(file: Path, tensor: TensorProto) -> None:
    """Take the data of `tensor` into memory. onnx's own reader refuses links, of which the hub's cache is made."""
    info = ExternalDataInfo(tensor)
    place = Path(info.location)
    if place.is_absolute() or ".." in place.parts:
        raise CheckpointError(f"{file}: tensor {tensor.name} lies in {place}, outside of the model's folder; refused")
    try:
        with (file.parent / place).open("rb") as stream:
            stream.seek(info.offset or 0)
            data = stream.read(-1 if info.length is None else info.length)
    except OSError as error:
        raise CheckpointError(f"{file}: its weights in {place} cannot be read: {error.strerror}") from error
    if info.length is not None and len(data) != info.length:
        raise CheckpointError(f"{file}: tensor {tensor.name} has {info.length} bytes, {place} ends after {len(data)}")
    tensor.raw_data = data
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]


def _feed(g: GraphWriter, name: str, kind: int) -> None:
    """The foreign input `name`, in the type that it wants."""
    source = name
    if name == "token_type_ids":
        source = g.op("Sub", "input_ids", "input_ids")
    elif name == "position_ids":
        shape = g.op("Shape", "input_ids")
        zero, one = g.weight("zero", np.array(0, np.int64)), g.weight("one", np.array(1, np.int64))
        length = g.op("Gather", shape, one)
        source = g.op("Expand", g.op("Range", zero, length, one), shape)
    g.op("Cast", source, to=kind, output=PREFIX + name)


def _pool(g: GraphWriter, tokens: str, pooling: Pooling) -> str:
    """One vector a document, [B, D]; for the mean the sum, which L2 normalization makes the same."""
    if pooling == "cls":
        return g.op("Gather", tokens, g.weight("zero", np.array(0, np.int64)), axis=1)
    mask = g.op("Reshape", g.op("Cast", "attention_mask", to=TensorProto.FLOAT), g.ints(0, 1, -1))
    return g.op("Reshape", g.op("MatMul", mask, tokens), g.ints(0, -1))


def _norm(g: GraphWriter, pooled: str, opset: int) -> str:
    if opset < 18:  # from there on the axes are an input
        squares = g.op("ReduceSumSquare", pooled, axes=[1], keepdims=1)
    else:
        squares = g.op("ReduceSumSquare", pooled, g.ints(1), keepdims=1)
    return g.op("Sqrt", squares)


def _type(kind: int) -> str:
    return str(TensorProto.DataType.Name(kind)).lower()


def _listed(values: dict[str, int]) -> str:
    return ", ".join(f"{name} ({_type(kind)})" for name, kind in values.items()) or "nothing"
