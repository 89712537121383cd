from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

from jql_engine.batching import plan_batches
from jql_engine.data import Budget, TokenBatch
from jql_engine.sessions.cuda.capacity import Capacity
from jql_engine.sessions.cuda.layouts import pack
from jql_engine.tokenizer import Tokenizer
from jql_export import probes
from jql_export.families.read import read_encoder
from jql_export.graph.cuda_packed import CudaDialect
from jql_export.graph.encoder import write_graph
from jql_export.readouts.head_file import read_head
from jql_export.reference import Expected, Reference
from tests.conftest import FAMILIES, write_encoder
from tests.operators import OPERATORS

# Operators that give a shape or depend on one: they, or what consumes them, run on the CPU.
ON_THE_CPU = {"Shape", "Size", "Range", "ConstantOfShape", "NonZero", "Expand", "Reshape"}
# Of an element of an embedding, and of a score as a part of the largest one; measured were at most a third of these.
TOLERANCES = {"fp32": (1e-5, 1e-6), "fp16": (2e-3, 2e-3), "bf16": (2e-2, 2e-2)}
DTYPES = {"fp16": np.float16, "fp32": np.float32}
each_pooling = pytest.mark.parametrize("pooling", ["cls", "mean"])
each_family = pytest.mark.parametrize("family", FAMILIES)


@dataclass(frozen=True)
class Written:
    """A packed graph, and documents with what the oracle expects of them."""

    file: object
    tokens: TokenBatch
    expected: Expected

    def run(self, budget):
        """Embeddings and scores, batches planned under `budget` tokens."""
        evaluator = ReferenceEvaluator(str(self.file), new_ops=OPERATORS)
        embeddings, scores = np.empty_like(self.expected.embeddings), np.empty_like(self.expected.scores)
        for batch in plan_batches(self.tokens, Budget(budget, "packed")):
            room = np.zeros(Capacity.of(batch.n_tokens, batch.n_tokens * len(batch.rows)).input_bytes, np.uint8)
            scores[batch.rows], embeddings[batch.rows] = evaluator.run(["scores", "embedding"], pack(batch, room))
        return embeddings, scores


@pytest.fixture
def write(bundles, head_files, tmp_path):
    def run(checkpoint, pooling, dialect, tokens=None):
        weights, heads = read_encoder(checkpoint), [read_head(name, file) for name, file in head_files.items()]
        manifest = bundles[weights.spec.architecture].manifest
        write_graph(tmp_path / "packed.onnx", weights, heads, pooling, dialect)
        if tokens is None:
            tokens = probes.token_batch(Tokenizer(checkpoint / "tokenizer.json", manifest.tokenizer, 64))
        return Written(tmp_path / "packed.onnx", tokens, Reference(checkpoint, heads, pooling).run(tokens))

    return run


def documents(*contents):
    """A document of each list of ids."""
    lengths = [len(content) for content in contents]
    ids, offsets = np.concatenate(contents).astype(np.int32), np.concatenate([[0], np.cumsum(lengths)])
    return TokenBatch(np.arange(len(contents)), ids, offsets, np.zeros(len(contents), np.bool_))


def check(written, budget=500, precision="fp32"):
    embeddings, scores = written.run(budget)
    embedding, score = TOLERANCES[precision]
    np.testing.assert_allclose(embeddings, written.expected.embeddings, rtol=0, atol=embedding)
    largest = np.abs(written.expected.scores).max()
    np.testing.assert_allclose(scores, written.expected.scores, rtol=0, atol=score * largest)


@pytest.mark.parametrize("precision", DTYPES)
@each_pooling
@each_family
def test_the_graph_equals_the_oracle(write, encoders, family, pooling, precision):
    written = write(encoders[family], pooling, CudaDialect(DTYPES[precision]))
    for budget in (500, 1):  # 1: each document alone
        check(written, budget, precision)


@each_pooling
@each_family
def test_documents_of_equal_length_equal_the_oracle(write, encoders, family, pooling):
    contents = [np.random.default_rng(seed).integers(5, 300, 12) for seed in range(4)]
    check(write(encoders[family], pooling, CudaDialect(np.float32), documents(*contents)), budget=100)


@each_pooling
def test_literal_pad_ids_have_position_row_0_and_are_not_counted(write, encoders, pooling):
    pad = read_encoder(encoders["xlm-roberta"]).spec.pad_id
    tokens = documents([0, 9, 2], [0, pad, 9, pad, pad, 10, 2], [pad, 9, 2], [0, 11, pad], [0, 12, 13, 2])
    check(write(encoders["xlm-roberta"], pooling, CudaDialect(np.float32), tokens), budget=100)


@pytest.mark.parametrize(("family", "n"), [("gte", 2 * 2), ("bert", 2 * 3)])  # queries, keys; up, which gte has none of
def test_a_projection_with_a_bias_is_one_operator(write, encoders, family, n):
    ops = operators(write(encoders[family], "cls", CudaDialect(np.float16)))
    assert ops["Gemm"] == n + 2 and not ops["BiasGelu"]  # and those of the heads


@pytest.mark.parametrize("precision", DTYPES)
def test_a_width_with_a_kernel_uses_the_fused_gelu(write, tmp_path, precision):
    checkpoint = write_encoder(tmp_path / "encoder", "gte", intermediate_size=1280, initializer_range=0.1)
    written = write(checkpoint, "cls", CudaDialect(DTYPES[precision]))
    ops = operators(written)
    assert ops["BiasSplitGelu"] == 2 and not ops["Gelu"] and not ops["Split"]
    check(written, precision=precision)


@pytest.mark.parametrize(
    ("family", "settings"),
    [("gte", {"num_hidden_layers": 1}), ("gte", {"num_attention_heads": 1}), ("xlm-roberta", {"pad_token_id": 3})],
    ids=str,
)
def test_other_shapes_equal_the_oracle(write, tmp_path, family, settings):
    check(write(write_encoder(tmp_path / "e", family, **settings), "cls", CudaDialect(np.float32)))


def test_other_rope_frequencies_equal_the_oracle(write, encoders, tmp_path):
    checkpoint = shutil.copytree(encoders["gte"], tmp_path / "encoder")
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    check(write(checkpoint, "cls", CudaDialect(np.float32)))


@each_pooling
@each_family
def test_no_node_would_run_on_the_cpu(write, encoders, family, pooling):
    assert not operators(write(encoders[family], pooling, CudaDialect())).keys() & ON_THE_CPU


@pytest.mark.parametrize("precision", DTYPES)
@each_pooling
@each_family
def test_onnx_runtime_accepts_every_type_and_shape(write, encoders, family, pooling, precision):
    file = write(encoders[family], pooling, CudaDialect(DTYPES[precision])).file
    # Kernels are looked up last, and of packed attention the CPU has none.
    with pytest.raises(NoKernel, match=r"(kernel|implementation) for .*PackedMultiHeadAttention"):
        ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def test_the_graph_has_the_documented_inputs_and_outputs(write, encoders):
    model = onnx.load(write(encoders["gte"], "cls", CudaDialect()).file)
    onnx.checker.check_model(model)
    types = {value.name: value.type.tensor_type.elem_type for value in [*model.graph.input, *model.graph.output]}
    int64, int32, fp32 = (helper.np_dtype_to_tensor_dtype(np.dtype(t)) for t in (np.int64, np.int32, np.float32))
    inputs = dict.fromkeys(("input_ids", "position_ids", "cls_index"), int64)
    assert types == inputs | dict.fromkeys(("cu_seqlens", "token_offset"), int32) | dict.fromkeys(
        ("scores", "embedding"), fp32
    )
    assert {opset.domain: opset.version for opset in model.opset_import} == CudaDialect.opsets


def test_the_encoder_is_fp16_and_the_heads_are_fp32(write, encoders):
    model = onnx.load(write(encoders["gte"], "cls", CudaDialect()).file)
    types = {tensor.name: helper.tensor_dtype_to_np_dtype(tensor.data_type) for tensor in model.graph.initializer}
    assert {t for name, t in types.items() if name.startswith(("layer.", "word", "rope."))} == {np.dtype(np.float16)}
    assert {t for name, t in types.items() if name.startswith("heads.")} == {np.dtype(np.float32)}


def test_the_last_layer_computes_first_tokens_only_after_attention(write, encoders):
    ops = operators(write(encoders["gte"], "cls", CudaDialect()))
    assert ops["RotaryEmbedding"] == 3, "queries and keys of two layers less those at position 0"
    assert ops["Gather"] == 3, "words, context and residual"


def operators(written):
    return Counter(node.op_type for node in onnx.load(written.file, load_external_data=False).graph.node)
