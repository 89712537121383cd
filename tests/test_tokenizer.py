from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as OracleTokenizer

from jql_engine import probe_texts
from jql_engine.data import DocumentBatch
from jql_engine.errors import CheckpointError, TokenizerError
from jql_engine.tokenizer import UNLIMITED, Tokenizer, prove_fast
from jql_export.tokenizer import write_tokenizer
from tests.inputs import SPECIALS, special_tokens, train_unigram

PAD = 1
ODD = [" ", "\n", "\t", "\u00a0", "\u200b", "\u3000", "\ufeff", "\u2581", "<", "/s>", "e\u0301", "\ufb01", "Ａ", "\x00"]
# Random Unicode, and mixtures of what tokenizers trip over with sentences whose words the vocabulary knows.
PIECES = st.sampled_from([*SPECIALS, *ODD, *probe_texts.SENTENCES]) | st.text(max_size=4)
ANY_TEXT = st.text(max_size=60) | st.lists(PIECES, max_size=8).map("".join)


def write_unigram(folder, normalizer=None, whitespace_split=False, added=()):
    """A Unigram tokenizer; as it is, without a normalizer, tokie 0.1.4 is identical."""
    metaspace = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    split = [pre_tokenizers.WhitespaceSplit()] if whitespace_split else []
    tokenizer = of_parts(models.Unigram(), normalizer, pre_tokenizers.Sequence([*split, metaspace]))
    train_unigram(tokenizer)
    tokenizer.add_tokens(list(added))
    return write(folder, tokenizer)


def write_wordpiece(folder):
    """A tokenizer in the layout of BERT."""
    model = models.WordPiece(unk_token="<unk>")
    tokenizer = of_parts(model, normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer())
    trainer = trainers.WordPieceTrainer(vocab_size=1500, special_tokens=special_tokens(), show_progress=False)
    tokenizer.train_from_iterator(probe_texts.SENTENCES, trainer)
    return write(folder, tokenizer)


def of_parts(model, normalizer, pre_tokenizer):
    tokenizer = OracleTokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer


def write(folder, tokenizer):
    around = [("<s>", 0), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=around)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def change_pieces(file, change):
    content = json.loads(file.read_text())
    content["model"]["vocab"] = change(content["model"]["vocab"])
    file.write_text(json.dumps(content))


def xlm_roberta_normalizer():
    """The rules of XLM-R's tokenizer.json, from SentencePiece, which made that one too."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece makes XLM-R's normalization rules")
    import io

    from sentencepiece import sentencepiece_model_pb2

    written, proto = io.BytesIO(), sentencepiece_model_pb2.ModelProto()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(probe_texts.SENTENCES), model_writer=written, vocab_size=700, hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc", minloglevel=2,
    )  # fmt: skip
    proto.ParseFromString(written.getvalue())
    return normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)


@pytest.fixture(scope="module", params=["metaspace", "xlm-roberta"])
def fast(request, tmp_path_factory):
    """A bundle's tokenizer.json and its description, with a fast tokenizer proven."""
    folder = tmp_path_factory.mktemp("fast")
    if request.param == "metaspace":
        write_unigram(folder)
    else:
        write_unigram(folder, xlm_roberta_normalizer(), whitespace_split=True)
    return prove(folder)


def prove(folder):
    file = folder / "written.json"
    return file, prove_fast(file, write_tokenizer(folder, file, PAD), probe_texts.texts())


def encode(file, info, texts, max_tokens=UNLIMITED):
    tokens = Tokenizer(file, info, max_tokens).encode(DocumentBatch.of(pa.array(texts, pa.large_string())))
    return [ids.tolist() for ids in np.split(tokens.ids, tokens.offsets[1:-1])]


def expect(file, texts, max_tokens=None):
    """What `tokenizers` gives, truncation included."""
    oracle = OracleTokenizer.from_file(str(file))
    if max_tokens:
        oracle.enable_truncation(max_tokens)
    return [encoding.ids for encoding in oracle.encode_batch(texts)]


def test_special_tokens_around_a_text_are_found(encoders, tmp_path):
    info = write_tokenizer(encoders["gte"], tmp_path / "tokenizer.json", PAD)
    assert (info.prefix, info.suffix, info.pad, info.fast) == ([0], [2], PAD, None)
    assert info.added_tokens == sorted(SPECIALS)
    assert OracleTokenizer.from_file(str(tmp_path / "tokenizer.json")).id_to_token(info.lone_space) == "\u2581"


def test_several_special_tokens_around_a_text_keep_their_order(tmp_path):
    write_unigram(tmp_path)
    tokenizer = OracleTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    template = [("<s>", 0), ("</s>", 2), ("<mask>", 4)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <mask> $A <mask> </s>", special_tokens=template
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    file, info = prove(tmp_path)
    assert (info.prefix, info.suffix) == ([0, 4], [4, 2])
    assert encode(file, info, list(probe_texts.SENTENCES), 9) == expect(file, list(probe_texts.SENTENCES), 9)


def test_truncation_and_padding_of_the_source_are_removed(tmp_path):
    write_unigram(tmp_path)
    source = OracleTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    source.enable_truncation(8)
    source.enable_padding(length=16, pad_id=PAD, pad_token="<pad>")
    source.save(str(tmp_path / "tokenizer.json"))
    assert len(source.encode(probe_texts.SENTENCES[0]).ids) == 16
    file, info = prove(tmp_path)
    written = json.loads(file.read_text())
    assert written["truncation"] is None and written["padding"] is None
    assert len(encode(file, info, [probe_texts.SENTENCES[0]])[0]) > 16


def test_a_missing_tokenizer_json_is_an_error_that_says_how_to_write_it(tmp_path):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is missing; .*save_pretrained"):
        write_tokenizer(tmp_path, tmp_path / "written.json", PAD)


def test_a_damaged_tokenizer_json_is_an_error(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is no tokenizer that `tokenizers` can read"):
        write_tokenizer(tmp_path, tmp_path / "written.json", PAD)


LOWER = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])


@pytest.mark.parametrize("kind", ["BertTokenizer", "BertTokenizerFast", None])
@pytest.mark.parametrize(("normalizer", "lower"), [(None, True), (normalizers.NFC(), True), (LOWER, False)], ids=str)
def test_lower_case_that_tokenizer_json_contradicts_is_an_error(tmp_path, normalizer, lower, kind):
    """transformers' classes, but those that take the file as it is, do what tokenizer_config.json says."""
    write_unigram(tmp_path, normalizer)
    write_config(tmp_path, do_lower_case=lower, tokenizer_class=kind)
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json has do_lower_case = {lower}, but tokenizer"):
        write_tokenizer(tmp_path, tmp_path / "written.json", PAD)


@pytest.mark.parametrize(
    ("normalizer", "config"),
    [
        (None, {}),
        (LOWER, {}),
        (None, {"do_lower_case": False}),
        (LOWER, {"do_lower_case": True}),
        # As multilingual MiniLM is published, whose vectors are those of texts with their capitals.
        (None, {"do_lower_case": True, "tokenizer_class": "PreTrainedTokenizerFast"}),
        (None, {"truncation_side": "right"}),
    ],
    ids=str,
)
def test_a_config_that_agrees_with_tokenizer_json_is_accepted(tmp_path, normalizer, config):
    write_unigram(tmp_path, normalizer)
    write_config(tmp_path, **config)
    write_tokenizer(tmp_path, tmp_path / "written.json", PAD)


@pytest.mark.parametrize("place", ["tokenizer_config.json", "tokenizer.json"])
def test_a_checkpoint_that_cuts_the_beginning_of_a_text_is_an_error(tmp_path, place):
    write_unigram(tmp_path)
    if place == "tokenizer.json":
        source = OracleTokenizer.from_file(str(tmp_path / place))
        source.enable_truncation(8, direction="left")
        source.save(str(tmp_path / place))
    else:
        write_config(tmp_path, truncation_side="left")
    with pytest.raises(CheckpointError, match=r"truncation_side = 'left' .* cut the beginning"):
        write_tokenizer(tmp_path, tmp_path / "written.json", PAD)


def write_config(folder, **settings):
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_a_tokenizer_without_special_tokens_is_an_error(tmp_path):
    write_unigram(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, "post_processor": None}))
    with pytest.raises(TokenizerError, match="no special token around a text"):
        write_tokenizer(tmp_path, tmp_path / "written.json", PAD)


def test_a_tokenizer_that_panics_is_an_error(tmp_path):
    """`tokenizers` panics, which is no Exception in Python, where the post-processor names a token without ids."""
    write_unigram(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["post_processor"]["special_tokens"] = {}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot tokenize a text: "):
        write_tokenizer(tmp_path, tmp_path / "written.json", PAD)


def test_a_normalizer_that_panics_is_an_error(tmp_path):
    """One that puts something into an empty text, and then changes it."""
    write_unigram(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    steps = [{"type": "Replace", "pattern": {"String": ""}, "content": "\u2581"}, {"type": "Lowercase"}]
    content["normalizer"] = {"type": "Sequence", "normalizers": steps}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot tokenize a text: index out of bounds"):
        write_tokenizer(tmp_path, tmp_path / "written.json", PAD)


def test_an_id_that_would_take_gigabytes_to_save_is_an_error(tmp_path):
    write_wordpiece(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"]["rare"] = 1 << 31
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match="has the id 2147483648, and no embedding table that many rows"):
        write_tokenizer(tmp_path, tmp_path / "written.json", PAD)


def test_an_id_around_texts_that_fits_no_graph_is_an_error(tmp_path):
    write_unigram(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["post_processor"]["special_tokens"]["<s>"]["ids"] = [1 << 31]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is damaged: an id in tokenizer is 2147483648"):
        write_tokenizer(tmp_path, tmp_path / "written.json", PAD)


def test_what_tokenizers_says_of_a_text_is_an_error_of_ours(tmp_path):
    """An unknown character in a vocabulary without an unknown token."""
    file, info = prove(write_unigram(tmp_path))
    content = json.loads(file.read_text())
    content["model"]["unk_id"] = None
    file.write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=r"a document cannot be tokenized: .*unk_id"):
        encode(file, replace(info, fast=None), ["\U00020000"])


def test_an_identical_fast_tokenizer_is_named_with_its_version(fast):
    assert fast[1].fast.startswith("tokie 0.")


@pytest.mark.parametrize("settings", [{"normalizer": normalizers.NFKC()}, {"whitespace_split": True}], ids=str)
def test_a_fast_tokenizer_that_differs_is_refused(tmp_path, settings):
    """tokie 0.1.4 reads both settings and leaves them out."""
    file, info = prove(write_unigram(tmp_path, **settings))
    assert info.fast is None
    texts = probe_texts.texts()
    assert encode(file, replace(info, fast="tokie"), texts) != expect(file, texts), "it does not differ: accept it"
    assert encode(file, info, texts) == expect(file, texts)


def test_scores_that_are_not_exact_in_fp32_are_refused_since_ties_behind_an_unknown_character_differ(tmp_path):
    def change(pieces):
        unrounded = [("\u2581", -3.0), ("Q", -9.1), ("Z", -20.0), ("QZ", -9.8), ("ZQ", -9.8)]  # Q ZQ, or QZ Q?
        return [piece for piece in pieces if piece[0] != "\u2581"] + unrounded

    write_unigram(tmp_path)
    change_pieces(tmp_path / "tokenizer.json", change)
    file, info = prove(tmp_path)
    assert info.fast is None
    fast = Tokenizer(file, replace(info, fast="tokie"), UNLIMITED)
    assert fast.is_exact_on(probe_texts.texts()), "another reason to refuse it"
    assert fast.is_exact_on(["QZQ"]) and not fast.is_exact_on(["\U00020000QZQ"])
    assert encode(file, info, ["\U00020000QZQ"]) == expect(file, ["\U00020000QZQ"])


@pytest.mark.parametrize(("error", "is_fast"), [(3.6e-15, True), (9e-10, True), (1.1e-9, False), (1e-7, False)])
def test_scores_as_far_from_fp32_as_json_readers_leave_those_of_xlm_roberta_are_accepted(tmp_path, error, is_fast):
    write_unigram(tmp_path, xlm_roberta_normalizer(), whitespace_split=True)
    # Between -4 and -8 every `error` is less than half of the distance to the next fp32 value, and more than fp64's.
    change_pieces(tmp_path / "tokenizer.json", lambda pieces: [(p, s + error if -8 < s < -4 else s) for p, s in pieces])
    scores = np.array([score for _, score in json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]])
    assert np.abs(scores - scores.astype(np.float32)).max() == pytest.approx(error, rel=0.2)
    assert (prove(tmp_path)[1].fast is not None) == is_fast


def test_a_fast_tokenizer_that_cannot_read_the_file_is_refused(tmp_path):
    write_unigram(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    words = {word: i for i, (word, _) in enumerate(content["model"]["vocab"])}
    content["model"] = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    file, info = prove(tmp_path)
    assert info.fast is None
    with pytest.raises(TokenizerError, match="no tokenizer that tokie"):
        Tokenizer(file, replace(info, fast="tokie"), UNLIMITED)


@pytest.mark.parametrize("max_tokens", [3, 4, 7, 64, UNLIMITED])
def test_ids_with_the_fast_tokenizer_are_the_oracles(fast, max_tokens):
    file, info = fast
    texts = probe_texts.texts()
    assert encode(file, info, texts, max_tokens) == expect(file, texts, max_tokens)


@pytest.mark.parametrize(
    "text", ["", " ", "\n\n", "\u200b", "\u3000\t", "<s>", "<s> </s>", "a</s>b", " <mask> x", "<pad><pad>"]
)
@pytest.mark.parametrize("max_tokens", [3, 5, UNLIMITED])
def test_blank_texts_and_literal_special_tokens_get_the_oracles_ids(fast, text, max_tokens):
    file, info = fast
    texts = ["before", text, text, "after"]
    assert encode(file, info, texts, max_tokens) == expect(file, texts, max_tokens)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=6), max_tokens=st.sampled_from([3, 4, 10, 33]))
@example(texts=["\u200b", "x\x00y", "\u200bx"], max_tokens=3)
def test_any_text_gets_the_oracles_ids(fast, texts, max_tokens):
    file, info = fast
    assert encode(file, info, texts, max_tokens) == expect(file, texts, max_tokens)


def test_a_text_is_marked_as_truncated_where_the_oracle_cuts(fast):
    file, info = fast
    texts, limit = probe_texts.texts(), 20
    tokens = Tokenizer(file, info, limit).encode(DocumentBatch.of(pa.array(texts, pa.large_string())))
    assert tokens.truncated.tolist() == [len(ids) > limit for ids in expect(file, texts)]
    assert 0 < tokens.truncated.sum() < len(texts)


def test_a_fast_wordpiece_tokenizer_that_differs_is_refused(tmp_path):
    file, info = prove(write_wordpiece(tmp_path))
    texts = ["a\x7fb", "a\u2e4db", "a\u0890b"]
    assert encode(file, info, texts) == expect(file, texts)


def test_an_added_token_that_only_normalising_reveals_gets_the_oracles_ids(tmp_path):
    added = [AddedToken("[TOC]", normalized=True)]
    file, info = prove(write_unigram(tmp_path, xlm_roberta_normalizer(), whitespace_split=True, added=added))
    assert encode(file, info, ["x［TOC］y"]) == expect(file, ["x［TOC］y"])
