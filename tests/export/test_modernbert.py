"""ModernBERT: windows, two RoPE bases, norms before attention and MLP; against transformers' own classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from jql_engine import Engine, probe_texts
from jql_engine.bundle import Bundle
from jql_engine.errors import CheckpointError, HeadError, ParityError
from jql_engine.sessions.base import ON_GPU
from jql_export.bundle import export_bundle
from jql_export.families import modernbert
from jql_export.families.read import read_encoder
from jql_export.graph import windows
from jql_export.hub import Checkpoint
from jql_export.readouts.classifier import read_classifier
from jql_export.readouts.head_file import read_head
from jql_export.tolerances import TOLERANCES
from jql_export.variants import VARIANTS
from tests.conftest import write_head, write_tokenizer

MAX_TOKENS = 96
WORDS = " ".join(probe_texts.SENTENCES).split()
TEXTS = ["", *(" ".join(WORDS[7 * n : 8 * n]) for n in range(1, 60)), *probe_texts.ODDITIES[:12]]
ON_CPU = ("cpu-fp32", "standard-fp32", "openvino-fp32")


def write_modernbert(folder: Path, n_labels: int = 3, **settings: object) -> Path:
    """A classifier of seven layers with windows of nine tokens, wide enough that every part of it matters."""
    config = transformers.ModernBertConfig(**{
        "vocab_size": write_tokenizer(folder), "hidden_size": 32, "num_hidden_layers": 7, "num_attention_heads": 4,
        "intermediate_size": 48, "local_attention": 8, "max_position_embeddings": MAX_TOKENS, "pad_token_id": 1,
        "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2, "initializer_range": 0.3,
        "initializer_cutoff_factor": 3.0, "num_labels": n_labels, "classifier_pooling": "mean", **settings,
    })  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ModernBertForSequenceClassification(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0, 0.3)
            elif weight.ndim == 1:
                weight.normal_(1, 0.2)
            elif "head" in name or "classifier" in name:
                weight.normal_(0, 0.3)
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": MAX_TOKENS}))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_modernbert(tmp_path_factory.mktemp("modernbert"))


def export(folder: Path, out: Path, *readouts, variants=("cpu-fp32",), **options) -> Bundle:
    return export_bundle(Checkpoint(folder, folder.name, None), readouts, out, variants=variants, **options)


def logits(folder: Path, texts: list[str], engine: Engine) -> np.ndarray:
    """By transformers' class, of ids of `tokenizers`."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    rows = []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            rows.append(model(input_ids=ids).logits)
    return torch.cat(rows).numpy()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"classifier_pooling": "cls"},
        {"hidden_activation": "silu", "classifier_activation": "silu", "norm_bias": True},
        {"attention_bias": True, "mlp_bias": True, "classifier_bias": True},
        {"num_hidden_layers": 6, "classifier_pooling": "cls"},  # the last layer has a window
        {"layer_types": ["full_attention"] * 7},
        {"layer_types": ["sliding_attention"] * 7, "local_attention": 2},
    ],
    ids=["as published", "cls", "silu", "biases", "window at the end", "no windows", "windows alone"],
)
def test_scores_are_the_logits_of_transformers(tmp_path, settings):
    folder = write_modernbert(tmp_path / "model", **settings)
    bundle = export(folder, tmp_path / "out", read_classifier("q", folder), variants=ON_CPU)
    assert bundle.manifest.encoder.unused_tensors == []
    for variant in ON_CPU:
        engine = Engine(bundle.path, "cpu", variant)
        expected = logits(folder, TEXTS, engine)
        assert expected.std() > 0.1 and len({len(text) for text in TEXTS}) > 40
        np.testing.assert_allclose(engine.score(TEXTS).values, expected, rtol=0, atol=TOLERANCES["fp32"].score)


def test_it_is_an_encoder_for_regression_heads_as_well(checkpoint, tmp_path):
    head = read_head("edu", write_head(tmp_path / "edu.ckpt"))
    for pooling in ("cls", "mean"):
        bundle = export(checkpoint, tmp_path / pooling, head, variants=ON_CPU, pooling=pooling)
        assert bundle.manifest.encoder.architecture == "modernbert" and bundle.manifest.pooling == pooling


def test_no_part_of_a_graph_grows_with_the_square_of_the_length(tmp_path):
    """Of a model whose layers all have windows."""
    folder = write_modernbert(tmp_path / "model", layer_types=["sliding_attention"] * 7)
    bundle = export(folder, tmp_path / "out", read_classifier("q", folder), variants=("cpu-fp32", "openvino-fp32"))
    for variant, n in (("cpu-fp32", "MatMul"), ("openvino-fp32", "Attention")):
        graph = onnx.load(bundle.graph(variant), load_external_data=False).graph
        assert not [node for node in graph.node if node.op_type == "MultiHeadAttention"]
        attention = [node for node in graph.node if node.op_type == n]
        assert len(attention) >= 7
        if n == "Attention":
            assert {node.input[3] for node in attention} == {windows.MASK}


def window_off_by_one(monkeypatch):
    real = windows._within
    monkeypatch.setattr(windows, "_within", lambda window, distance: real(window, max(0, distance - 1)))


def global_layers_shifted(monkeypatch):
    real = modernbert._kinds
    monkeypatch.setattr(modernbert, "_kinds", lambda *about: [real(*about)[-1], *real(*about)[:-1]])


def thetas_swapped(monkeypatch):
    real = modernbert._frequencies
    other = dict(zip(modernbert.KINDS, reversed(modernbert.KINDS), strict=True))
    monkeypatch.setattr(modernbert, "_frequencies", lambda d, c, kind, width: real(d, c, other[kind], width))


def halves_of_wi_swapped(monkeypatch):
    monkeypatch.setattr(modernbert, "_halves", lambda n: (slice(n, 2 * n), slice(0, n)))


def final_norm_left_out(monkeypatch):
    real = modernbert.weights_of
    monkeypatch.setattr(modernbert, "weights_of", lambda *a, final_norm, **k: (final_norm(), real(*a, **k))[1])


@pytest.mark.parametrize(
    "damage", [window_off_by_one, global_layers_shifted, thetas_swapped, halves_of_wi_swapped, final_norm_left_out]
)
def test_a_wrong_graph_is_refused(checkpoint, tmp_path, monkeypatch, damage):
    damage(monkeypatch)
    with pytest.raises((ParityError, CheckpointError), match=r"(embedding|score)\w* differs by|layers\.\d\.attn_norm"):
        export(checkpoint, tmp_path / "out", read_classifier("q", checkpoint))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling = .*; supported is no such setting"),
        ({"hidden_activation": "relu"}, "hidden_activation = 'relu'; supported is 'gelu' or 'silu'"),
        ({"layer_types": ["full_attention"]}, "layer_types = .* expected 7 of full_attention and sliding_attention"),
        ({"layer_types": [{}] * 7}, "layer_types = .* expected 7 of"),
        ({"local_attention": 1}, "local_attention = 1, expected 2 or more"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_type = 'yarn'"),
    ],
)
def test_what_would_change_the_arithmetic_is_refused_by_name(checkpoint, tmp_path, changes, message):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        read_encoder(folder)


def test_a_config_as_it_was_published_before_transformers_5_is_the_same(checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    del config["layer_types"], config["rope_parameters"]
    config |= {"global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "local_rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config))
    bundle = export(folder, tmp_path / "out", read_classifier("q", folder))
    engine = Engine(bundle.path, "cpu")
    np.testing.assert_allclose(
        engine.score(TEXTS).values, logits(checkpoint, TEXTS, engine), rtol=0, atol=TOLERANCES["fp32"].score
    )


def test_tensors_without_a_place_are_an_error(checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    state = load_file(folder / "model.safetensors")
    save_file(state | {"model.layers.0.attn_norm.weight": torch.ones(32)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensors of the encoder have no place .*layers\.0\.attn_norm\.weight"):
        read_encoder(folder)


def test_graphs_for_gpus_are_written_as_well(checkpoint, tmp_path):
    """What they compute: tests/export/test_windows.py."""
    on_gpu = [name for name, kind in VARIANTS.items() if kind.provider in ON_GPU]
    bundle = export(checkpoint, tmp_path / "out", read_classifier("q", checkpoint), variants=["cpu-fp32", *on_gpu])
    assert {"cpu-fp32", *on_gpu} == bundle.manifest.variants.keys() and len(on_gpu) == 4
    assert all(bundle.graph(name).exists() for name in on_gpu)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classifier_pooling": "max"}, "classifier_pooling 'max'; known are cls, mean"),
        ({"classifier_pooling": ["cls"]}, r"classifier_pooling \['cls'\]; known are cls"),
        ({"classifier_activation": "mish"}, "classifier_activation 'mish'; known are gelu"),
    ],
)
def test_an_unknown_head_is_refused(checkpoint, tmp_path, changes, message):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changes))
    with pytest.raises(HeadError, match=message):
        read_classifier("q", folder)
