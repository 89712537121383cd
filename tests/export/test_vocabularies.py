"""Tokenizers of the kinds that published classifiers have: a bundle's ids are those of transformers' AutoTokenizer."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
import transformers

from benchmarks.vocabularies import KINDS, write_vocabulary
from jql_engine import probe_texts
from jql_engine.data import DocumentBatch
from jql_engine.errors import CheckpointError
from jql_engine.tokenizer import HUGE, UNLIMITED, Tokenizer, prove_fast
from jql_export.tokenizer import write_tokenizer

PIECES = 1500
CODE = "def f(x):\n        return x ** 2  # \u2264 4\n\n\n\tif x:\r\n            pass\n"
TEXTS = [
    *probe_texts.texts(), CODE, "", " ", "  \n ", "A" * 300, "caf\u00e9 cafe\u0301 CAF\u00c9 \u0130I",
    "中文字 和 かな 한국어",
    "[CLS] a [SEP][MASK] [PAD]b", "<bos>a<eos> <mask> <pad>", "<s> a</s><mask> <unk>", "\u2581a \u2581\u2581b",
    "👩\u200d👩\u200d👧 🏳\ufe0f\u200d🌈 \U0001f1e9\U0001f1ea", "\x00\x07\ufffd\ufeff\u00ad\u200b",
    "1,234.5e-6 10^9 \u00bd \u2168", "<0x41><0xFF> &nbsp;",
    " leading and trailing ", "a\u00a0b\u3000c\u2028d", "don't I'LL we've", "#hash ##ing @at http://x.y/z?q=1&r=2",
]  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    """The folder of a checkpoint's tokenizer, transformers' tokenizer of it, and the bundle's."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = write_vocabulary(folder, request.param, probe_texts.SENTENCES, PIECES, 512)
    written = folder / "written.json"
    info = write_tokenizer(folder, written, tokenizer.token_to_id(KINDS[request.param].pad))
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    return auto, written, prove_fast(written, info, probe_texts.texts())


def encode(file, info, texts, max_tokens):
    tokens = Tokenizer(file, info, max_tokens).encode(DocumentBatch.of(pa.array(texts, pa.large_string())))
    return [ids.tolist() for ids in np.split(tokens.ids, tokens.offsets[1:-1])], tokens.truncated


@pytest.mark.parametrize("max_tokens", [3, 16, 512, UNLIMITED])
def test_ids_are_those_of_transformers(kind, max_tokens):
    auto, file, info = kind
    cut = {} if max_tokens == UNLIMITED else {"truncation": True, "max_length": max_tokens}
    found, truncated = encode(file, info, TEXTS, max_tokens)
    whole = auto(TEXTS)["input_ids"]
    assert found == auto(TEXTS, **cut)["input_ids"]
    assert truncated.tolist() == [len(ids) > max_tokens for ids in whole]
    assert len({len(ids) for ids in whole}) > 40, "the texts are too much alike"


def test_a_huge_text_is_cut_as_transformers_cuts_it(kind):
    auto, file, info = kind
    texts = [text * (1 + HUGE // len(text)) for text in (" ".join(probe_texts.SENTENCES), CODE, "wort ")]
    found, truncated = encode(file, info, texts, 100)
    assert found == auto(texts, truncation=True, max_length=100)["input_ids"] and truncated.all()


def test_every_kind_has_special_tokens_around_a_text_and_knows_most_of_it(kind):
    auto, _, info = kind
    assert info.prefix == [auto.cls_token_id] and info.suffix == [auto.sep_token_id]
    ids = np.concatenate(auto(list(probe_texts.SENTENCES))["input_ids"])
    assert (ids == auto.unk_token_id).mean() < 0.01 and len(np.unique(ids)) > 300


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("wordpiece-uncased", {"strip_accents": False}, "strip_accents = False, but tokenizer.json strips accents"),
        ("wordpiece-cased", {"strip_accents": True}, "strip_accents = True, but tokenizer.json keeps accents"),
        (
            "wordpiece-cased",
            {"tokenize_chinese_chars": False},
            "tokenize_chinese_chars = False, but tokenizer.json sets",
        ),
        ("wordpiece-cased", {"do_lower_case": None}, None),
        ("wordpiece-cased", "no do_lower_case", "do_lower_case = True, but tokenizer.json keeps capitals"),
    ],
)
def test_a_setting_that_would_change_ids_is_refused(tmp_path, name, changes, message):
    """transformers' class for BERT writes its normalizer anew, from what tokenizer_config.json says."""
    tokenizer = write_vocabulary(tmp_path, name, probe_texts.SENTENCES, PIECES, 512)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    if isinstance(changes, dict):
        config |= changes
    else:
        del config["do_lower_case"]
    file.write_text(json.dumps(config))
    if message is None:
        write_tokenizer(tmp_path, tmp_path / "written.json", 0)
        return
    probe = "\u00c9t\u00e9 中文"
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert auto(probe)["input_ids"] != tokenizer.encode(probe).ids, "it changes nothing: accept it"
    with pytest.raises(CheckpointError, match=message):
        write_tokenizer(tmp_path, tmp_path / "written.json", 0)
