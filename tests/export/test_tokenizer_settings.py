"""What tokenizer.json and the files beside it ask for: a bundle computes it, or the export names it and ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers

from jql_engine.bundle import Bundle
from jql_engine.errors import CheckpointError
from jql_export.bundle import export_bundle
from jql_export.hub import Checkpoint
from tests.conftest import MAX_TOKENS, write_encoder

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
PLAIN = {"model_max_length": MAX_TOKENS, "tokenizer_class": "PreTrainedTokenizerFast"}


@pytest.fixture
def bert(encoders, tmp_path):
    """A BERT checkpoint that a test may change."""
    folder = Path(shutil.copytree(encoders["bert"], tmp_path / "bert"))
    change(folder / CONFIG, **PLAIN)
    return folder


def change(file, **settings):
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | settings))


def export(folder: Path, *readouts, out: Path, **options) -> Bundle:
    return export_bundle(Checkpoint(folder, folder.name, None), readouts, out, pooling="mean", **options)


def auto_ids(folder, text):
    return transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]


def test_a_token_without_a_row_in_the_words_table_is_refused(bert, tmp_path):
    """No probe document has it: OpenVINO would give any score at all for a text that has it, ONNX Runtime end."""
    rows = json.loads((bert / "config.json").read_text())["vocab_size"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    tokenizer.add_tokens(["<doc>"])
    tokenizer.save_pretrained(bert)
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json has id {rows} \('<doc>'\), .* has {rows} rows"):
        export(bert, out=tmp_path / "out")


def test_a_special_token_around_a_text_without_a_row_is_refused(bert, tmp_path):
    rows = json.loads((bert / "config.json").read_text())["vocab_size"]
    post = json.loads((bert / TOKENIZER).read_text())["post_processor"]
    post["special_tokens"]["</s>"]["ids"] = [rows]
    change(bert / TOKENIZER, post_processor=post)
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json has id {rows} .* has {rows} rows"):
        export(bert, out=tmp_path / "out")


def test_a_token_type_that_is_not_0_is_refused_where_the_model_has_types(bert, tmp_path):
    with_types(bert / TOKENIZER, 1)
    change(bert / CONFIG, model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    fed = transformers.AutoTokenizer.from_pretrained(bert)("hello")
    assert set(fed["token_type_ids"]) == {1}, "it changes nothing: accept it"
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.json gives the tokens of a single text the types 1; .* is 0"
    ):
        export(bert, out=tmp_path / "out")
    change(bert / CONFIG, model_input_names=["input_ids", "attention_mask"])
    export(bert, out=tmp_path / "fed-without-types")
    gte = write_encoder(tmp_path / "gte", "gte", type_vocab_size=0)
    change(gte / CONFIG, **PLAIN)
    with_types(gte / TOKENIZER, 1)
    export(gte, out=tmp_path / "has-no-types")


def with_types(file, number):
    post = json.loads(file.read_text())["post_processor"]
    for piece in post["single"]:
        for value in piece.values():
            value["type_id"] = number
    change(file, post_processor=post)
