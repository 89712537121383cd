"""The benchmark of classifiers from end to end, in a small shape, and what it chooses."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from tokenizers import Tokenizer

from benchmarks import classifier_models, classifiers, table
from benchmarks.classifier_models import SHAPES, write_classifier
from benchmarks.corpus import of_lengths
from jql_engine.probe_texts import SENTENCES
from jql_export.families.read import read_encoder
from jql_export.tolerances import TOLERANCES

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 66, "vocab_size": 700,
}  # fmt: skip


def small(family):
    shape = SHAPES[family]
    return replace(shape, pieces=600, max_tokens=64, config={**shape.config, **SMALL})


@pytest.fixture
def corpus(tmp_path):
    texts = [" ".join(SENTENCES[i : i + 4]) for i in range(len(SENTENCES))]
    pq.write_table(pa.table({"text": [*texts, "", None]}), tmp_path / "corpus.parquet")
    return tmp_path / "corpus.parquet"


@pytest.mark.parametrize("family", SHAPES)
def test_a_shape_is_written_and_read(family, tmp_path):
    write_classifier(tmp_path / "model", small(family), SENTENCES, n_labels=2)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert config["pad_token_id"] == tokenizer.pad_token_id and tokenizer.model_max_length == 64
    assert len(tokenizer) <= config["vocab_size"] == 700
    assert read_encoder(tmp_path / "model").spec.n_layers == 4


@pytest.mark.parametrize("family", SHAPES)
def test_full_shapes_are_those_published(family):
    """Parameters in millions, as the cards of the models say; GTE's is arctic-embed-m-v2's."""
    shape = SHAPES[family]
    config = getattr(transformers, f"{shape.kind}Config")(**shape.config, num_labels=1, pad_token_id=0)
    with classifier_models.torch.device("meta"):
        model = getattr(transformers, f"{shape.kind}ForSequenceClassification")(config)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    published = {
        "bert-base": 109, "xlmr-base": 278, "gte-base": 305, "modernbert-base": 150, "modernbert-large": 396,
        "mmbert-base": 308,
    }  # fmt: skip
    assert millions == pytest.approx(published[family], abs=1)


def test_lengths_are_of_every_size_and_several_of_each():
    found = classifiers.lengths(200, 8192, 1500)
    assert len(found) == 200 and found == sorted(found) and found[0] == 1 and found[-1] > 8192
    assert sum(n > 1500 for n in found) == 4 and found[4:8] == [found[4]] * 4
    found = classifiers.lengths(30, 512, 1500)
    assert len(found) == 30 and found[0] == 1 and found[-1] > 512


def test_texts_are_cut_to_their_lengths(corpus, tmp_path):
    write_classifier(tmp_path / "model", small("modernbert-base"), SENTENCES)
    wanted = [1, 2, 7, 7, 30, 200]
    texts = of_lengths(corpus, wanted, tmp_path / "model" / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    found = [len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]
    assert np.abs(np.array(found) - wanted).max() <= 2 and len(set(texts)) == 6


def test_the_command_from_end_to_end(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table, "RESULTS", tmp_path / "results")
    monkeypatch.setitem(SHAPES, "modernbert-base", small("modernbert-base"))
    classifiers.main("modernbert-base", corpus, tmp_path / "work", None, None, 20, 20, 4, 1)
    result = json.loads(Path(capsys.readouterr().out.splitlines()[-1]).read_text())
    rows = {(row["name"], row["variant"]): row for row in result["rows"]}
    assert [row["what"] for row in result["rows"]][:3] == ["reference", "reference", "engine"]
    assert all(len(row["seconds"]) == 1 and row["peak_memory_mib"] > 50 for row in rows.values())
    settings = result["settings"]
    assert settings["ids_equal"] == "20 of 20" and settings["checked"]["standard_deviation"] > 0.2
    checked = settings["checked"]["cpu-fp32"]
    assert checked["largest_difference"] < TOLERANCES["fp32"].score
    assert checked["alone_to_batches"] < TOLERANCES["fp32"].batch
    assert settings["longest"]["tokens"] == 64


def test_a_process_that_ends_is_an_error_that_names_it(tmp_path):
    with pytest.raises(SystemExit, match=r"classifiers_worker\.py.*ended with 1"):
        classifiers.Process(Path(sys.executable), "no-such-variant", tmp_path, 64)
