from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jql_engine.engine import Engine
from jql_engine.probe_texts import ODDITIES, SENTENCES
from jql_engine.sessions.certify import read_probes
from tests.native.binding import ROOT, JqlError, NativeEngine, Options, package_file
from tests.native.conftest import VARIANTS
from tests.native.strings import Source

TOLERANCE = 1e-5
DOCUMENTS = [
    json.loads(line)["text"]
    for file in sorted((ROOT / "examples" / "documents").glob("*.jsonl"))
    for line in file.read_text("utf-8").splitlines()
]
TEXTS = [*SENTENCES, *ODDITIES, None, "", *Source(3, SENTENCES).take(60), " ".join(SENTENCES), None]


@pytest.fixture(scope="module", params=VARIANTS)
def both(request, library, xlmr):
    """The same graph in libjql and in Python."""
    with NativeEngine(xlmr.path, library, variant=request.param) as engine:
        yield engine, Engine(xlmr, device="cpu", variant=request.param)


def test_scores_and_embeddings_are_those_of_the_engine(both):
    engine, python = both
    texts = [*TEXTS, *DOCUMENTS]
    found, expected = engine.score(texts), python.score(texts)
    assert engine.heads == python.heads
    np.testing.assert_allclose(found.values, expected.values, atol=TOLERANCE, rtol=0)
    assert found.n_tokens.tolist() == expected.n_tokens.tolist()
    assert found.truncated.tolist() == expected.truncated.tolist()
    assert not found.status.any()
    np.testing.assert_allclose(engine.embed(TEXTS).values, python.embed(TEXTS), atol=TOLERANCE, rtol=0)


def test_token_ids_are_scored_as_their_texts(both):
    engine, python = both
    tokens, _ = read_probes(python.bundle)
    expected = python.score_tokens(tokens).values
    np.testing.assert_allclose(engine.score_tokens(tokens.ids, tokens.offsets), expected, atol=TOLERANCE, rtol=0)


def test_results_are_in_the_order_of_the_texts(native):
    texts = [" ".join(SENTENCES[: 1 + i % 7]) for i in range(50)]
    together, alone = native.score(texts).values, np.concatenate([native.score([text]).values for text in texts])
    np.testing.assert_allclose(together, alone, atol=TOLERANCE, rtol=0)


def test_more_text_than_is_in_memory_at_a_time(native):
    texts = [SENTENCES[i % len(SENTENCES)] * 9 for i in range(12_000)]  # 1.1 million tokens: two chunks
    found = native.score(texts)
    assert found.n_tokens.sum() > 1 << 20
    once = native.score(texts[: len(SENTENCES)]).values
    np.testing.assert_allclose(found.values, once[np.arange(len(texts)) % len(SENTENCES)], atol=TOLERANCE, rtol=0)


def test_invalid_utf8_concerns_its_document_alone(native):
    found = native.score(["good", b"bad \xff", None, "good"])
    assert found.status.tolist() == [0, 3, 0, 0]
    assert np.isnan(found.values[1:3]).all() and np.array_equal(found.values[0], found.values[3])
    assert found.n_tokens[1:3].tolist() == [0, 0]
    with pytest.raises(JqlError, match="JQL_INVALID_TEXT: text 1 is not UTF-8 at byte 4"):
        native.score(["good", b"bad \xff"], with_status=False)


def test_no_documents(native):
    assert native.score([]).values.shape == (0, len(native.heads))
    assert native.score_tokens([], [0]).shape == (0, len(native.heads))


def test_one_engine_serves_many_threads(native):
    parts = [[*TEXTS[i::4], *SENTENCES[:i]] for i in range(4)]
    alone = [(native.score(part).values, [native.tokenize(text) for text in SENTENCES]) for part in parts]

    def work(part):
        library_engine = native.shared()
        return [
            (library_engine.score(part).values, [library_engine.tokenize(text) for text in SENTENCES]) for _ in range(5)
        ]

    with ThreadPoolExecutor(4) as pool:
        for expected, found in zip(alone, pool.map(work, parts), strict=True):
            for values, ids in found:
                np.testing.assert_allclose(values, expected[0], atol=TOLERANCE, rtol=0)
                assert ids == expected[1]


def test_no_thread_is_left_behind(library, xlmr):
    """In a process of its own, where nothing else starts or ends threads."""
    script = """
import sys
from pathlib import Path
from tests.native.binding import NativeEngine
def n_threads():
    return len(list(Path("/proc/self/task").iterdir()))
before = n_threads()
with NativeEngine(sys.argv[1], threads=2) as engine:
    engine.score(["text"] * 50)
assert n_threads() == before, (before, n_threads())
"""
    subprocess.run([sys.executable, "-c", script, str(xlmr.path)], cwd=ROOT, check=True)


def test_nothing_is_printed(library, xlmr, tmp_path):
    script = """
import sys
from tests.native.binding import JqlError, NativeEngine
with NativeEngine(sys.argv[1]) as engine:
    engine.score(["text", None, b"\\xff"])
    try:
        engine.score_tokens([-1], [0, 1])
    except JqlError:
        pass
try:
    NativeEngine(sys.argv[2])
except JqlError:
    pass
"""
    command = [sys.executable, "-c", script, str(xlmr.path), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")


def test_options_may_be_left_out_or_be_of_a_newer_header(library, xlmr):
    engine, error = ctypes.c_void_p(), ctypes.create_string_buffer(512)

    def opened(options):
        return library.jql_open(str(xlmr.path).encode(), options, ctypes.byref(engine), error, 512)

    if opened(None):  # with no options the library is looked for, and may not be found here
        assert b"install it, or name it in options.onnxruntime" in error.value
    library.jql_close(engine)
    newer = (ctypes.c_char * 256)()
    given = Options(256, None, str(package_file("onnxruntime", "capi/libonnxruntime.so.*")).encode(), None, 0, 1, 1)
    ctypes.memmove(newer, ctypes.byref(given), ctypes.sizeof(given))
    as_options = ctypes.cast(newer, ctypes.POINTER(Options))
    assert opened(as_options) == 0, error.value
    library.jql_close(engine)
    newer[200] = 1
    assert library.jql_status_name(opened(as_options)) == b"JQL_INVALID_ARGUMENT"
    assert b"options has fields" in error.value
