"""What tokenizer.json and the files beside it ask for: a bundle computes it, or the export names it and ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from jql_engine import probe_texts
from jql_engine.bundle import Bundle
from jql_engine.errors import CheckpointError, TokenizerError
from jql_export.bundle import export_bundle
from jql_export.hub import Checkpoint
from jql_export.tokenizer import write_tokenizer
from tests.conftest import MAX_TOKENS, write_encoder
from tests.inputs import SPECIALS

TOKENIZER, CONFIG, MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
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


BPE_SPECIALS = ["[CLS]", "[PAD]", "[SEP]"]


def write_bpe(folder, texts, unknown=(), size=300):
    """A BPE tokenizer that knows the characters of `texts`, and has a token for others only if it is given one."""
    tokenizer = Tokenizer(models.BPE(unk_token=next(iter(unknown), None)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[*BPE_SPECIALS, *unknown], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    around = [("[CLS]", 0), ("[SEP]", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    tokenizer.save(str(folder / TOKENIZER))


def test_a_vocabulary_without_latin_letters_has_its_special_tokens_around_a_text(tmp_path):
    """Of a text whose letters it does not know nothing is left, and the special tokens might all stand before it."""
    cyrillic = [text for text in probe_texts.SENTENCES if "и" in text]
    write_bpe(tmp_path, cyrillic)
    assert Tokenizer.from_file(str(tmp_path / TOKENIZER)).encode("a").ids == [0, 2]
    info = write_tokenizer(tmp_path, tmp_path / "written.json", 1)
    assert (info.prefix, info.suffix) == ([0], [2])


def test_a_vocabulary_that_knows_no_probe_text_is_refused(tmp_path):
    """Probe documents of any length could not be made of it: the export took memory until none was left."""
    write_bpe(tmp_path, ["தமிழ்", "எழுத்துக்கள்"])
    with pytest.raises(TokenizerError, match=r"tokenizer\.json gives no token for any of \d+ sentences"):
        write_tokenizer(tmp_path, tmp_path / "written.json", 1)


def test_ids_around_a_text_that_depend_on_the_text_are_refused(tmp_path):
    """As the text itself once more does: ids after one text are none to put after another."""
    write_bpe(tmp_path, probe_texts.SENTENCES, ["[UNK]"])
    template = processors.TemplateProcessing(single="[CLS] $A [SEP] $A", special_tokens=[("[CLS]", 0), ("[SEP]", 2)])
    tokenizer = Tokenizer.from_file(str(tmp_path / TOKENIZER))
    tokenizer.post_processor = template
    tokenizer.save(str(tmp_path / TOKENIZER))
    with pytest.raises(TokenizerError, match="has a post-processor that changes the ids of a text, or puts others"):
        write_tokenizer(tmp_path, tmp_path / "written.json", 1)


def test_ids_that_are_drawn_at_random_are_refused(tmp_path):
    write_bpe(tmp_path, probe_texts.SENTENCES, ["[UNK]"])
    model = json.loads((tmp_path / TOKENIZER).read_text())["model"]
    change(tmp_path / TOKENIZER, model=model | {"dropout": 0.0})
    write_tokenizer(tmp_path, tmp_path / "written.json", 1)
    change(tmp_path / TOKENIZER, model=model | {"dropout": 0.3})
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has dropout = 0\.3.*set it to null"):
        write_tokenizer(tmp_path, tmp_path / "written.json", 1)


def test_special_tokens_that_a_text_would_be_split_at_are_refused_where_they_are_to_be_split_themselves(bert, tmp_path):
    before = auto_ids(bert, "a <mask> b")
    change(bert / CONFIG, split_special_tokens=True)
    assert auto_ids(bert, "a <mask> b") != before, "it changes nothing: accept it"
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json has split_special_tokens = True"):
        write_tokenizer(bert, tmp_path / "written.json", 1)


DOC = {"content": "<doc>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}


@pytest.mark.parametrize(
    ("file", "settings", "text"),
    [
        (CONFIG, {"added_tokens_decoder": {"100": DOC}}, "a <doc> b"),
        (CONFIG, {"additional_special_tokens": ["<doc>"]}, "a <doc> b"),
        (CONFIG, {"extra_special_tokens": {"document_token": "<doc>"}}, "a <doc> b"),
        (CONFIG, {"extra_special_tokens": ["Stern"]}, "der Stern"),
        (CONFIG, {"mask_token": "Stern"}, "der Stern"),
        ("added_tokens.json", {"<doc>": 100}, "a <doc> b"),
        (MAP, {"additional_special_tokens": ["<doc>"]}, "a <doc> b"),
    ],
)
def test_a_token_that_only_another_file_names_is_refused(bert, tmp_path, file, settings, text):
    before = auto_ids(bert, text)
    change(bert / file, **settings)
    assert auto_ids(bert, text) != before, "it changes nothing: accept it"
    token = text.split()[1]
    with pytest.raises(
        CheckpointError, match=rf"{file} has the token '{token}'.*tokenizer\.json lacks among its added"
    ):
        write_tokenizer(bert, tmp_path / "written.json", 1)


def test_a_token_under_another_id_is_refused(bert, tmp_path):
    change(bert / CONFIG, added_tokens_decoder={"100": DOC | {"content": "<mask>"}})
    with pytest.raises(CheckpointError, match=r"'<mask>' under id 100, which tokenizer\.json has under id 4;"):
        write_tokenizer(bert, tmp_path / "written.json", 1)


def test_tokens_that_every_file_names_alike_are_accepted(bert, tmp_path):
    """As transformers 4 saves them."""
    ids = {str(number): DOC | {"content": token} for number, token in enumerate(SPECIALS)}
    names = {"cls_token": "<s>", "pad_token": DOC | {"content": "<pad>"}, "additional_special_tokens": ["<mask>"]}
    change(bert / CONFIG, added_tokens_decoder=ids, extra_special_tokens={}, bos_token=None, **names)
    change(bert / MAP, **names)
    change(bert / "added_tokens.json", **{"<mask>": 4})
    write_tokenizer(bert, tmp_path / "written.json", 1)
