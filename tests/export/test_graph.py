from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from jql_engine.batching import plan_batches
from jql_engine.bundle import Bundle
from jql_engine.data import TokenBatch
from jql_engine.errors import ParityError
from jql_engine.sessions import certify as parity
from jql_engine.sessions.cpu import CpuSession
from jql_engine.tokenizer import Tokenizer
from jql_export import probes
from jql_export.families.read import read_encoder
from jql_export.graph.dialect import MICROSOFT
from jql_export.graph.encoder import PAGE, write_graph
from jql_export.graph.writer import EXTERNAL_BYTES
from jql_export.readouts.head_file import read_head
from jql_export.reference import Reference
from jql_export.tolerances import LONG_TOKENS, TOLERANCES
from jql_export.variants import VARIANTS
from tests.conftest import FAMILIES, ON_CPU, POOLING, write_encoder

FP32 = TOLERANCES["fp32"]
OTHER = {"cls": "mean", "mean": "cls"}
each_variant = pytest.mark.parametrize("variant", ON_CPU)


@pytest.fixture
def write(bundles, head_files, tmp_path):
    """Writes the graph of a checkpoint; gives a session and what the oracle expects of the probe documents."""

    def run(checkpoint, variant, pooling, max_tokens=None):
        weights, heads = read_encoder(checkpoint), [read_head(name, file) for name, file in head_files.items()]
        manifest = bundles[weights.spec.architecture].manifest
        limit = max_tokens or manifest.max_tokens
        bundle = Bundle(tmp_path / "written", replace(manifest, max_tokens=limit), "")
        (bundle.path / "graphs").mkdir(parents=True)
        write_graph(bundle.graph(variant), weights, heads, pooling, VARIANTS[variant].dialect())
        tokens = probes.token_batch(Tokenizer(checkpoint / "tokenizer.json", manifest.tokenizer, limit))
        return CpuSession(bundle, variant), tokens, Reference(checkpoint, heads, pooling).run(tokens)

    return run


@each_variant
@pytest.mark.parametrize("family", FAMILIES)
def test_the_other_pooling_equals_the_oracle_too(write, encoders, family, variant):
    parity.certify(*write(encoders[family], variant, OTHER[POOLING[family]]), FP32)


@each_variant
@pytest.mark.parametrize(
    ("family", "settings", "dropped"),
    [
        ("gte", {"num_hidden_layers": 1}, "encoder.layer.1."),
        ("gte", {"type_vocab_size": 0}, "embeddings.token_type"),
        ("gte", {"num_attention_heads": 1}, None),
        ("gte", {"layer_norm_eps": 0.1, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}, None),
        ("bert", {"num_attention_heads": 8}, None),
        ("xlm-roberta", {"pad_token_id": 3}, None),
    ],
    ids=str,
)
def test_other_shapes_equal_the_oracle(write, encoders, tmp_path, family, settings, dropped, variant):
    checkpoint = shutil.copytree(encoders[family], tmp_path / "encoder")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | settings))
    if dropped:
        tensors = load_file(checkpoint / "model.safetensors")
        kept = {name: value for name, value in tensors.items() if not name.startswith(dropped)}
        save_file(kept, checkpoint / "model.safetensors", metadata={"format": "pt"})
    parity.certify(*write(checkpoint, variant, "cls", max_tokens=64), FP32)


@each_variant
def test_documents_beyond_the_border_of_length_equal_the_oracle(write, tmp_path, variant):
    longest = LONG_TOKENS + 88  # one probe document is longer than LONG_TOKENS + 1
    checkpoint = write_encoder(tmp_path / "encoder", "gte", max_position_embeddings=longest)
    written = write(checkpoint, variant, "cls", max_tokens=longest)
    figures = parity.certify(*written, FP32)
    assert figures["longest"] == longest
    assert 0 < figures["max_abs_embedding_long"] <= FP32.embedding_long
    with pytest.raises(ParityError, match=f"embedding_long differs .* of (513|{longest}) tokens"):
        parity.certify(*written, replace(FP32, embedding_long=0.0))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_stands_in_the_padding_does_not_matter(bundles, family):
    bundle = bundles[family]
    other_pad = replace(bundle.manifest, tokenizer=replace(bundle.manifest.tokenizer, pad=7))
    session, other = (CpuSession(replace(bundle, manifest=m), "standard-fp32") for m in (bundle.manifest, other_pad))
    batch = next(plan_batches(two_documents(bundle), session.budget))
    assert batch.n_padding > 0
    np.testing.assert_array_equal(session.run(batch).embeddings, other.run(batch).embeddings)


@each_variant
def test_the_graph_uses_only_the_operators_of_its_dialect(bundles, variant):
    model = load(bundles["gte"], variant)
    found = {node.domain for node in model.graph.node}
    assert found == ({"", MICROSOFT} if variant == "cpu-fp32" else {""})
    assert {opset.domain: opset.version for opset in model.opset_import} == VARIANTS[variant].dialect().opsets


@each_variant
@pytest.mark.parametrize("family", FAMILIES)
def test_the_graph_is_valid_onnx_of_the_documented_inputs_and_outputs(bundles, family, variant):
    model = load(bundles[family], variant)
    onnx.checker.check_model(bundles[family].graph(variant), full_check=variant == "standard-fp32")
    masked = bundles[family].manifest.variants[variant].layout == "padded"
    shapes = {value.name: shape(value) for value in [*model.graph.input, *model.graph.output]}
    inputs = {"input_ids": ["B", "L"]} | ({"attention_mask": ["B", "L"]} if masked else {})
    assert shapes == inputs | {"scores": ["B", 2], "embedding": ["B", 32]}


@each_variant
def test_all_heads_are_one_stacked_product(bundles, variant):
    model = load(bundles["gte"], variant)
    assert Counter(node.op_type for node in model.graph.node)["Gemm"] == 2
    assert weights_of(model)["heads.hidden.weight"].shape == (16 + 24, 32)


@each_variant
def test_with_cls_pooling_the_last_layer_computes_the_first_token_only(bundles, variant):
    ops = {family: Counter(node.op_type for node in load(bundles[family], variant).graph.node) for family in FAMILIES}
    assert ops["gte"]["RotaryEmbedding"] == 3, "queries and keys of two layers less the query at position 0"
    assert ops["xlm-roberta"]["Slice"] == 1 and POOLING["xlm-roberta"] == "cls"
    assert ops["xlm-roberta"]["ReduceMean"] + ops["xlm-roberta"]["ReduceSum"] == 0


@each_variant
def test_large_weights_lie_outside_of_the_graph_on_page_borders(bundles, variant):
    file = bundles["gte"].graph(variant)
    tensors = onnx.load(file, load_external_data=False).graph.initializer
    external = [tensor for tensor in tensors if tensor.data_location == onnx.TensorProto.EXTERNAL]
    places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in external]
    assert "word" in {tensor.name for tensor in external}
    assert {place["location"] for place in places} == {f"{variant}.onnx.data"}
    assert all(int(place["offset"]) % PAGE == 0 and int(place["length"]) >= EXTERNAL_BYTES for place in places)
    assert all(len(tensor.raw_data) < EXTERNAL_BYTES for tensor in tensors)


@each_variant
def test_weights_have_stable_names_and_the_checkpoints_values(bundles, encoders, variant):
    stored, weights = weights_of(load(bundles["gte"], variant)), read_encoder(encoders["gte"])
    np.testing.assert_array_equal(stored["layer.1.key.bias"], weights.layers[1].key.bias)
    np.testing.assert_array_equal(stored["layer.0.gate.weight"], weights.layers[0].gate.weight.T)
    np.testing.assert_array_equal(stored["word"], weights.word + weights.token_type)
    assert "layer.0.value.bias" not in stored, "it moves into the output projection"


def two_documents(bundle):
    tokenizer = bundle.manifest.tokenizer
    documents = [[*tokenizer.prefix, *content, *tokenizer.suffix] for content in ([9, 10, 11], [12] * 8)]
    offsets = np.cumsum([0, *map(len, documents)])
    ids = np.concatenate(documents).astype(np.int32)
    return TokenBatch(np.arange(2), ids, offsets, np.zeros(2, np.bool_))


def load(bundle, variant):
    return onnx.load(bundle.graph(variant))


def weights_of(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def shape(value):
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
