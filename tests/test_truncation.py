"""Huge documents get the ids of the whole, cut, though only a prefix of most is tokenized."""

from __future__ import annotations

import base64
import io
import random
import re
import unicodedata
from functools import cache
from itertools import pairwise

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as OracleTokenizer

from jql_engine import probe_texts, truncation
from jql_engine import tokenizer as tokens
from jql_engine.bundle import TokenizerInfo
from jql_engine.data import DocumentBatch
from jql_engine.tokenizer import Tokenizer
from jql_engine.tokenizer_libraries import oracle_encoder, read_oracle
from jql_engine.truncation import letters_and_marks, shortener
from tests.inputs import SPECIALS, special_tokens
from tests.test_tokenizer import write_unigram, write_wordpiece, xlm_roberta_normalizer

ADDED = (*SPECIALS, "a０b", "光己")
LIMITS = (2, 3, 10, 40)
HUGE = 100
LAYOUTS = ("trained", "xlm-roberta", "without split", "nfkc", "bare", "odd rules", "odd rules without split")
GERMAN, THAI, CHINESE, JAPANESE = (probe_texts.SENTENCES[i] for i in (1, 15, 16, 18))
ALPHABETS = ("月亮自己发光", "さくらの花毎", "กขคงน\u0e34\u0e48\u0e33", "abcdeéoó", "0123", "AB/+")
DISGUISES = str.maketrans({"é": "e\u0301", "ó": "o\u0301", "a": "ª", "o": "º", "B": "ℬ"})  # NFKC takes them off
# What a normalizer of graphemes could do to the neighbors of a cut, and none that is in use does.
ODD_RULES = {
    "\u0600a": "b", "\u0d4e ": "d", " \u0301": "c", "\r\n": "o", "b\u0301": "d  ", "0": "2", "\u0d4eA": "B",
}  # fmt: skip
ODD = (
    *ADDED, " <mask> ", " a0b ", "</s", " ", "  ", " " * 9, "\n", "\r\n" * 4, "\t", "\u00a0", "\u3000" * 6, "\u200b",
    "\u200d", "\x00", "\u0301", "e\u0301", "\u0e33", "\u1100", "\u1161", "\u11a8", "가", "\u0600", "\u0d4e", "\u093c",
    "\u0338", "\ufe0f", "\u2581", "👩‍👩‍👧‍👦", "🇩🇪", "\ufb01", "，", "。", "ｶﾞ", "Å", "ж", "жж", "ξξ", "|",
    "a0b", "\u0600a", "\u0d4eA", "\u0d4e a", "\u0d4e \n\n\n\n", "\n\n\n\n \u0301a", "b\u0301 a", "b\u0301\ta",
)  # fmt: skip
RUNS = st.sampled_from(ALPHABETS).flatmap(lambda alphabet: st.text(alphabet, min_size=1, max_size=40))
TEXTS = st.lists(
    RUNS | RUNS.map(lambda run: run.translate(DISGUISES)) | st.sampled_from([*ODD, *probe_texts.SENTENCES]),
    min_size=1,
    max_size=12,
).map("".join)


def n_grams(rng):
    """Scored pieces of every alphabet: all characters but one, and random longer ones, so that choices reach far."""
    pieces = {"▁": -3.0}
    for alphabet in ALPHABETS:
        pieces |= {c: rng.uniform(-9, -4) for c in alphabet[1:]}
        for _ in range(60):
            start = rng.choice(["", "", "▁"])
            pieces[start + "".join(rng.choices(alphabet, k=rng.randint(2, 4)))] = rng.uniform(-16, -6)
    return pieces


def write_unigram_of(pieces, folder, normalizer, whitespace_split=True, **settings):
    """A Unigram tokenizer with these pieces and scores."""
    vocabulary = [*((token, 0.0) for token in SPECIALS), *pieces.items()]
    tokenizer = OracleTokenizer(models.Unigram(vocabulary, 3, settings.pop("byte_fallback", False)))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=settings.pop("split", True))
    split = [pre_tokenizers.WhitespaceSplit()] if whitespace_split else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, metaspace])
    tokenizer.add_special_tokens(special_tokens())
    tokenizer.add_tokens(settings.pop("added", [AddedToken("a０b", lstrip=True), AddedToken("光己", rstrip=True)]))
    around = [("<s>", 0), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=around)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def normalizer_by(rules, folder):
    """A Precompiled normalizer with other rules than XLM-R's."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece compiles rules of normalization")
    from sentencepiece import sentencepiece_model_pb2

    hexadecimal = (["".join(f"{ord(c):X} " for c in side).strip() for side in rule] for rule in rules.items())
    (folder / "rules.tsv").write_text("".join(f"{left}\t{right}\n" for left, right in hexadecimal))
    written, proto = io.BytesIO(), sentencepiece_model_pb2.ModelProto()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(probe_texts.SENTENCES), model_writer=written, vocab_size=700, hard_vocab_limit=False,
        normalization_rule_tsv=str(folder / "rules.tsv"), minloglevel=2,
    )  # fmt: skip
    proto.ParseFromString(written.getvalue())
    return normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)


def write(folder, layout):
    """A tokenizer.json in one of the layouts that Unigram is met in."""
    if layout == "trained":
        return write_unigram(folder, xlm_roberta_normalizer(), whitespace_split=True) / "tokenizer.json"
    strip, blanks = normalizers.Strip(left=False), normalizers.Replace(Regex(" {2,}"), "▁")
    normalizer = {
        "xlm-roberta": xlm_roberta_normalizer,
        "without split": lambda: normalizers.Sequence([xlm_roberta_normalizer(), strip, blanks]),
        "nfkc": normalizers.NFKC,
        "bare": lambda: None,
        "odd rules": lambda: normalizer_by({key: ODD_RULES[key] for key in ODD_RULES if key != "\r\n"}, folder),
        "odd rules without split": lambda: normalizer_by(ODD_RULES, folder),
    }[layout]()
    whitespace_split = layout in ("xlm-roberta", "nfkc", "odd rules")
    return write_unigram_of(n_grams(random.Random(0)), folder, normalizer, whitespace_split)


@pytest.fixture(scope="module", params=LAYOUTS)
def file(request, tmp_path_factory):
    return write(tmp_path_factory.mktemp("layout"), request.param)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return write(tmp_path_factory.mktemp("layout"), "trained")


@pytest.fixture(scope="module")
def far(tmp_path_factory):
    """Choices of this one reach far."""
    return write(tmp_path_factory.mktemp("layout"), "xlm-roberta")


@pytest.fixture(scope="module", autouse=True)
def short_prefixes():
    """First prefixes too short for what is wanted, so that some are lengthened."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(truncation, "FIRST", 2)
        yield


@cache
def tokenizer_of(file, limit, fast=None, huge=HUGE):
    """The Tokenizer of a file for which texts of more than `huge` bytes are huge."""
    oracle = read_oracle(file)
    info = TokenizerInfo([0], [2], 1, fast, oracle.token_to_id("▁"), sorted(oracle.get_vocab().keys() & {*ADDED}))
    tokenizer = Tokenizer(file, info, limit)
    tokenizer._huge = huge
    return tokenizer


def shortener_of(file):
    return tokenizer_of(file, 2)._shortener


def encode(tokenizer, texts):
    found = tokenizer.encode(DocumentBatch.of(pa.array(texts, pa.large_string())))
    ids = [found.ids[start:stop].tolist() for start, stop in pairwise(found.offsets)]
    return ids, found.truncated.tolist()


def expect(file, texts, limit):
    """What `tokenizers` gives for the whole texts, cut by itself."""
    oracle = OracleTokenizer.from_file(str(file))
    oracle.enable_truncation(limit)
    encodings = oracle.encode_batch([text for text in texts if text is not None])
    return [encoding.ids for encoding in encodings], [bool(encoding.overflowing) for encoding in encodings]


def handed_over(tokenizer, text, monkeypatch):
    """Characters that the encoders get to see of a document, over all attempts."""
    seen = []
    content = Tokenizer._content
    monkeypatch.setattr(
        Tokenizer, "_content", lambda self, texts: seen.extend(texts.to_pylist()) or content(self, texts)
    )
    encode(tokenizer, [text])
    return sum(map(len, seen))


def shuffled(unit, n, seed=0):
    """Something new out of the characters of `unit` that no mark belongs to; same for the same seed."""
    rng = random.Random(seed)
    parts = re.findall(r".[\u0e30-\u0e3a\u0e47-\u0e4e]*", unit)
    return "".join(rng.choice(parts) for _ in range(n))


DOCUMENTS = {
    "chinese": CHINESE.replace(",", "") * 2 + shuffled(CHINESE, 300),
    "japanese": JAPANESE + shuffled(JAPANESE, 300),
    "thai": THAI * 2 + shuffled(THAI, 300),
    "german": GERMAN * 6,
    "german without spaces": "".join(GERMAN.split()) * 6,
    "every language": "\n".join(probe_texts.SENTENCES),
    "every language without spaces": "".join("".join(probe_texts.SENTENCES).split()),
    "base64": base64.b64encode(random.Random(0).randbytes(400)).decode(),
    "digits": shuffled("0123", 500),
    "minified": "function(a,b){return/x+/.test(a)?b[a[0]]:0};" * 9,
    "one character": "a" * 301 + "月" * 301,
    "white space": " \n\t" * 100,
    "white space before": " " * 400 + GERMAN,
    "white space between": "\r\n" * 200 + ("Wasser" + "\u3000\u00a0" * 50) * 6,
    "marks": "e\u0301o\u0303\u0323" * 90,
    "a mark that never ends": "a" + "\u0301" * 400,
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈🇩🇪" * 30,
    "unknown": "ξ" * 300 + "ж" * 300,
    "literal": ("<s>Wasser</s> a0b 光己<mask>") * 20,
    "literal in a run": "a<s>" * 100 + "ba0bcab" * 40,
}


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_huge_document_gets_the_ids_of_the_whole(file, name, limit):
    texts = ["Water", None, DOCUMENTS[name], "", DOCUMENTS[name][::-1], None, "月亮"]
    assert encode(tokenizer_of(file, limit), texts) == expect(file, texts, limit)


def test_with_the_fast_tokenizer_ids_are_the_same(trained):
    texts = [*DOCUMENTS.values(), *probe_texts.texts()]
    assert encode(tokenizer_of(trained, 10, "tokie"), texts) == expect(trained, texts, 10)


@settings(deadline=None, max_examples=150)
@given(texts=st.lists(TEXTS | st.none(), max_size=4), limit=st.sampled_from(LIMITS))
def test_any_huge_document_gets_the_ids_of_the_whole(file, texts, limit):
    assert encode(tokenizer_of(file, limit), texts) == expect(file, texts, limit)


def one_is_a_boundary(file, text, n_read):
    """Whether of the places found in the first characters of `text` one gives ids of the whole text."""
    places, oracle = shortener_of(file).places(text[:n_read]), tokenizer_of(file, 2)._tokenizer
    whole = oracle.encode(text, add_special_tokens=False).ids
    prefixes = (oracle.encode(text[:place], add_special_tokens=False).ids for place in places)
    return not places or any(ids[:-1] == whole[: len(ids) - 1] and len(ids) <= len(whole) for ids in prefixes)


@settings(deadline=None, max_examples=400)
@given(text=TEXTS, data=st.data())
def test_one_of_the_places_is_a_boundary_of_the_whole(file, text, data):
    assert one_is_a_boundary(file, text, data.draw(st.integers(1, len(text))))


GRAPHEMES = {
    "before the cut": ("\u0600e", "cc\u0600edd"),
    "after it": ("e\u0301", "cce\u0301dd"),
    "of a blank": ("\r\n", "cc\r\ndd"),
    "after a blank": (" \u0301", "cc \u0301dd"),
    "before a blank": ("\u0d4e ", "cc\u0d4e dd"),
}


@pytest.mark.parametrize("where", GRAPHEMES)
def test_a_grapheme_around_a_cut_is_left_alone(tmp_path, where):
    """Its normalized form is part of a long piece, of which nothing is seen in the text as it is."""
    grapheme, text = GRAPHEMES[where]
    pieces = dict.fromkeys("▁abcde", -9.0) | {"ccbdd": -1.0}
    file = write_unigram_of(pieces, tmp_path, normalizer_by({grapheme: "b"}, tmp_path), added=[])
    assert read_oracle(file).encode(text, add_special_tokens=False).tokens == ["▁", "ccbdd"]
    assert all(one_is_a_boundary(file, text, n) for n in range(1, len(text) + 1))


def test_an_added_token_is_not_cut_in_two_however_it_is_written(tmp_path):
    pieces, text = dict.fromkeys("▁abc0", -9.0), "cca0bcc"
    file = write_unigram_of(pieces, tmp_path, normalizers.NFKC(), added=[AddedToken("a０b", normalized=True)])
    assert "a0b" in read_oracle(file).encode(text).tokens
    assert all(one_is_a_boundary(file, text, n) for n in range(1, len(text) + 1))


def test_where_none_is_sure_as_many_places_as_a_piece_can_be_long_are_taken(far):
    longest = max(map(len, read_oracle(far).get_vocab()))
    places = shortener_of(far).places("自" * 100)
    assert places == [*range(places[0], places[0] + longest)]


@settings(deadline=None, max_examples=10)
@given(text=TEXTS)
def test_a_flood_of_white_space_may_be_dammed(file, text):
    oracle = tokenizer_of(file, 2)._tokenizer
    for odd in ("", *ODD):
        flooded = text + odd + " \n\u3000" * 3 + odd + text
        read = shortener_of(file)._read(memoryview(flooded.encode()))
        assert oracle.encode(read).ids == oracle.encode(flooded).ids


@pytest.mark.parametrize("n_bytes", [99, 100, 101, 102])
@pytest.mark.parametrize("unit", ["月亮自", "abcda", "ab cd "])
def test_around_the_threshold_nothing_changes(file, unit, n_bytes):
    text = (unit * 40).encode()[:n_bytes].decode(errors="ignore")
    n_ids = len(expect(file, [text], 1 << 20)[0][0])
    for limit in {3, n_ids - 1, n_ids, n_ids + 1}:
        assert encode(tokenizer_of(file, limit), [text]) == expect(file, [text], limit)
        assert encode(tokenizer_of(file, limit), [text])[1] == [limit < n_ids]


@pytest.mark.parametrize("fast", [None, "tokie"])
@pytest.mark.parametrize("unit", [CHINESE, JAPANESE, shuffled(THAI, 50), GERMAN + " ", "".join(GERMAN.split()), " "])
def test_of_fifty_megabytes_less_than_one_is_tokenized(trained, monkeypatch, unit, fast):
    text = unit * (50_000_000 // len(unit.encode()))
    assert handed_over(tokenizer_of(trained, 512, fast, tokens.HUGE), text, monkeypatch) < 1_000_000


@pytest.mark.parametrize("name", ["chinese", "japanese", "thai", "german", "base64", "digits", "every language"])
def test_of_a_document_with_places_to_cut_only_a_prefix_is_tokenized(trained, monkeypatch, name):
    text = DOCUMENTS[name] * 20
    assert handed_over(tokenizer_of(trained, 10), text, monkeypatch) < len(text) / 4


@pytest.mark.parametrize("unit", ["月亮自己发光", "さくらの花毎", "กขคง", "abcd"])
def test_a_cut_anywhere_would_change_ids(far, unit):
    oracle, text = oracle_encoder(read_oracle(far)), shuffled(unit, 200)
    whole = oracle([text])[0].tolist()
    kept = [oracle([text[:place]])[0].tolist()[:-1] for place in range(1, len(text))]
    assert any(ids != whole[: len(ids)] for ids in kept)


@pytest.mark.parametrize("fault", ["any place", "no agreement", "no id to spare"])
def test_without_a_condition_ids_would_change(far, monkeypatch, fault):
    def agree(room, ids, lengths):
        return fault == "no agreement" or bool((lengths >= room).all())

    def places(self, text):
        return [len(text) - 2]

    texts = [shuffled(alphabet, 200, seed) for alphabet in (*ALPHABETS, "aξ") for seed in range(20)]
    expected = expect(far, texts, 20)
    assert encode(tokenizer_of(far, 20), texts) == expected
    if fault == "any place":
        monkeypatch.setattr(truncation.Shortener, "places", places)
    else:
        monkeypatch.setattr(truncation, "_agree", agree)
    assert encode(tokenizer_of(far, 20), texts) != expected


def test_the_first_ids_of_a_run_can_depend_on_its_end(far):
    """So that no prefix gives them, and the document stays whole."""
    runs = ["自" * n for n in range(1000, 1010)]
    ids, _ = expect(far, runs, 4)
    assert len({tuple(first) for first in ids}) > 1
    assert [
        shortener_of(far).shorten(memoryview(run.encode()), 2, oracle_encoder(read_oracle(far))) for run in runs
    ] == runs


REFUSED = {
    "byte fallback": {"byte_fallback": True},
    "words not split": {"split": False},
    "an added token that must be a word": {"added": [AddedToken("ab0", single_word=True)]},
    "an added token with white space": {"added": [AddedToken("a b")]},
    "an added token with white space once normalized": {"added": [AddedToken("a\u00b4", normalized=True)]},
    "another normalizer": {"normalizer": normalizers.Lowercase()},
    "a normalizer among others": {"normalizer": normalizers.Sequence([normalizers.NFKC(), normalizers.Prepend("x")])},
    "a replacement": {"normalizer": normalizers.Replace("a", "b")},
}


@pytest.mark.parametrize("name", [*REFUSED, "wordpiece"])
def test_with_a_tokenizer_of_another_kind_documents_stay_whole(tmp_path, name):
    if name == "wordpiece":
        file = write_wordpiece(tmp_path) / "tokenizer.json"
    else:
        settings = {"pieces": n_grams(random.Random(0)), "normalizer": normalizers.NFKC()} | REFUSED[name]
        file = write_unigram_of(folder=tmp_path, **settings)
    assert shortener(read_oracle(file)) is None
    texts = [CHINESE * 5, GERMAN * 5]
    assert encode(tokenizer_of(file, 10), texts) == expect(file, texts, 10)


def test_letters_and_marks_are_graphemes_of_their_own():
    regex, rng, characters = pytest.importorskip("regex"), random.Random(0), letters_and_marks()
    neighbors = [*" \n\u3000aक가각ก月", *rng.choices(characters, k=20)]
    for one in neighbors:
        text = one + one.join(characters) + one
        assert len(regex.findall(r"\X", text)) == len(text)


def test_letters_and_marks_compose_with_none_before_them():
    composing = {decomposition[-1] for decomposition in map(_canonical, range(0x110000)) if len(decomposition) > 1}
    syllables = {chr(code) for code in range(0xAC00, 0xD7A4)}  # composed by a rule, of jamo
    assert not composing & {*letters_and_marks()}
    assert syllables <= {*letters_and_marks()}


def _canonical(code):
    decomposition = unicodedata.decomposition(chr(code))
    return [] if decomposition.startswith("<") else [chr(int(part, 16)) for part in decomposition.split()]
