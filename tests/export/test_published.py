"""Models on the hub, as far as config.json and the names of tensors go: read, and certified, at a small width."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jql_engine import Engine
from jql_engine.errors import CheckpointError, HeadError
from jql_export.bundle import export_bundle
from jql_export.families.read import read_encoder
from jql_export.hub import Checkpoint
from jql_export.readouts.classifier import read_classifier
from tests.conftest import write_tokenizer
from tests.published import MODELS, SMALL, write_model

MAX_TOKENS = 24
TEXTS = ["", "a b", "The theory of plate tectonics, in short. " * 9]
# What may stay of a checkpoint once encoder and head are read: a part of its name.
UNUSED = {"pooler", "lm_head", "decoder", "head", "classifier", "position_ids"}


@pytest.mark.parametrize("name", [name for name, one in MODELS.items() if one.megabytes])
def test_names_and_shapes_add_up_to_the_published_file(name):
    one = MODELS[name]
    assert one.config["torch_dtype"] == "float32"
    assert 4 * sum(map(math.prod, one.shapes(one.config).values())) / 1e6 == pytest.approx(one.megabytes, abs=1)


def test_a_file_of_mmbert_has_138_tensors():
    """As the card of its migrated copy says."""
    one = MODELS["jhu-clsp/mmBERT-base"]
    assert len(one.shapes(one.config)) == 138


@pytest.mark.parametrize("name", MODELS)
def test_a_published_model_is_read_and_certified(tmp_path, name):
    """By transformers' own class, from the same files."""
    folder = tmp_path / "model"
    config = write_model(folder, name)
    write_tokenizer(folder)
    spec = read_encoder(folder).spec
    assert (spec.n_layers, spec.hidden_size) == (SMALL["num_hidden_layers"], SMALL["hidden_size"])
    assert spec.max_positions == config["max_position_embeddings"] - 2 * (config["model_type"] == "xlm-roberta")
    readouts = [read_classifier("q", folder)] if MODELS[name].is_classifier else []
    bundle = export_bundle(Checkpoint(folder, name, None), readouts, tmp_path / "out", "mean", MAX_TOKENS)
    unused = bundle.manifest.encoder.unused_tensors
    assert all(UNUSED & set(tensor.split(".")) for tensor in unused)
    if readouts:
        assert len(bundle.heads) == len(config["id2label"]) and not [name for name in unused if "classifier" in name]
        scores = Engine(bundle.path, "cpu").score(TEXTS).values
        assert np.ptp(scores, axis=0).min() > 0.01, "a column that says nothing"


def test_code_of_a_repository_is_neither_run_nor_asked_for(tmp_path, monkeypatch):
    """transformers asks on the terminal whether to run it, where nobody said that it must not."""
    name = "WebOrganizer/TopicClassifier"
    write_model(tmp_path / "model", name, auto_map={"AutoConfig": "configuration.NewConfig"})
    write_tokenizer(tmp_path / "model")
    (tmp_path / "model/configuration.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass NewConfig: pass\n")
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    readouts = [read_classifier("q", tmp_path / "model")]
    export_bundle(Checkpoint(tmp_path / "model", name, None), readouts, tmp_path / "out", "mean", MAX_TOKENS)
    assert not asked and not (tmp_path / "ran").exists()


def test_the_columns_of_weborganizers_topics(tmp_path):
    write_model(tmp_path, "WebOrganizer/TopicClassifier")
    outputs = read_classifier("topic", tmp_path).outputs
    assert len(outputs) == 24 and outputs[:3] == ("topic_Adult", "topic_Art___Design", "topic_Software_Dev_")


def test_labels_that_are_integers_become_columns(tmp_path):
    write_model(tmp_path, "MichaelKont/modernbert-llm-router")
    assert read_classifier("route", tmp_path).outputs == ("route_0", "route_1", "route_2")


@pytest.mark.parametrize(
    ("name", "missing", "found"),
    [
        # As in dicta-il/dictabert-tiny: what BertConfig and XLMRobertaConfig take instead.
        ("Snowflake/snowflake-arctic-embed-m", ("pad_token_id", "layer_norm_eps", "position_embedding_type"), 0),
        ("intfloat/multilingual-e5-base", ("pad_token_id", "position_embedding_type"), 1),
    ],
)
def test_a_config_that_leaves_out_a_default_is_read(tmp_path, name, missing, found):
    whole, short = (tmp_path / kind for kind in ("whole", "short"))
    write_model(whole, name)
    write_model(short, name, leave_out=missing)
    assert read_encoder(short).spec == read_encoder(whole).spec
    assert read_encoder(short).spec.pad_id == found


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        # thecuong/gte-multilingual-base-quantization-bnb and its like: the weights are no longer those of the model.
        (
            "Alibaba-NLP/gte-multilingual-base",
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
            r"quantization_config = .*; supported is no such setting",
        ),
        # Tochka-AI/ruRoPEBert-classic-base-512: model_type bert, with code of its own that turns positions.
        (
            "Snowflake/snowflake-arctic-embed-m",
            {"rope_theta": 10000.0, "rope_scaling": None, "pooler_type": "mean"},
            r"rope_theta = 10000.0; supported is no such setting",
        ),
        # jinaai/jina-embeddings-v2-base-en: model_type bert, with code of its own that has no positions at all.
        (
            "Snowflake/snowflake-arctic-embed-m",
            {"position_embedding_type": "alibi"},
            r"'alibi'; supported is 'absolute'",
        ),
        ("WebOrganizer/TopicClassifier", {"logn_attention_scale": True}, r"logn_attention_scale = True"),
        ("WebOrganizer/TopicClassifier", {"layer_norm_type": "rms_norm"}, r"layer_norm_type = 'rms_norm'"),
        ("WebOrganizer/TopicClassifier", {"pack_qkv": False}, r"pack_qkv = False; supported is True"),
        ("jhu-clsp/mmBERT-base", {"rope_scaling": {"type": "yarn"}}, r"rope_scaling = .*; supported is no such"),
    ],
)
def test_a_key_that_changes_the_arithmetic_is_refused_by_name(tmp_path, name, changes, message):
    write_model(tmp_path, name, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_encoder(tmp_path)


def test_a_classifier_of_another_kind_is_refused_with_what_is_known(tmp_path):
    """nvidia/multilingual-domain-classifier: DeBERTa under a class of its own, and no architecture in its config."""
    write_model(tmp_path, "HuggingFaceFW/fineweb-edu-classifier", model_type="deberta-v2", leave_out=["architectures"])
    with pytest.raises(HeadError, match=r"has model_type 'deberta-v2'; known are bert: BertForSeq"):
        read_classifier("domain", tmp_path)
    with pytest.raises(CheckpointError, match=r"model_type 'deberta-v2' is not supported; known are bert, gte, "):
        read_encoder(tmp_path)
