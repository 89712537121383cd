"""Windows over all documents of a batch at once, in the graphs for GPUs: against transformers' ModernBertModel."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from ml_dtypes import bfloat16
from onnx.reference import ReferenceEvaluator

from jql_engine.batching import plan_batches
from jql_engine.data import Budget
from jql_engine.sessions.cuda.layouts import fields_of, pack, pad, used_bytes
from jql_export.families.read import read_encoder
from jql_export.graph import cpu, cuda_packed, windows
from jql_export.graph.cpu import CpuDialect
from jql_export.graph.cuda_packed import CudaDialect
from jql_export.graph.cuda_padded import PaddedCudaDialect
from jql_export.graph.encoder import write_graph
from jql_export.graph.standard import StandardDialect
from jql_export.readouts.head_file import read_head
from jql_export.reference import Reference
from jql_export.tolerances import EVALUATED_WINDOWS
from tests.export.test_cuda_packed import ON_THE_CPU, Written, check, documents, each_pooling, operators
from tests.export.test_modernbert import MAX_TOKENS, write_modernbert
from tests.operators import OPERATORS

# Windows are of 4 tokens on either side: shorter documents, some of a block and of two, the longest.
LENGTHS = (1, 2, MAX_TOKENS, 3, 1, 1, 40, 4, 5, 17, 8, 9, 1)
PAD = 1
FP16, BF16 = EVALUATED_WINDOWS["fp16"], EVALUATED_WINDOWS["bf16"]
MODELS = {
    "as published": {},
    "silu, biases": {"hidden_activation": "silu", "attention_bias": True, "mlp_bias": True, "norm_bias": True},
    "window at the end": {"num_hidden_layers": 6},
    "windows alone": {"layer_types": ["sliding_attention"] * 7},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("windows")
    return {name: write_modernbert(root / name, **settings) for name, settings in MODELS.items()}


@pytest.fixture
def write(models, head_files, tmp_path):
    """Writes the graph of a model; gives it with the documents and what transformers makes of them."""

    def run(model, pooling, dialect, tokens=None):
        heads = [read_head(name, file) for name, file in head_files.items()]
        write_graph(tmp_path / "graph.onnx", read_encoder(models[model]), heads, pooling, dialect)
        tokens = mixed() if tokens is None else tokens
        return Written(tmp_path / "graph.onnx", tokens, Reference(models[model], heads, pooling).run(tokens))

    return run


def mixed(seed=0):
    rng = np.random.default_rng(seed)
    return documents(*(rng.integers(5, 300, n) for n in LENGTHS))


def of_rectangles(written, run, budget):
    """Embeddings of padded batches."""
    found = np.empty_like(written.expected.embeddings)
    for batch in plan_batches(written.tokens, Budget(budget, "padded")):
        room = np.full(used_bytes(fields_of(batch)), 255, np.uint8)
        found[batch.rows] = run(pad(batch, room, PAD))
    return found


def in_onnx_runtime(written, budget):
    session = ort.InferenceSession(str(written.file), providers=["CPUExecutionProvider"])
    return of_rectangles(written, lambda inputs: session.run(["embedding"], inputs)[0], budget)


@each_pooling
@pytest.mark.parametrize("model", MODELS)
def test_the_packed_graph_equals_transformers(write, model, pooling):
    written = write(model, pooling, CudaDialect(np.float32))
    for budget in (1000, 60, 1):  # all in one batch, several batches, each document alone
        check(written, budget)


@each_pooling
def test_the_packed_graph_in_fp16_is_near(write, pooling):
    written = write("as published", pooling, CudaDialect(np.float16))
    embeddings, _ = written.run(1000)
    np.testing.assert_allclose(embeddings, written.expected.embeddings, rtol=0, atol=FP16)


@each_pooling
def test_neighbors_change_nothing(write, pooling):
    written = write("as published", pooling, CudaDialect(np.float32))
    pairs = zip(*(np.split(tokens.ids, tokens.offsets[1:-1]) for tokens in (mixed(), mixed(1))), strict=True)
    other = documents(*(pair[i % 2 == 0] for i, pair in enumerate(pairs)))
    found, changed = (Written(written.file, tokens, written.expected).run(1000)[0] for tokens in (mixed(), other))
    np.testing.assert_array_equal(found[1::2], changed[1::2])
    assert np.abs(found[::2] - changed[::2]).max(axis=1).min() > 1e-3, "and the others are others"


def documents_not_told_apart(monkeypatch):
    real = cuda_packed._numbered
    zero = np.zeros((), np.int64)
    monkeypatch.setattr(cuda_packed, "_numbered", lambda g: g.op("Mul", real(g), g.weight("nothing", zero)))


def window_off_by_one(monkeypatch):
    real = windows._within
    monkeypatch.setattr(windows, "_within", lambda window, distance: real(window, distance - 1))


def bases_swapped(monkeypatch):
    real = cuda_packed.caches_of
    monkeypatch.setattr(cuda_packed, "caches_of", lambda layer: real(replace(layer, windowed=not layer.windowed)))


@pytest.mark.parametrize("damage", [documents_not_told_apart, window_off_by_one, bases_swapped])
def test_a_wrong_mask_is_seen(write, monkeypatch, damage):
    damage(monkeypatch)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(write("as published", "mean", CudaDialect(np.float32)), 1000)


@pytest.mark.parametrize("dialect", [CudaDialect(), PaddedCudaDialect(bfloat16)], ids=["packed", "padded"])
@each_pooling
def test_no_node_would_run_on_the_cpu(write, pooling, dialect):
    graph = onnx.load(write("window at the end", pooling, dialect).file).graph
    weights = {tensor.name for tensor in graph.initializer}
    constant = {node.name for node in graph.node if node.op_type == "Reshape" and node.input[1] in weights}
    assert not {node.op_type for node in graph.node if node.name not in constant} & ON_THE_CPU


def test_a_silu_takes_no_kernel_of_gelu(models, head_files, tmp_path):
    width = cuda_packed.SPLIT_GELU_WIDTHS[0]
    folder = write_modernbert(
        tmp_path / "model", num_hidden_layers=2, intermediate_size=width, hidden_activation="silu"
    )
    heads = [read_head(name, file) for name, file in head_files.items()]
    write_graph(tmp_path / "graph.onnx", read_encoder(folder), heads, "mean", CudaDialect(np.float32))
    written = Written(tmp_path / "graph.onnx", mixed(), Reference(folder, heads, "mean").run(mixed()))
    assert not operators(written)["BiasSplitGelu"]
    check(written)


def test_masks_are_linear_in_the_length(write):
    """And no attention to whole documents is in the graph where all layers have windows."""
    written = write("windows alone", "cls", CudaDialect(np.float32))
    assert not operators(written)["PackedMultiHeadAttention"] and operators(written)["Attention"] == 7
    model = onnx.load(written.file)
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(windows.MASK))
    (batch,) = plan_batches(documents(*[np.arange(5, 64)] * 17), Budget(1003, "packed"))
    room = np.zeros(used_bytes(fields_of(batch)), np.uint8)
    (mask,) = ReferenceEvaluator(model, new_ops=OPERATORS).run([windows.MASK], pack(batch, room))
    assert mask.shape == (251, 1, 4, 12)


@each_pooling
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("budget", [2000, 1])
def test_the_padded_graphs_equal_transformers(write, model, pooling, budget):
    for dialect in (PaddedCudaDialect(np.float32), StandardDialect("padded")):
        written = write(model, pooling, dialect)
        found = in_onnx_runtime(written, budget)
        np.testing.assert_allclose(found, written.expected.embeddings, rtol=0, atol=1e-5)


@each_pooling
def test_the_padded_graph_in_bf16_is_near(write, pooling):
    written = write("as published", pooling, PaddedCudaDialect(bfloat16))
    evaluator = ReferenceEvaluator(str(written.file), new_ops=OPERATORS)
    found = of_rectangles(written, lambda inputs: evaluator.run(["embedding"], inputs)[0], 2000)
    np.testing.assert_allclose(found, written.expected.embeddings, rtol=0, atol=BF16)


@each_pooling
def test_the_graph_of_tensorrt_in_fp16_is_near(write, pooling):
    written = write("as published", pooling, StandardDialect("padded", np.float16))
    np.testing.assert_allclose(in_onnx_runtime(written, 2000), written.expected.embeddings, rtol=0, atol=FP16)


@pytest.mark.parametrize("together", [1, 12, 20, 10_000])
def test_blocks_in_groups_are_the_same(write, monkeypatch, together):
    monkeypatch.setattr(cpu, "TOGETHER", together)
    written = write("as published", "mean", CpuDialect())
    session, found = ort.InferenceSession(str(written.file)), np.empty_like(written.expected.embeddings)
    for batch in plan_batches(written.tokens, Budget(1000, "exact")):
        found[batch.rows] = session.run(["embedding"], {"input_ids": batch.rectangle(PAD)[0]})[0]
    np.testing.assert_allclose(found, written.expected.embeddings, rtol=0, atol=1e-5)
