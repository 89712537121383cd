from __future__ import annotations

import logging

import numpy as np
import pyarrow as pa
import pytest

from jql_engine import Engine, EngineError, probe_texts
from jql_engine.errors import DeviceError
from jql_engine.tokenizer_libraries import fast_name, oracle_name
from jql_export.readouts.head_file import read_head
from jql_export.reference import Reference
from jql_export.tolerances import TOLERANCES
from tests.conftest import FAMILIES, POOLING, without_gpu
from tests.files.test_inputs import not_utf8
from tests.inputs import OTHER_TOKIE, made_with_other_tokie

TEXTS = [*probe_texts.SENTENCES, *probe_texts.ODDITIES]
FP32 = TOLERANCES["fp32"]


@pytest.mark.parametrize("variant", ["cpu-fp32", "standard-fp32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_embeddings_equal_the_oracle(family, variant, bundles, encoders, head_files):
    engine = Engine(bundles[family].path, device="cpu", variant=variant)
    heads = [read_head(name, file) for name, file in head_files.items()]
    tokens = engine.tokenizer.encode(_documents(TEXTS))
    expected = Reference(encoders[family], heads, POOLING[family]).run(tokens)
    np.testing.assert_allclose(engine.score(TEXTS).values, expected.scores, rtol=0, atol=FP32.score)
    np.testing.assert_allclose(engine.embed(TEXTS), expected.embeddings, rtol=0, atol=FP32.embedding)


def test_a_score_does_not_depend_on_its_batch_or_on_the_order(engine):
    together = engine.score(TEXTS).values
    alone = np.concatenate([engine.score([text]).values for text in TEXTS])
    backwards = engine.score(TEXTS[::-1]).values[::-1]
    np.testing.assert_allclose(together, alone, rtol=0, atol=FP32.batch)
    np.testing.assert_allclose(together, backwards, rtol=0, atol=FP32.batch)


def test_an_open_bundle_is_not_opened_again(bundle, engine, monkeypatch):
    monkeypatch.delattr("jql_engine.bundle.sha256_of")
    opened = Engine(bundle, device="cpu")
    assert opened.bundle is bundle
    np.testing.assert_allclose(opened.score(TEXTS[:3]).values, engine.score(TEXTS[:3]).values, rtol=0, atol=FP32.batch)


@pytest.mark.parametrize("same_ids", [True, False])
def test_the_library_that_takes_the_place_of_a_proven_one_is_named_and_logged(bundle, tmp_path, monkeypatch, same_ids):
    said: list[str] = []  # whatever other libraries have done to logging in this process
    monkeypatch.setattr(logging.getLogger("jql_engine"), "warning", said.append)
    engine = Engine(made_with_other_tokie(bundle, tmp_path / "other", same_ids=same_ids).path, device="cpu")
    assert engine.tokenizer.library == (fast_name() if same_ids else oracle_name())
    [line] = said
    assert f"the bundle was made with {OTHER_TOKIE}" in line and engine.tokenizer.library in line


def test_null_gives_no_score_and_an_empty_string_does(engine):
    scores = engine.score(["text", None, ""])
    assert scores.valid.tolist() == [True, False, True]
    assert np.isnan(scores.values[1]).all() and not np.isnan(scores.values[[0, 2]]).any()
    assert scores.n_tokens[2] == 2
    table = scores.to_table()
    assert table.column_names == ["score_edu", "score_prose", "n_tokens", "truncated"]
    assert [column.null_count for column in table.columns] == [1, 1, 1, 1]


def test_a_long_text_is_cut_and_marked(engine):
    scores = engine.score(["short", " ".join(probe_texts.SENTENCES)])
    assert scores.truncated.tolist() == [False, True]
    assert scores.n_tokens[1] == engine.bundle.manifest.max_tokens


def test_no_texts_give_no_scores(engine):
    assert engine.score([]).values.shape == (0, 2)
    assert engine.embed([]).shape == (0, 32)


def test_arrow_arrays_are_texts(engine):
    expected = engine.score(TEXTS[:5]).values
    for array in (pa.array(TEXTS[:5]), pa.chunked_array([TEXTS[:2], TEXTS[2:5]])):
        np.testing.assert_allclose(engine.score(array).values, expected, rtol=0, atol=FP32.batch)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("one text", "list of texts"),
        (["a", 3], "item 1 is int"),
        (["\ud800"], "surrogate"),
        (pa.array([1]), "int64"),
        (not_utf8(), "string.*UTF"),
    ],
)
def test_what_is_no_text_is_named(engine, texts, message):
    with pytest.raises(EngineError, match=message):
        engine.score(texts)


@without_gpu
@pytest.mark.parametrize("variant", [None, "cpu-fp32", "cuda-fp16"])
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "cuda:0,cuda:2"])
def test_a_gpu_is_refused_at_once(bundle, device, variant):
    """Not after the advice to install something, which would not help."""
    with pytest.raises(DeviceError) as caught:
        Engine(bundle.path, device=device, variant=variant)
    assert str(caught.value).startswith(f"device {device} was requested; the NVIDIA driver ")


@pytest.mark.parametrize("device", ["tpu", "cuda:", "cudax", "cuda:0,1"])
def test_an_unknown_device_is_an_error(bundle, device):
    with pytest.raises(DeviceError, match=f"'{device}' is unknown"):
        Engine(bundle.path, device=device)


def test_an_unknown_variant_is_an_error(bundle):
    with pytest.raises(EngineError, match=r"no variant 'cpu-int8'.*cpu-fp32 \(cpu\)"):
        Engine(bundle.path, device="cpu", variant="cpu-int8")


def _documents(texts):
    from jql_engine.data import DocumentBatch
    from jql_engine.engine import as_texts

    return DocumentBatch.of(as_texts(texts))
