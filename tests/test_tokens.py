from __future__ import annotations

import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pyarrow as pa
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, processors

from jql_engine import probe_texts, tokenizer_libraries
from jql_engine import tokenizer as module
from jql_engine.bundle import TokenizerInfo
from jql_engine.data import DocumentBatch, TokenBatch
from jql_engine.errors import TokenizerError
from jql_engine.tokenizer import UNLIMITED, Tokenizer, with_proven_tokenizer
from jql_engine.tokenizer_libraries import fast_encoder, fast_name, oracle_encoder, oracle_name, read_oracle
from tests.inputs import OTHER_TOKIE, SPECIALS, made_with_other_tokie, train_unigram

LIMITS = (2, 3, 4, 7, 20, 96)
# White space that XLM-R's normalizer turns into blanks is left out: the normalizer of this file changes nothing.
FRAGMENTS = (
    *SPECIALS, "</s", "s>", " ", "  ", "\n", "\t", "\r\n", "\u200b", "\ufeff", "\x00",
    "a", "Water", " boils at", "ü", "e\u0301", "月亮",
    *probe_texts.SENTENCES[:2],
)  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer in XLM-R's layout on which tokie errs exactly where the real one makes it err.

    tokie recognizes the layout by the Precompiled normalizer; this one's table is empty.
    """
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Precompiled(struct.pack("<I", 2048) + bytes(2048))
    space = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), space])
    train_unigram(tokenizer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@cache
def tokenizer_of(file: Path, fast: str | None, limit: int = UNLIMITED) -> Tokenizer:
    lone_space = tokenizers.Tokenizer.from_file(str(file)).token_to_id("\u2581")
    return Tokenizer(file, TokenizerInfo([0], [2], 1, fast, lone_space, list(SPECIALS)), limit)


def encode(tokenizer: Tokenizer, texts: list[str | None]) -> TokenBatch:
    return tokenizer.encode(DocumentBatch.of(pa.array(texts, pa.large_string())))


def ids_of(tokens: TokenBatch) -> list[list[int]]:
    return [tokens.ids[tokens.offsets[i] : tokens.offsets[i + 1]].tolist() for i in range(len(tokens.rows))]


def both(test):
    return pytest.mark.parametrize("fast", [None, "tokie"], ids=["tokenizers", "tokie"])(test)


@both
@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_documents_get_the_ids_that_tokenizers_gives_them_cut_where_it_cuts(file, fast, data):
    text = st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join)
    texts = data.draw(st.lists(st.one_of(st.none(), text), max_size=8))
    limit = data.draw(st.sampled_from(LIMITS))
    oracle = tokenizers.Tokenizer.from_file(str(file))
    oracle.enable_truncation(limit)
    expected = [oracle.encode(text) for text in texts if text is not None]
    found = encode(tokenizer_of(file, fast, limit), texts)
    assert ids_of(found) == [encoding.ids for encoding in expected]
    assert found.truncated.tolist() == [bool(encoding.overflowing) for encoding in expected]
    assert found.rows.tolist() == [row for row, text in enumerate(texts) if text is not None]


@pytest.mark.parametrize("text", [" ", "\n \t", "<s> ", "\n<s>", "Water </s> "])
def test_a_text_that_tokie_gets_wrong_is_put_right(file, text):
    expected = oracle_encoder(read_oracle(file))([text])[0].tolist()
    assert fast_encoder(file)([text])[0].tolist() != expected
    among = encode(tokenizer_of(file, "tokie"), ["Water boils", text, "", text, "月亮"])
    assert ids_of(among)[1] == ids_of(among)[3] == [0, *expected, 2]
    assert ids_of(among) == ids_of(encode(tokenizer_of(file, None), ["Water boils", text, "", text, "月亮"]))


def test_a_vast_text_is_left_to_tokenizers(file, monkeypatch):
    texts, seen = ["Water", "月亮" * 9, "boils", "", " boils at"], []
    monkeypatch.setattr(module, "VAST", 53)
    tokenizer = Tokenizer(file, tokenizer_of(file, "tokie").info, UNLIMITED)
    fast, tokenizer._huge = tokenizer._fast, 0
    monkeypatch.setattr(tokenizer, "_fast", lambda given: seen.extend(given) or fast(given))
    assert ids_of(encode(tokenizer, texts)) == ids_of(encode(tokenizer_of(file, None), texts))
    assert seen == ["Water", "", "boils", "", " boils at"]


@both
def test_a_null_text_has_no_row(file, fast):
    found = encode(tokenizer_of(file, fast), [None, "a", None, "", None])
    assert found.rows.tolist() == [1, 3]
    assert ids_of(found) == ids_of(encode(tokenizer_of(file, fast), ["a", ""]))


@both
@pytest.mark.parametrize("texts", [[], [None], [None, None]])
def test_without_a_text_there_are_no_tokens(file, fast, texts):
    found = encode(tokenizer_of(file, fast), texts)
    assert len(found.rows) == len(found.ids) == 0 and found.offsets.tolist() == [0]


@both
@pytest.mark.parametrize(("prefix", "suffix"), [([7, 8], [9]), ([], [7, 8]), ([7], []), ([7], [8, 9])])
def test_prefix_and_suffix_surround_every_text_and_count(file, fast, prefix, suffix):
    content, lengths = oracle_encoder(read_oracle(file))(["Water boils at a lower temperature"])
    around = TokenizerInfo(prefix, suffix, 1, fast, None, [])
    texts = ["", "Water boils at a lower temperature"]
    whole = encode(Tokenizer(file, around, UNLIMITED), texts)
    assert ids_of(whole) == [[*prefix, *suffix], [*prefix, *content, *suffix]]
    cut = encode(Tokenizer(file, around, 6), texts)
    room = 6 - len(prefix) - len(suffix)
    assert ids_of(cut) == [[*prefix, *suffix], [*prefix, *content[:room], *suffix]]
    assert lengths[0] > room and cut.truncated.tolist() == [False, True]


def test_a_text_of_exactly_the_limit_is_not_truncated(file):
    [whole] = ids_of(encode(tokenizer_of(file, None), ["Water boils at a lower temperature"]))
    exact = encode(tokenizer_of(file, None, len(whole)), ["Water boils at a lower temperature"])
    assert ids_of(exact) == [whole] and exact.truncated.tolist() == [False]
    cut = encode(tokenizer_of(file, None, len(whole) - 1), ["Water boils at a lower temperature"])
    assert ids_of(cut) == [[*whole[:-2], whole[-1]]] and cut.truncated.tolist() == [True]


@pytest.mark.parametrize("encoder", [read_oracle, fast_encoder])
@pytest.mark.parametrize("content", ["", "{}", '{"model": {"type": "Unheard"}}'])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, encoder, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is no tokenizer that"):
        encoder(path)


@pytest.mark.parametrize("encoder", [read_oracle, fast_encoder])
def test_a_missing_file_is_named(tmp_path, encoder):
    with pytest.raises(TokenizerError, match=r"absent\.json is no tokenizer that"):
        encoder(tmp_path / "absent.json")


def test_a_fast_tokenizer_that_is_made_anew_gives_the_same_ids(file, monkeypatch):
    monkeypatch.setattr(tokenizer_libraries, "RENEW_CHARACTERS", 100)
    texts, encode, expected = [*probe_texts.SENTENCES], fast_encoder(file), fast_encoder(file)([*probe_texts.SENTENCES])
    for _ in range(5):
        ids, lengths = encode(texts)
        assert ids.tolist() == expected[0].tolist() and lengths.tolist() == expected[1].tolist()
        assert encode._tokenizer is None
    with ThreadPoolExecutor(4) as pool:
        assert all(len(found[0]) == len(expected[0]) for found in pool.map(encode, [texts] * 20))


def test_another_version_of_the_fast_tokenizer_is_proven_anew_once(bundle, tmp_path):
    said: list[str] = []
    other = made_with_other_tokie(bundle, tmp_path / "other", same_ids=True)
    proven = with_proven_tokenizer(other, said.append)
    assert (proven.manifest.tokenizer.fast, proven.hash) == (fast_name(), other.hash)
    [line] = said
    assert line.startswith(f"tokenizer: {fast_name()} is installed here, the bundle was made with {OTHER_TOKIE}")
    assert "proven anew" in line
    assert with_proven_tokenizer(proven, said.append) is proven and said == [line]
    assert Tokenizer.of(other).library == Tokenizer.of(proven).library == fast_name()


def test_another_version_that_is_not_exact_is_not_used(bundle, tmp_path):
    said: list[str] = []
    other = made_with_other_tokie(bundle, tmp_path / "other", same_ids=False)
    proven = with_proven_tokenizer(other, said.append)
    [line] = said
    assert f"{oracle_name()} is used" in line and line.endswith("install tokie==0.1.3 to tokenize with that")
    assert with_proven_tokenizer(proven, said.append) is proven and said == [line]
    texts = probe_texts.texts()
    assert Tokenizer.of(other).library == Tokenizer.of(proven).library == oracle_name()
    assert ids_of(encode(Tokenizer.of(other), texts)) == ids_of(encode(Tokenizer.of(bundle), texts))


def test_another_version_that_fails_is_not_used(bundle, tmp_path, monkeypatch):
    def fail(file):
        raise AttributeError("'Tokenizer' has no attribute 'encode_batch_flat'")

    other = made_with_other_tokie(bundle, tmp_path / "other", same_ids=True)
    monkeypatch.setattr(module, "fast_encoder", fail)
    assert Tokenizer.of(other).library == oracle_name()


def test_the_version_that_the_bundle_was_made_with_is_not_proven_again(bundle, tmp_path, monkeypatch):
    proven = with_proven_tokenizer(made_with_other_tokie(bundle, tmp_path / "other", same_ids=True))
    monkeypatch.delattr(module, "prove_fast")
    assert with_proven_tokenizer(proven) is proven and with_proven_tokenizer(bundle) is bundle


def test_words_that_were_met_are_forgotten_in_the_end(file, monkeypatch):
    """A process of its own grows by hundreds of MB otherwise: 100 bytes a word."""
    code = f"""
import random, sys
from pathlib import Path
import jql_engine.tokenizer_libraries as libraries
libraries.RENEW_CHARACTERS = int(sys.argv[1])
encode, rng = libraries.fast_encoder(Path({str(file)!r})), random.Random(0)
def resident(): return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
begun = resident()
for _ in range(100):
    encode([" ".join(f"{{rng.getrandbits(48):x}}" for _ in range(200)) for _ in range(40)])
print((resident() - begun) >> 20)
"""
    grown = [
        int(subprocess.run([sys.executable, "-c", code, str(n)], capture_output=True, text=True, check=True).stdout)
        for n in (1 << 40, 1 << 20)
    ]
    assert grown[0] > 60 and grown[1] < grown[0] / 2, grown
