from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jql_engine.batching import plan_batches
from jql_engine.data import Batch, BatchOutput, Budget
from jql_engine.errors import DeviceError
from jql_engine.sessions.base import DEFAULTS, Fallback
from jql_engine.sessions.fallback import Overflow
from jql_engine.sessions.open import _tensorrt_fallback, open_variant
from jql_engine.tokenizer import Tokenizer
from jql_export import probes


@pytest.fixture(scope="module")
def documents(bundle):
    """A packed batch, and what the CPU gives for each of its documents."""
    tokens = probes.token_batch(Tokenizer(bundle.path / "tokenizer.json", bundle.manifest.tokenizer, 64))
    (batch,) = plan_batches(tokens, Budget(100_000, "packed"))
    session, scores = open_variant(bundle, "cpu-fp32"), np.empty((len(batch.rows), 2), np.float32)
    embeddings = np.empty((len(batch.rows), 32), np.float32)
    for part in plan_batches(tokens, session.budget):
        output = session.run(part)
        scores[part.rows], embeddings[part.rows] = output.scores, output.embeddings
    return batch, BatchOutput(scores[batch.rows], embeddings[batch.rows])


def fallback(bundle):
    return _tensorrt_fallback(bundle, 0, DEFAULTS, lambda _: None)


def broken(output, documents, value=np.nan, part="embeddings"):
    copy = {"scores": output.scores.copy(), "embeddings": output.embeddings.copy()}
    copy[part][documents, 0] = value
    return BatchOutput(**copy)


@pytest.mark.parametrize("part", ["scores", "embeddings"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_computed_again_on_the_cpu(bundle, documents, value, part):
    batch, expected = documents
    overflow = Overflow("tensorrt-fp16", fallback(bundle))
    found = overflow.mend(batch, broken(expected, [0, 3, len(batch.rows) - 1], value, part))
    np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.embeddings, expected.embeddings, rtol=0, atol=1e-6)
    assert overflow.n_documents == 3


def test_what_will_mend_an_overflow_is_said(bundle):
    said = []
    found = _tensorrt_fallback(bundle, 0, DEFAULTS, said.append)
    assert found.variant == found.open().variant == "cpu-fp32"
    assert said == ["documents that overflow fp16 will be recomputed in fp32 by cpu-fp32 on the CPU"]


def test_a_padded_batch_is_mended_alike(bundle, documents):
    packed, expected = documents
    batch = Batch(packed.rows, packed.ids, packed.offsets, int(np.diff(packed.offsets).max()))
    found = Overflow("tensorrt-fp16", fallback(bundle)).mend(batch, broken(expected, [1, 2]))
    np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=1e-5)


def test_the_session_is_opened_once_and_only_for_an_overflow(bundle, documents):
    batch, expected = documents
    assert Overflow("cuda-fp16", Fallback("cpu-fp32", pytest.fail)).mend(batch, expected) is expected
    opened = []

    def open_fp32():
        opened.append(open_variant(bundle, "cpu-fp32"))
        return opened[-1]

    overflow = Overflow("cuda-fp16", Fallback("cpu-fp32", open_fp32))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: overflow.mend(batch, broken(expected, [i])), range(8)))
    assert len(opened) == 1 and overflow.n_documents == 8


def test_where_nothing_is_more_exact_it_is_an_error(documents):
    batch, expected = documents
    with pytest.raises(DeviceError, match=r"tensorrt-fp16: 2 of the \d+ documents .* not finite.* export one in fp32"):
        Overflow("tensorrt-fp16", None).mend(batch, broken(expected, [4, 5]))


def test_what_fp32_gives_must_be_finite(documents):
    batch, expected = documents

    class Broken:
        budget, n_parallel = Budget(100_000, "packed"), 1

        def run(self, part):
            return broken(BatchOutput(np.zeros((len(part.rows), 2)), np.zeros((len(part.rows), 32))), [0])

    with pytest.raises(DeviceError, match=r"2 of the \d+ documents .* in fp32 as well; check the weights"):
        Overflow("cuda-fp16", Fallback("cuda-fp32", Broken)).mend(batch, broken(expected, [4, 5]))
