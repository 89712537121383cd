"""The arithmetic of the graph that TensorRT gets, certified where there is no GPU: ONNX Runtime's CPU provider runs it.

It has no fp16 kernels for most of it: it computes them in fp32 from fp16 weights and rounds the results to fp16, which
is what a GPU does that sums in fp32.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from jql_engine.batching import plan_batches
from jql_engine.bundle import Bundle
from jql_engine.data import Budget
from jql_engine.errors import CheckpointError, ParityError
from jql_engine.sessions import certify as parity
from jql_engine.sessions.base import run_in_order
from jql_engine.sessions.cpu import CpuSession
from jql_engine.tokenizer import Tokenizer
from jql_export import probes
from jql_export.families.read import read_encoder
from jql_export.graph.encoder import write_graph
from jql_export.readouts.base import Layer
from jql_export.readouts.head_file import read_head
from jql_export.reference import Reference
from jql_export.tensors import Linear
from jql_export.tolerances import LONG_TOKENS, TOLERANCES
from jql_export.variants import VARIANTS
from tests.conftest import FAMILIES, write_encoder
from tests.tensorrt_models import DEMO, VARIANT, export_demo

FP16 = TOLERANCES["fp16"]
POOLINGS = ("cls", "mean")
each_family = pytest.mark.parametrize("family", FAMILIES)
each_pooling = pytest.mark.parametrize("pooling", POOLINGS)


@pytest.fixture(scope="module")
def heads(head_files):
    """The tests' heads with a tenth of their slope, about that of the demo's learned heads."""
    read = [read_head(name, file) for name, file in head_files.items()]
    outputs = [head.layers[1].linear for head in read]
    return [
        replace(head, layers=(head.layers[0], Layer(Linear(output.weight / 10, output.bias))))
        for head, output in zip(read, outputs, strict=True)
    ]


@pytest.fixture
def write(bundles, heads, tmp_path):
    """Writes the fp16 graph of a checkpoint; gives a session and what the fp32 oracle expects."""

    def run(checkpoint, pooling, change=lambda weights: weights, max_tokens=None):
        weights = read_encoder(checkpoint)
        manifest = bundles[weights.spec.architecture].manifest
        kind = VARIANTS[VARIANT]
        variant = replace(manifest.variants["standard-fp32"], graph=f"graphs/{kind.graph}", layout=kind.layout)
        limit = max_tokens or manifest.max_tokens
        bundle = Bundle(tmp_path / "out", replace(manifest, variants={VARIANT: variant}, max_tokens=limit), "")
        (bundle.path / "graphs").mkdir(parents=True, exist_ok=True)
        write_graph(bundle.graph(VARIANT), change(weights), heads, pooling, kind.dialect())
        tokens = probes.token_batch(Tokenizer(checkpoint / "tokenizer.json", manifest.tokenizer, limit))
        return CpuSession(bundle, VARIANT), tokens, Reference(checkpoint, heads, pooling).run(tokens)

    return run


@each_pooling
@each_family
def test_the_fp16_graph_equals_the_fp32_oracle_on_ragged_padded_batches(write, encoders, family, pooling):
    session, tokens, expected = write(encoders[family], pooling)
    assert any(batch.n_padding for batch in plan_batches(tokens, session.budget))
    figures = parity.certify(session, tokens, expected, FP16)
    assert 1e-6 < figures["max_abs_embedding"] <= FP16.embedding, "fp16 leaves a trace"


@each_pooling
def test_a_document_in_its_bucket_equals_the_oracle_too(write, encoders, pooling):
    session, tokens, expected = write(encoders["gte"], pooling)
    budget = Budget(512, "padded", (32, 64, 96))
    padding = sum(batch.n_padding for batch in plan_batches(tokens, budget)) / len(tokens.ids)
    embeddings = run_in_order(session, tokens, budget).embeddings
    assert padding > 0.2
    np.testing.assert_allclose(embeddings, expected.embeddings, rtol=0, atol=FP16.embedding)


@each_pooling
def test_long_documents_equal_the_oracle(write, tmp_path, pooling):
    longest = LONG_TOKENS + 88
    checkpoint = write_encoder(tmp_path / "encoder", "gte", max_position_embeddings=longest)
    figures = parity.certify(*write(checkpoint, pooling, max_tokens=longest), FP16)
    assert figures["longest"] == longest and figures["max_abs_embedding_long"] > 0


def test_the_demo_with_its_learned_heads_equals_the_oracle(tmp_path):
    bundle = export_demo(tmp_path / "bundle")
    heads = [read_head(name, DEMO / "heads" / f"{name}.ckpt") for name in bundle.heads]
    tokens = probes.token_batch(Tokenizer.of(bundle))
    expected = Reference(DEMO / "encoder", heads, bundle.manifest.pooling).run(tokens)
    figures = parity.certify(CpuSession(bundle, VARIANT), tokens, expected, FP16)
    assert 1e-5 < figures["max_abs_score"] <= FP16.score


def key_bias_dropped(layer):
    return replace(layer, key=Linear(layer.key.weight, np.zeros_like(layer.key.bias)))


def up_and_gate_swapped(layer):
    return replace(layer, up=layer.gate, gate=layer.up)


def query_a_hundredth_larger(layer):
    return replace(layer, query=Linear(layer.query.weight * 1.01, layer.query.bias))


@pytest.mark.parametrize("mistake", [key_bias_dropped, up_and_gate_swapped, query_a_hundredth_larger])
def test_the_tolerance_of_fp16_still_refuses_a_wrong_graph(write, encoders, mistake):
    def change(weights):
        return replace(weights, layers=tuple(mistake(layer) for layer in weights.layers))

    with pytest.raises(ParityError, match=f"variant {VARIANT} is out of tolerance"):
        parity.certify(*write(encoders["gte"], "cls", change), FP16)


@each_pooling
@each_family
def test_norms_mean_and_heads_are_fp32_and_the_products_of_the_encoder_fp16(write, encoders, tmp_path, family, pooling):
    write(encoders[family], pooling)
    file = tmp_path / "out" / "graphs" / VARIANTS[VARIANT].graph
    onnx.checker.check_model(file, full_check=True)  # types of all inputs agree: what a strongly typed network needs
    graph = onnx.shape_inference.infer_shapes(onnx.load(file)).graph
    types = {value.name: value.type.tensor_type.elem_type for value in [*graph.value_info, *graph.output]}
    found = Counter((node.op_type, types[node.output[0]]) for node in graph.node)
    wide = {op for op, elem_type in found if elem_type == TensorProto.FLOAT}
    assert {"LayerNormalization", "Gemm", "ReduceSumSquare", "Div"} <= wide
    assert (pooling == "mean") == ("ReduceSum" in wide)
    narrow = {op for op, elem_type in found if elem_type == TensorProto.FLOAT16}
    assert {"MatMul", "Attention", "Gelu"} <= narrow and not narrow & {"LayerNormalization", "Gemm", "ReduceSum"}


def test_a_weight_beyond_fp16_is_refused(write, encoders):
    def change(weights):
        layer = weights.layers[0]
        huge = replace(layer, up=Linear(layer.up.weight * 1e6, layer.up.bias))
        return replace(weights, layers=(huge, *weights.layers[1:]))

    with pytest.raises(CheckpointError, match=r"layer.0.up.weight holds .*, fp16 ends at 65,504"):
        write(encoders["gte"], "cls", change)
