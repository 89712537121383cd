from __future__ import annotations

import base64
import json
import resource
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from jql_engine.bundle import MANIFEST
from jql_engine.probe_texts import ODDITIES, SENTENCES
from tests.native.binding import JqlError, NativeEngine
from tests.native.conftest import copy_of, replace_file
from tests.native.differences import differences, expected_ids, read_oracle
from tests.native.strings import TIES, Source, code_points
from tests.test_truncation import ODD, TEXTS, write, write_unigram_of

LAYOUTS = ("trained", "xlm-roberta", "without split", "bare", "odd rules", "odd rules without split")
SEED, N_STRINGS = 20, 10_000
STEP = 61  # of code points that are tried here; tests/native/differences.py tries them all


@pytest.fixture(scope="module")
def oracle(xlmr):
    return read_oracle(xlmr.path / "tokenizer.json")


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request, library, xlmr, tmp_path_factory):
    """An engine with a tokenizer in another layout, and its oracle."""
    folder = tmp_path_factory.mktemp("layout")
    yield from opened_with(write(folder, request.param), library, xlmr, folder)


def opened_with(file, library, xlmr, folder):
    bundle = copy_of(xlmr, folder / "bundle")
    replace_file(bundle, "tokenizer.json", file.read_bytes())
    with NativeEngine(bundle, library, certify=0) as engine:
        yield engine, read_oracle(file)


@pytest.mark.parametrize("texts", [SENTENCES, ODDITIES, ODD, TIES], ids=["sentences", "oddities", "odd", "ties"])
def test_ids_are_those_of_the_oracle(native, oracle, texts):
    assert differences(native, oracle, texts) == []


def test_random_and_mutated_strings(native, oracle):
    assert differences(native, oracle, Source(SEED, SENTENCES).take(N_STRINGS)) == []


def test_code_points_alone_between_letters_and_beside_what_joins_them(native, oracle):
    assert differences(native, oracle, list(code_points(STEP, first=SEED))) == []


def test_marks_newer_than_unicode_16_join_what_is_mapped(native, oracle):
    marks = [chr(c) for c in (0x897, *range(0x1ACF, 0x1ADE), *range(0x1AE0, 0x1AEC))]
    texts = [f"{c}{mark}" for c in "\u00a0ªº™ﬁ①" for mark in marks]
    assert differences(native, oracle, texts) == []


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_other_layouts(layout, text):
    engine, oracle = layout
    assert differences(engine, oracle, [text, text.replace(" ", "  ")]) == []


def test_other_layouts_on_odd_strings(layout):
    engine, oracle = layout
    assert differences(engine, oracle, [*SENTENCES, *ODDITIES, *ODD, *Source(SEED, SENTENCES).take(2000)]) == []


def test_long_texts_are_normalized_in_parts(layout):
    engine, oracle = layout
    source = Source(SEED, SENTENCES)
    texts = [glue.join(source.take(3000)) for glue in (" ", "  ", "\n", "", " \u0301", "x ")]
    limit = 1 << 30
    expected = expected_ids(oracle, texts, [0], [2], limit)
    assert [whole(engine, text) for text in texts] == [ids[: engine.max_tokens - 1] for ids in expected]


@pytest.mark.parametrize("content", ["", "a", " ", "\u2581"])
def test_spaces_that_become_something_else_far_into_a_text(library, xlmr, tmp_path, content):
    spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": content}
    bundle = copy_of(xlmr, tmp_path / "bundle")
    replace_file(bundle, "tokenizer.json", change(bundle / "tokenizer.json", "normalizer", spaces))
    replace_file(bundle, MANIFEST, change(bundle / MANIFEST, "max_tokens", 60_000))
    oracle = read_oracle(bundle / "tokenizer.json")
    with NativeEngine(bundle, library, certify=0) as engine:
        for n in (100, 17_000):
            text = "x" * n + "  Water boils"
            assert engine.tokenize(text)[0] == [0, *oracle.encode(text, add_special_tokens=False).ids, 2]


def test_white_space_that_one_added_token_has_taken_is_no_other(library, xlmr, tmp_path):
    fields = json.loads((xlmr.path / "tokenizer.json").read_text())
    line = ADDED | {"id": len(fields["model"]["vocab"]), "content": "\n", "normalized": False}
    fields["added_tokens"].append(line | {"lstrip": True, "rstrip": True})
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    for engine, oracle in opened_with(tmp_path / "tokenizer.json", library, xlmr, tmp_path):
        assert differences(engine, oracle, ["a\n\nb", "a \n b", "\n", "\n \n\n", "a\nb"]) == []
    fields["added_tokens"][-1] = line
    fields["added_tokens"].append(line | {"id": line["id"] + 1, "content": "<a>", "rstrip": True})
    fields |= {"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581"}}
    (tmp_path / "other.json").write_text(json.dumps(fields))
    for engine, oracle in opened_with(tmp_path / "other.json", library, xlmr, tmp_path / "other"):
        assert differences(engine, oracle, ["<a>\n ", "x<a> \n\n y", "<a>\n \nb", "\n<a> \n"]) == []


def whole(engine, text):
    """The ids of a truncated document but for its last, as no test bundle has room for more."""
    ids, truncated = engine.tokenize(text)
    assert truncated
    return ids[:-1]


def test_unknown_characters_in_a_row_are_one_id_or_bytes(library, xlmr, tmp_path):
    pieces = {"▁": -3.0, "a": -2.0, "ab": -4.5}
    pieces |= {f"<0x{byte:02X}>": -9.0 for byte in range(256)}
    for fallback in (False, True):
        folder = tmp_path / str(fallback)
        folder.mkdir()
        file = write_unigram_of(pieces, folder, None, byte_fallback=fallback)
        for engine, oracle in opened_with(file, library, xlmr, folder):
            assert differences(engine, oracle, ["aξξb", "ξ", "ξξ ξ", "abξ", "a▁ξ", "<0x41>ξ", "🎉a🎉"]) == []


def test_a_piece_that_stands_twice_has_its_last_id(library, xlmr, tmp_path):
    file = write_unigram_of({"▁": -3.0, "a": -2.0, "b": -2.0, "ab": -5.0}, tmp_path, None)
    fields = json.loads(file.read_text())
    fields["model"]["vocab"] += [["ab", -3.0], ["▁a", -4.0]]
    file.write_text(json.dumps(fields))
    for engine, oracle in opened_with(file, library, xlmr, tmp_path):
        assert differences(engine, oracle, ["ab", "a", "abab aab"]) == []


def test_scores_are_rounded_as_serde_json_does(library, xlmr, tmp_path):
    """Of each pair the two characters and the piece of both score the same but for rounding, which decides."""
    random = Random(SEED)
    letters = [chr(c) for c in range(0x4E00, 0x4E00 + 2000)]
    pieces = {"▁": -3.0}
    for x, y in zip(letters[::2], letters[1::2], strict=True):
        pieces[x], pieces[y] = random.uniform(-20, -1), random.uniform(-20, -1)
        pieces[x + y] = pieces[x] + pieces[y]
    file = write_unigram_of(pieces, tmp_path, None)
    for engine, oracle in opened_with(file, library, xlmr, tmp_path):
        assert differences(engine, oracle, [x + y for x, y in zip(letters[::2], letters[1::2], strict=True)]) == []


@pytest.mark.parametrize(
    "number",
    ["-123456789012345678901234.5", "-1.2345678901234567890123456789", "-1e-3", "-12E+1", "-7", "-0.000", "-2e-320",
     "-18446744073709551616.25", "-0.000000000000000000000000012345678901234567"],
)  # fmt: skip
def test_numbers_in_all_notations(library, xlmr, tmp_path, number):
    file = write_unigram_of({"▁": -3.0, "a": -9.5, "b": -9.25, "ab": -98765.25, "aa": -99.5}, tmp_path, None)
    file.write_text(file.read_text().replace("-9.5", number))
    for engine, oracle in opened_with(file, library, xlmr, tmp_path):
        assert differences(engine, oracle, ["ab", "abab", "aabb", "ba", "aaa"]) == []


def test_truncation_is_reported_at_its_edge(native, oracle):
    text = "a " * 500
    room = native.max_tokens - 2
    n_words = next(n for n in range(500) if len(oracle.encode(text[: 2 * n], add_special_tokens=False).ids) >= room)
    assert [native.tokenize(text[: 2 * n])[1] for n in (n_words - 1, n_words, n_words + 1)] == [False, False, True]


def test_nul_is_text(native, oracle):
    assert differences(native, oracle, ["\x00", "a\x00b", "\x00\x00 a", "a\x00"]) == []


def test_too_little_room_says_how_much_is_needed(native):
    ids, _ = native.tokenize("two words")
    with pytest.raises(JqlError, match=f"JQL_BUFFER_TOO_SMALL: the text has {len(ids)} ids, there is room for 1"):
        native.tokenize("two words", capacity=1)


@pytest.mark.parametrize(
    "text", [b"\xff", b"ok \xc3", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80", b"\xe2\x28\xa1"]
)
def test_what_is_not_utf8_is_an_error(native, text):
    with pytest.raises(JqlError, match="JQL_INVALID_TEXT: the text is not UTF-8 at byte"):
        native.tokenize(text)


def test_a_document_of_50_mb(native, oracle):
    sentence = " ".join(SENTENCES)
    document = sentence * (50_000_000 // len(sentence.encode()))
    assert native.tokenize(document)[0] == native.tokenize(sentence * 20)[0]


def test_a_word_of_5_mb(native, oracle):
    word = "аб" * 1_250_000
    assert native.tokenize(word)[0] == native.tokenize(word[:100_000])[0]


def test_a_long_word_that_pieces_cross_everywhere(library, xlmr, tmp_path):
    """No place to cut before its end: how its first pieces are cut depends on its last letter."""
    pieces = {"▁": -3.0, "a": -2.5, "b": -2.0, "ab": -3.5, "ba": -3.75, "bab": -4.5}
    pieces |= {"a" * n: -2.0 - n / 7 for n in (2, 3, 5, 8, 13)} | {"-" * n: -1.0 - n / 8 for n in range(1, 17)}
    file = write_unigram_of(pieces, tmp_path, None)
    random = Random(SEED)
    words = ["-" * 60_000, "a" * 60_000, *("".join(random.choices(letters, k=60_000)) for letters in ("ab", "a-"))]
    bundle = copy_of(xlmr, tmp_path / "bundle")
    replace_file(bundle, "tokenizer.json", file.read_bytes())
    manifest = json.loads((bundle / MANIFEST).read_text()) | {"max_tokens": 70_000}
    replace_file(bundle, MANIFEST, json.dumps(manifest).encode())
    with NativeEngine(bundle, library, certify=0) as engine:
        assert differences(engine, read_oracle(file), words) == []
        before = resident()
        engine.tokenize("-" * 20_000_000)
        assert resident() - before < 40 * 20_000_000


def resident() -> int:
    """The most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def replacements(*contents: str) -> dict:
    """A normalizer that puts each of them in the place of an `a`."""
    steps = [{"type": "Replace", "pattern": {"String": "a"}, "content": content} for content in contents]
    return {"type": "Sequence", "normalizers": steps}


ADDED = {"id": 1, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


def change(file: Path, where: str, value: object) -> bytes:
    fields = json.loads(file.read_text())
    *path, last = where.split(".")
    part = fields
    for name in path:
        part = part[int(name) if name.isdigit() else name]
    part[int(last) if last.isdigit() else last] = value
    return json.dumps(fields).encode()


@pytest.mark.parametrize(
    ("where", "value", "sentence"),
    [
        ("model.type", "BPE", "has the model BPE, libjql knows Unigram"),
        ("model.type", None, "has the model of no type, libjql knows Unigram"),
        ("normalizer", replacements("a", "a" * 65), "replaces a text by one over 64 times as long"),
        ("normalizer", replacements(*("aaaaaaaaaa" for _ in range(3))), "replaces a text by one over 64 times as long"),
        ("added_tokens.1.content", "a" * 1025, "a piece or an added token of over 1,024 bytes"),
        ("model.vocab.9", ["a" * 1025, -1.0], "a piece or an added token of over 1,024 bytes"),
        ("model.unk_id", None, "has no unk_id"),
        ("normalizer", {"type": "NFKC"}, "has the normalizer NFKC, which libjql does not know"),
        ("pre_tokenizer", {"type": "Whitespace"}, "has the pre_tokenizer Whitespace"),
        ("pre_tokenizer", None, "has no pre_tokenizer Metaspace"),
        ("added_tokens.1.single_word", True, "added token of single words"),
        ("added_tokens", [ADDED | {"content": c} for c in ("fig", "ﬁg")], "is normalized to the text of another one"),
    ],
)
def test_another_kind_of_tokenizer_leaves_ids(library, xlmr, tmp_path, where, value, sentence):
    bundle = copy_of(xlmr, tmp_path / "bundle")
    replace_file(bundle, "tokenizer.json", change(bundle / "tokenizer.json", where, value))
    with NativeEngine(bundle, library) as engine:
        with pytest.raises(JqlError, match=f"JQL_UNSUPPORTED: .*{sentence}"):
            engine.tokenize("text")
        with pytest.raises(JqlError, match="JQL_UNSUPPORTED"):
            engine.score(["text"])
        assert np.isfinite(engine.score_tokens([0, 5, 2], [0, 3])).all()


def test_an_added_token_of_which_the_normalizer_leaves_nothing_is_refused(library, xlmr, tmp_path):
    bundle = copy_of(xlmr, tmp_path / "bundle")
    strip = {"type": "Strip", "strip_left": True, "strip_right": True}
    replace_file(bundle, "tokenizer.json", change(bundle / "tokenizer.json", "normalizer", strip))
    tokens = change(bundle / "tokenizer.json", "added_tokens", [ADDED | {"content": "  "}])
    replace_file(bundle, "tokenizer.json", tokens)
    with NativeEngine(bundle, library) as engine, pytest.raises(JqlError, match="which is normalized to nothing"):
        engine.tokenize("text")


def test_a_character_that_becomes_a_long_text_is_refused(library, xlmr, tmp_path):
    """Each character of a text could become megabytes, and opening would look each of them up a million times."""
    bundle = copy_of(xlmr, tmp_path / "bundle")
    fields = json.loads((bundle / "tokenizer.json").read_text())
    steps = fields["normalizer"].get("normalizers", [fields["normalizer"]])
    (step,) = [one for one in steps if one["type"] == "Precompiled"]
    charsmap = base64.b64decode(step["precompiled_charsmap"]) + b"a" * 1025 + b"\0"
    step["precompiled_charsmap"] = base64.b64encode(charsmap).decode()
    replace_file(bundle, "tokenizer.json", json.dumps(fields).encode())
    with (
        NativeEngine(bundle, library) as engine,
        pytest.raises(JqlError, match=r"JQL_UNSUPPORTED: .*precompiled_charsmap has a value of over 1,024 bytes"),
    ):
        engine.tokenize("text")


def test_a_vocabulary_with_a_gap_has_ids_up_to_its_largest(library, xlmr, tmp_path):
    bundle = copy_of(xlmr, tmp_path / "bundle")
    model = {"type": "WordPiece", "vocab": {"[UNK]": 0, "a": 2, "##a": 9}}
    replace_file(bundle, "tokenizer.json", json.dumps({"model": model, "added_tokens": []}).encode())
    with NativeEngine(bundle, library) as engine:
        assert np.isfinite(engine.score_tokens([0, 9, 2], [0, 3])).all()
        with pytest.raises(JqlError, match="has the id 10, expected 0 to 9"):
            engine.score_tokens([0, 10, 2], [0, 3])
        with pytest.raises(JqlError, match=r"JQL_UNSUPPORTED: .*the model WordPiece"):
            engine.tokenize("a")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"{}", b'{"model": {"type": "Unigram", "vocab": []}}', b'{"model": 1}', b"\xff",
        b"[" * 100_000, b'{"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a"]]}}', b'{"a": "\\ud800"}',
        b'{"a": 01}', b'{"a": "\x01"}',
        b'{"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 1]]}, '
        b'"normalizer": {"type": "Replace", "pattern": {}, "content": " "}}',
        b'{"model": {"type": "Unigram", "unk_id": 9, "vocab": [["a", 1]]}}', b'{"a": 1} 2',
    ],
    ids=range(15),
)  # fmt: skip
def test_a_damaged_tokenizer_is_an_error(library, xlmr, tmp_path, content):
    bundle = copy_of(xlmr, tmp_path / "bundle")
    replace_file(bundle, "tokenizer.json", content)
    with pytest.raises(JqlError, match=r"JQL_INVALID_BUNDLE: .*tokenizer\.json"):
        NativeEngine(bundle, library)
