"""ONNX encoders made elsewhere: traced by torch, written by another graph builder, or wrong."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

from jql_engine import Engine
from jql_engine.bundle import Bundle
from jql_engine.errors import BundleError, CheckpointError, ParityError
from jql_export import cli, probes
from jql_export.bundle import export_bundle
from jql_export.hub import Checkpoint
from jql_export.onnx_encoder import VARIANT, read_foreign, write_foreign
from jql_export.readouts.head_file import read_head
from jql_export.reference import load_encoder
from jql_export.tolerances import TOLERANCES
from tests.conftest import MAX_TOKENS, POOLING, write_tokenizer

FP32 = TOLERANCES["fp32"]
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class Traced(torch.nn.Module):
    """What optimum-cli traces: the encoder, with the inputs by position."""

    def __init__(self, directory: Path, pooled: bool = False) -> None:
        super().__init__()
        self.encoder, self.pooled = load_encoder(directory), pooled
        self.encoder.set_attn_implementation("eager")

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        hidden = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state
        if not self.pooled:
            return hidden
        mask = attention_mask[..., None].to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)


def trace(directory: Path, file: Path, inputs=INPUTS, output="last_hidden_state", opset=17, **options) -> Path:
    ids = torch.arange(5, 17).reshape(2, 6)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    axes = {name: {0: "batch", 1: "length"} for name in inputs} | {output: {0: "batch"}}
    axes[output] |= {} if options.get("pooled") else {1: "length"}
    with warnings.catch_warnings(action="ignore"):  # of the tracer, which needs no onnxscript and goes out of fashion
        torch.onnx.export(
            Traced(directory, **options).eval(), tuple(feeds[name] for name in inputs), file, input_names=list(inputs),
            output_names=[output], dynamic_axes=axes, opset_version=opset, dynamo=False,
        )  # fmt: skip
    return file


@pytest.fixture(scope="module")
def traced(encoders, tmp_path_factory) -> dict[str, Path]:
    """A traced graph of each family; tests must not change it."""
    root = tmp_path_factory.mktemp("traced")
    return {
        "gte": trace(encoders["gte"], root / "gte.onnx", INPUTS[:2]),
        "bert": trace(encoders["bert"], root / "bert.onnx", opset=14),
        "xlm-roberta": trace(encoders["xlm-roberta"], root / "xlm.onnx", INPUTS[:2], "token_embeddings", opset=18),
    }


def fuse(encoders, head_files, family, file, out, variants=(), **more) -> Bundle:
    heads = [read_head(name, path) for name, path in head_files.items()]
    checkpoint = Checkpoint(encoders[family], family, None)
    return export_bundle(
        checkpoint, heads, out, POOLING[family], MAX_TOKENS, variants, encoder_onnx=file, **more
    )  # fmt: skip


@pytest.mark.parametrize("family", ["gte", "bert", "xlm-roberta"])
def test_a_traced_encoder_becomes_a_certified_variant(encoders, head_files, traced, bundles, tmp_path, family):
    bundle = fuse(encoders, head_files, family, traced[family], tmp_path / "out")
    assert list(bundle.manifest.variants) == [VARIANT] == ["foreign-fp32"]
    variant = bundle.manifest.variants[VARIANT]
    assert (variant.layout, variant.precision, variant.provider) == ("padded", "fp32", "any")
    assert 0 < variant.parity["max_abs_embedding"] <= FP32.embedding and variant.parity["documents"] > 50
    assert bundle.encoder_hash == bundles[family].encoder_hash, "stored vectors of either serve the other's heads"
    assert {f"graphs/{VARIANT}.onnx", f"graphs/{VARIANT}.onnx.data"} < bundle.manifest.files.keys()
    graph = onnx.load(bundle.graph(VARIANT), load_external_data=False).graph
    assert [value.name for value in graph.input] == ["input_ids", "attention_mask"]
    assert [value.name for value in graph.output] == ["scores", "embedding"]
    found, expected = (Engine(b.path, device="cpu").score(probes.SENTENCES) for b in (bundle, bundles[family]))
    np.testing.assert_allclose(found.values, expected.values, rtol=0, atol=FP32.score)


def test_it_comes_beside_the_graphs_of_our_own(encoders, head_files, traced, tmp_path):
    bundle = fuse(encoders, head_files, "gte", traced["gte"], tmp_path / "out", ["cpu-fp32"])
    assert list(bundle.manifest.variants) == ["cpu-fp32", VARIANT]


def test_a_pooled_encoder_keeps_its_pooling_and_that_is_said(encoders, head_files, tmp_path):
    file = trace(encoders["bert"], tmp_path / "pooled.onnx", output="sentence_embedding", pooled=True)
    said: list[str] = []
    bundle = fuse(encoders, head_files, "bert", file, tmp_path / "out", report=said.append)
    assert bundle.manifest.pooling == "mean"
    assert f"pooling of {VARIANT}: that of {file}, which gives sentence_embedding alone" in said
    with pytest.raises(ParityError, match=f"variant {VARIANT} is out of tolerance: embedding differs"):
        checkpoint = Checkpoint(encoders["bert"], "bert", None)
        export_bundle(checkpoint, (), tmp_path / "cls", "cls", MAX_TOKENS, (), encoder_onnx=file)


def test_a_graph_of_other_weights_is_refused(encoders, head_files, traced, tmp_path):
    model = onnx.load(traced["gte"])
    tensor = next(tensor for tensor in model.graph.initializer if sorted(tensor.dims) == [32, 48])
    changed = numpy_helper.to_array(tensor).copy()
    changed[3, 5] += 0.01  # one weight of an MLP
    tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(ParityError, match=f"variant {VARIANT} is out of tolerance"):
        fuse(encoders, head_files, "gte", tmp_path / "other.onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [TensorProto.INT64, TensorProto.INT32])
def test_token_types_and_positions_are_made_up_in_the_type_that_is_asked_for(tmp_path, kind, encoders, head_files):
    """A graph that is nothing but three tables: its sum is the embedding layer of a BERT without layers."""
    bert = load_encoder(encoders["bert"])
    names = ("input_ids", "token_type_ids", "position_ids")
    tables = [getattr(bert.embeddings, name).weight for name in ("word_embeddings", "token_type_embeddings",
                                                                "position_embeddings")]  # fmt: skip
    nodes = [helper.make_node("Gather", [f"table{i}", name], [f"x{i}"]) for i, name in enumerate(names)]
    nodes += [helper.make_node("Sum", ["x0", "x1", "x2"], ["last_hidden_state"])]
    file = save(tmp_path / "tables.onnx", nodes, [*names, "attention_mask"], kind, ["last_hidden_state"], {
        f"table{i}": table.detach().numpy() for i, table in enumerate(tables)
    })  # fmt: skip
    heads = [read_head(name, path) for name, path in head_files.items()]
    write_foreign(tmp_path / "fused.onnx", read_foreign(file, 32), heads, "mean", 32)
    ids, mask = np.array([[5, 6, 7], [8, 9, 1]]), np.array([[1, 1, 1], [1, 1, 0]])
    found = ort.InferenceSession(tmp_path / "fused.onnx").run(
        ["embedding"], {"input_ids": ids, "attention_mask": mask}
    )[0]
    word, types, positions = (table.detach().numpy() for table in tables)
    hidden = word[ids] + types[0] + positions[:3]
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1)[:, None]
    np.testing.assert_allclose(found, mean / np.linalg.norm(mean, axis=1, keepdims=True), rtol=0, atol=1e-6)


def save(file: Path, nodes, inputs, kind, outputs, weights=None, opset=17, element=TensorProto.FLOAT) -> Path:
    graph = helper.make_graph(
        nodes, "foreign",
        [helper.make_tensor_value_info(name, kind, ["B", "L"]) for name in inputs],
        [helper.make_tensor_value_info(name, element, ["B", "L", 32]) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), file)
    return file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": ["input_ids", "attention_mask", "pixels"]}, r"takes input_ids \(int64\), .*, pixels \(int64\)"),
        ({"inputs": ["input_ids"]}, r"takes input_ids \(int64\); expected are the integers input_ids"),
        ({"kind": TensorProto.FLOAT}, r"takes input_ids \(float\), attention_mask \(float\)"),
        ({"outputs": ["logits"]}, r"gives logits \(float\); expected is last_hidden_state or"),
        ({"element": TensorProto.FLOAT16}, r"last_hidden_state is float16 \[B, L, 32\], expected float \[B, L, 32\]"),
        ({"outputs": ["sentence_embedding"]}, r"sentence_embedding is float \[B, L, 32\], expected float \[B, 32\]"),
        ({"opset": 10}, "has opset 10, expected 11 or newer"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_graph_that_is_no_text_encoder_is_refused_with_what_it_has(tmp_path, change, message):
    given = {"nodes": [], "inputs": ["input_ids", "attention_mask"], "kind": TensorProto.INT64}
    file = save(tmp_path / "wrong.onnx", **{**given, "outputs": ["last_hidden_state"], **change})
    with pytest.raises(CheckpointError, match=rf"wrong\.onnx.*{message}"):
        read_foreign(file, 32)


def test_another_width_is_refused(traced):
    with pytest.raises(CheckpointError, match=r"is float \[batch, length, 32\], expected float \[B, L, 48\]"):
        read_foreign(traced["gte"], 48)


@pytest.mark.parametrize(("content", "reason"), [(None, "No such file"), (b"not ONNX", "cannot be read as ONNX")])
def test_what_is_no_onnx_file_is_named(tmp_path, content, reason):
    file = tmp_path / "model.onnx"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"model\.onnx cannot be read as ONNX.*{reason if not content else ''}"):
        read_foreign(file, 32)


def test_a_graph_that_cannot_be_run_is_an_error(encoders, head_files, tmp_path):
    nodes = [helper.make_node("NoSuchOperator", ["input_ids"], ["last_hidden_state"])]
    file = save(tmp_path / "odd.onnx", nodes, INPUTS[:2], TensorProto.INT64, ["last_hidden_state"])
    with pytest.raises(CheckpointError, match=r"odd\.onnx cannot be run by ONNX Runtime: .*NoSuchOperator"):
        fuse(encoders, head_files, "gte", file, tmp_path / "out")


def outside(model: onnx.ModelProto, folder: Path, location: str) -> None:
    """Move the weights of `model` to `location`."""
    start = 0
    with (folder / location).open("wb") as stream:
        for tensor in model.graph.initializer:
            raw = numpy_helper.to_array(tensor).tobytes()
            tensor.raw_data = raw
            set_external_data(tensor, location, start, len(raw))
            tensor.ClearField("raw_data")
            stream.write(raw)
            start += len(raw)


def test_external_data_behind_the_links_of_the_hubs_cache_is_read(encoders, head_files, traced, tmp_path):
    folder, blobs = tmp_path / "snapshots" / "onnx", tmp_path / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    model = onnx.load(traced["bert"])
    outside(model, blobs, "model.onnx_data")
    onnx.save(model, blobs / "one")
    (blobs / "model.onnx_data").rename(blobs / "two")
    (folder / "model.onnx").symlink_to(blobs / "one")
    (folder / "model.onnx_data").symlink_to(blobs / "two")
    bundle = fuse(encoders, head_files, "bert", folder / "model.onnx", tmp_path / "out")
    assert list(bundle.manifest.variants) == [VARIANT]
    (blobs / "two").write_bytes((blobs / "two").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"has \d+ bytes, model\.onnx_data ends after \d+"):
        read_foreign(folder / "model.onnx", 32)
    (folder / "model.onnx_data").unlink()
    with pytest.raises(CheckpointError, match=r"its weights in model\.onnx_data cannot be read: No such file"):
        read_foreign(folder / "model.onnx", 32)


def test_external_data_outside_of_the_models_folder_is_refused(traced, tmp_path):
    (tmp_path / "model").mkdir()
    model = onnx.load(traced["gte"])
    outside(model, tmp_path / "model", "../secret")
    (tmp_path / "model" / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match=r"lies in \.\./secret, outside of the model's folder; refused"):
        read_foreign(tmp_path / "model" / "model.onnx", 32)


def test_an_architecture_without_a_graph_of_our_own_needs_a_foreign_one(encoders, head_files, tmp_path):
    """ELECTRA is none of the families; its transformers class is the oracle all the same."""
    folder = tmp_path / "electra"
    config = transformers.ElectraConfig(
        vocab_size=write_tokenizer(folder), embedding_size=32, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=48, max_position_embeddings=MAX_TOKENS, pad_token_id=1,
        initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.ElectraModel(config).save_pretrained(folder)
    file = trace(folder, tmp_path / "electra.onnx", INPUTS[:2])
    heads = [read_head(name, path) for name, path in head_files.items()]
    checkpoint = Checkpoint(folder, "electra", None)
    with pytest.raises(CheckpointError, match="model_type 'electra' is not supported"):
        export_bundle(checkpoint, heads, tmp_path / "none", "mean", MAX_TOKENS)
    bundle = export_bundle(checkpoint, heads, tmp_path / "out", "mean", MAX_TOKENS, (), encoder_onnx=file)
    encoder = bundle.manifest.encoder
    assert (encoder.architecture, encoder.layers, encoder.hidden_size) == ("electra", 2, 32)


def test_the_command_fuses_heads_onto_a_foreign_encoder(encoders, head_files, traced, tmp_path, monkeypatch, capsys):
    arguments = ["--encoder", encoders["gte"], f"--encoder-onnx={traced['gte']}", "--out", tmp_path / "out",
                 f"--head=edu={head_files['edu']}", "--pooling=cls", f"--max-tokens={MAX_TOKENS}"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["jql-export", *map(str, arguments)])
    cli.app(standalone_mode=False)
    assert "foreign-fp32 is certified: " in capsys.readouterr().err
    assert list(Bundle.open(tmp_path / "out").manifest.variants) == [VARIANT]
    with pytest.raises(BundleError, match="give --overwrite"):
        cli.app(standalone_mode=False)
