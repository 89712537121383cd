"""The padded graph of ONNX Runtime's CUDA provider, on the CPU."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from onnx.reference import ReferenceEvaluator

from jql_engine.batching import plan_batches
from jql_engine.data import Batch, BatchOutput, Budget, TokenBatch
from jql_engine.sessions.cuda.capacity import BufferedSession, Capacity, halves, largest_batch
from jql_engine.sessions.cuda.layouts import fields_of, pad, size_of, used_bytes
from jql_engine.tokenizer import Tokenizer
from jql_export import probes
from jql_export.families.read import read_encoder
from jql_export.graph.cuda_padded import PaddedCudaDialect
from jql_export.graph.encoder import write_graph
from jql_export.readouts.head_file import read_head
from jql_export.reference import Reference
from jql_export.variants import VARIANTS
from tests.conftest import FAMILIES, write_encoder
from tests.export.test_cuda_packed import ON_THE_CPU
from tests.operators import OPERATORS

# Of an element of an embedding. bf16 keeps 8 bits, and these encoders' weights are wide: measured was up to 5.7e-3.
# In bf16 one rounding more or less, as another number of threads makes it, moves a value by up to 8e-3.
TOLERANCES = {np.float32: 1e-5, np.float16: 2e-3, bfloat16: 1e-2}
PAD = 1
each_family = pytest.mark.parametrize("family", FAMILIES)
each_pooling = pytest.mark.parametrize("pooling", ["cls", "mean"])


@pytest.fixture
def write(bundles, encoders, head_files, tmp_path):
    def run(family, pooling, dtype=np.float32, tokens=None):
        heads = [read_head(name, file) for name, file in head_files.items()]
        file = tmp_path / "padded.onnx"
        write_graph(file, read_encoder(encoders[family]), heads, pooling, PaddedCudaDialect(dtype))
        if tokens is None:
            info = bundles[family].manifest.tokenizer
            tokens = probes.token_batch(Tokenizer(encoders[family] / "tokenizer.json", info, 64))
        return file, tokens, Reference(encoders[family], heads, pooling).run(tokens)

    return run


def embeddings(graph, tokens, budget):
    found = np.empty((len(tokens.rows), 32), np.float32)
    for batch in plan_batches(tokens, Budget(budget, "padded")):
        room = np.full(used_bytes(fields_of(batch)), 255, np.uint8)
        found[batch.rows] = graph.run(["embedding"], pad(batch, room, PAD))[0]
    return found


@pytest.mark.parametrize("budget", [700, 1])  # 1: each document alone, without padding
@each_pooling
@each_family
def test_the_graph_equals_the_oracle_in_onnx_runtime(write, family, pooling, budget):
    file, tokens, expected = write(family, pooling)
    graph = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    found = embeddings(graph, tokens, budget)
    np.testing.assert_allclose(found, expected.embeddings, rtol=0, atol=TOLERANCES[np.float32])


@pytest.mark.parametrize("dtype", TOLERANCES)
@each_pooling
@each_family
def test_every_type_is_near_the_oracle(write, family, pooling, dtype):
    file, tokens, expected = write(family, pooling, dtype)
    found = embeddings(ReferenceEvaluator(str(file), new_ops=OPERATORS), tokens, 700)
    np.testing.assert_allclose(found, expected.embeddings, rtol=0, atol=TOLERANCES[dtype])


def test_bf16_stays_near_over_long_documents(head_files, tmp_path):
    checkpoint = write_encoder(tmp_path / "long", "gte", max_position_embeddings=1024)
    heads, rng = [read_head(name, file) for name, file in head_files.items()], np.random.default_rng(0)
    lengths = [300, 1000, 700]
    ids = rng.integers(5, 300, sum(lengths)).astype(np.int32)
    tokens = TokenBatch(np.arange(3), ids, np.cumsum([0, *lengths]), np.zeros(3, np.bool_))
    write_graph(tmp_path / "g.onnx", read_encoder(checkpoint), heads, "mean", PaddedCudaDialect(bfloat16))
    graph = ReferenceEvaluator(str(tmp_path / "g.onnx"), new_ops=OPERATORS)
    expected = Reference(checkpoint, heads, "mean").run(tokens)
    np.testing.assert_allclose(embeddings(graph, tokens, 3000), expected.embeddings, rtol=0, atol=TOLERANCES[bfloat16])


def test_a_document_without_a_token_is_refused():
    batch = Batch(np.arange(2), np.full(3, 7, np.int32), np.array([0, 3, 3], np.int32), 3)
    with pytest.raises(AssertionError, match="every document has a first token"):
        pad(batch, np.zeros(used_bytes(fields_of(batch)), np.uint8), PAD)


def test_literal_pad_ids_are_not_counted(write):
    documents = [[0, 9, 2], [0, PAD, 9, PAD, PAD, 10, 2], [PAD, 9, 2], [0, 11, PAD]]
    ids, lengths = np.concatenate(documents).astype(np.int32), [len(d) for d in documents]
    tokens = TokenBatch(np.arange(4), ids, np.cumsum([0, *lengths]), np.zeros(4, np.bool_))
    file, _, expected = write("xlm-roberta", "cls", tokens=tokens)
    found = embeddings(ort.InferenceSession(str(file)), tokens, 100)
    np.testing.assert_allclose(found, expected.embeddings, rtol=0, atol=TOLERANCES[np.float32])


@each_pooling
@each_family
def test_no_node_would_run_on_the_cpu_and_the_encoder_is_bf16(write, family, pooling):
    file, *_ = write(family, pooling, bfloat16)
    onnx.checker.check_model(file, full_check=True)
    model = onnx.load(file)
    assert not Counter(node.op_type for node in model.graph.node).keys() & ON_THE_CPU
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert {t for name, t in types.items() if name.startswith(("layer.", "word"))} == {onnx.TensorProto.BFLOAT16}
    assert {t for name, t in types.items() if name.startswith("heads.")} == {onnx.TensorProto.FLOAT}
    assert VARIANTS["cuda-bf16"].layout == "padded"


padded = st.lists(st.integers(1, 40), min_size=1, max_size=12).map(lambda lengths: rectangle_of(lengths))


def rectangle_of(lengths):
    offsets = np.cumsum([0, *lengths], dtype=np.int32)
    return Batch(np.arange(len(lengths)), np.arange(5, 5 + offsets[-1], dtype=np.int32), offsets, max(lengths))


@given(padded, st.integers(1, 200), st.integers(1, 100))
def test_a_buffer_holds_every_batch_that_its_capacity_does(batch, budget, max_tokens):
    capacity = Capacity.of(budget, max_tokens, "padded")
    if capacity.holds(batch):
        assert used_bytes(fields_of(batch)) <= capacity.input_bytes


@given(padded.filter(lambda batch: len(batch.rows) > 1))
def test_halves_are_no_wider_than_their_longest_document(batch):
    parts = halves(batch)
    for part in parts:
        assert part.row_length == np.diff(part.offsets).max()
    np.testing.assert_array_equal(np.concatenate([part.ids for part in parts]), batch.ids)


def test_a_budget_counts_padding(write):
    file, tokens, expected = write("gte", "cls")
    graph, computed = ort.InferenceSession(str(file)), []

    class Executor:
        capacity = Capacity.of(200, 64, "padded")

        def run(self, batch):
            assert self.capacity.holds(batch)
            computed.append(batch.row_length * len(batch.rows))
            room = np.zeros(self.capacity.input_bytes, np.uint8)
            return BatchOutput(*graph.run(["scores", "embedding"], pad(batch, room, PAD)))

    session = BufferedSession("cuda-bf16", Executor(), 200)
    assert session.budget == Budget(200, "padded")
    assert size_of(largest_batch(Executor.capacity, 64)) == 3 * 64
    found = np.empty_like(expected.scores)
    for batch in plan_batches(tokens, Budget(600, "padded")):  # planned before the budget shrank
        found[batch.rows] = session.run(batch).scores
    np.testing.assert_allclose(found, expected.scores, rtol=0, atol=1e-4)
    assert max(computed) <= 200
