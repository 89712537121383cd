from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file, save_file

from jql_engine.batching import plan_batches
from jql_engine.data import Batch, BatchOutput, Budget
from jql_engine.errors import BundleError, DeviceError
from jql_engine.sessions.base import Fallback
from jql_engine.sessions.cuda import capacity as buffered
from jql_engine.sessions.cuda import layouts
from jql_engine.sessions.cuda import provider as onnxruntime_cuda
from jql_engine.sessions.cuda import session as cuda
from jql_engine.sessions.cuda.capacity import BufferedSession, Capacity, OutOfMemoryError, halves, token_budget
from jql_engine.sessions.cuda.layouts import pack
from jql_engine.sessions.fallback import select
from jql_engine.tokenizer import Tokenizer
from jql_export import probes
from jql_export.families.read import read_encoder
from jql_export.readouts.head_file import read_head
from jql_export.reference import Reference
from tests.conftest import HAS_GPU
from tests.export.test_cuda_packed import TOLERANCES
from tests.graphs import CUDA, write_bundle
from tests.operators import OPERATORS

OVERFLOW = 100  # times these weights the MLP's product ends on both sides of 65,504, by document
LARGE = Capacity.of(10_000, 10_000)
batches = st.lists(st.integers(1, 40), min_size=1, max_size=12).map(lambda lengths: batch_of(lengths))
on_gpu = pytest.mark.skipif(
    not HAS_GPU or onnxruntime_cuda.PROVIDER not in ort.get_available_providers(),
    reason="no GPU, or none for ONNX Runtime",
)


def batch_of(lengths):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return Batch(np.arange(len(lengths)) * 3, np.arange(offsets[-1], dtype=np.int32) + 5, offsets, None)


def lengths_of(batch):
    return np.diff(batch.offsets).tolist()


@given(batches)
def test_inputs_are_laid_out_as_the_graph_documents_them(batch):
    buffer = np.full(LARGE.input_bytes, 255, np.uint8)
    inputs, lengths = pack(batch, buffer), lengths_of(batch)
    rectangle, longest = np.arange(len(lengths) * max(lengths)), max(lengths)
    tokens = [i * longest + k for i, length in enumerate(lengths) for k in range(length)]
    expected = {
        "input_ids": batch.ids,
        "position_ids": [[k for length in lengths for k in range(length)]],
        "cu_seqlens": batch.offsets,
        "token_offset": np.reshape([*tokens, *np.setdiff1d(rectangle, tokens)], (len(lengths), longest)),
        "cls_index": batch.offsets[:-1],
    }
    assert list(inputs) == list(expected)
    for (name, array), field in zip(inputs.items(), layouts.fields_of(batch), strict=True):
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
        assert (array.dtype, array.shape) == (field.dtype, field.shape), name
        assert (array.ctypes.data - buffer.ctypes.data) % layouts.ALIGNMENT == 0, name


@given(batches, st.integers(1, 100), st.integers(1, 100))
def test_a_buffer_holds_every_batch_that_its_capacity_does(batch, budget, max_tokens):
    capacity = Capacity.of(budget, max_tokens)
    if capacity.holds(batch):
        assert layouts.used_bytes(layouts.fields_of(batch)) <= capacity.input_bytes


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_the_longest_document_always_has_room(budget, max_tokens):
    assert Capacity.of(budget, max_tokens).holds(batch_of([max_tokens]))


@given(batches.filter(lambda batch: len(batch.rows) > 1))
def test_halves_hold_every_document_once_and_about_as_many_tokens(batch):
    parts = halves(batch)
    assert [n for part in parts for n in lengths_of(part)] == lengths_of(batch)
    np.testing.assert_array_equal(np.concatenate([part.ids for part in parts]), batch.ids)
    np.testing.assert_array_equal(np.concatenate([part.rows for part in parts]), batch.rows)
    assert all(len(part.rows) for part in parts)
    assert max(part.n_tokens for part in parts) <= batch.n_tokens / 2 + max(lengths_of(batch))


def test_some_documents_of_a_batch():
    part = select(batch_of([2, 3, 1, 4]), np.array([False, True, False, True]))
    assert lengths_of(part) == [3, 4] and part.rows.tolist() == [3, 9]
    assert part.ids.tolist() == [7, 8, 9, 11, 12, 13, 14]


def test_the_budget_follows_from_memory_up_to_its_cap():
    small, half, large = (token_budget(gib << 30, 768, itemsize) for gib, itemsize in ((1, 2), (1, 4), (80, 2)))
    assert 10_000 < small < buffered.MAX_BATCH_TOKENS and abs(small - 2 * half) <= 1
    assert large == buffered.MAX_BATCH_TOKENS
    assert token_budget(0, 768, 2) == 1


class ReferenceExecutor:
    """An exported graph in NumPy; out of memory from `room` tokens on."""

    def __init__(self, file, capacity=LARGE, room=10_000):
        self.capacity, self.room = capacity, room
        self.computed, self.refused = [], []  # documents' lengths
        self._graph = ReferenceEvaluator(str(file), new_ops=OPERATORS)
        self._lock = threading.Lock()

    def run(self, batch):
        assert self.capacity.holds(batch)
        if batch.n_tokens > self.room:
            self.refused.append(lengths_of(batch))
            raise OutOfMemoryError("Failed to allocate memory for requested buffer of size 12345")
        self.computed.append(lengths_of(batch))
        inputs = pack(batch, np.empty(self.capacity.input_bytes, np.uint8))
        with self._lock:
            return BatchOutput(*self._graph.run(["scores", "embedding"], inputs))


@pytest.fixture(scope="module")
def heads(head_files):
    return [read_head(name, file) for name, file in head_files.items()]


@pytest.fixture(scope="module")
def gte(encoders, bundle, heads, tmp_path_factory):
    """Packed graphs of the GTE encoder, probe documents, and what the oracle expects of them."""
    written = write_bundle(
        tmp_path_factory.mktemp("packed") / "gte", read_encoder(encoders["gte"]), heads, "cls", bundle.manifest
    )
    tokens = probes.token_batch(Tokenizer(bundle.path / "tokenizer.json", bundle.manifest.tokenizer, 64))
    return written, tokens, Reference(encoders["gte"], heads, "cls").run(tokens)


@pytest.fixture(scope="module")
def overflowing(encoders, bundle, heads, tmp_path_factory):
    """The same of an encoder whose MLP leaves fp16 in some documents."""
    root = tmp_path_factory.mktemp("overflowing")
    checkpoint = shutil.copytree(encoders["gte"], root / "encoder")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["encoder.layer.0.mlp.up_gate_proj.weight"] *= OVERFLOW
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    written = write_bundle(root / "bundle", read_encoder(checkpoint), heads, "cls", bundle.manifest)
    tokens = probes.token_batch(Tokenizer(bundle.path / "tokenizer.json", bundle.manifest.tokenizer, 64))
    return written, tokens, Reference(checkpoint, heads, "cls").run(tokens)


def compute(session, tokens, budget=300, threads=1):
    """Scores of every document, batches planned under `budget` tokens."""
    planned = list(plan_batches(tokens, Budget(budget, session.budget.layout)))
    scores = np.full((len(tokens.rows), 2), np.nan, np.float32)
    with ThreadPoolExecutor(threads) as pool:
        for batch, output in zip(planned, pool.map(session.run, planned), strict=True):
            scores[batch.rows] = output.scores
    return scores


def assert_scores(found, expected, precision="fp32"):
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCES[precision][1] * np.abs(expected).max())


def test_several_threads_get_the_oracles_scores(gte):
    bundle, tokens, expected = gte
    session = BufferedSession("cuda-fp32", ReferenceExecutor(bundle.graph("cuda-fp32")), 300)
    assert_scores(compute(session, tokens, threads=4), expected.scores)
    assert session.budget == Budget(300, "packed")


def test_out_of_memory_halves_the_budget_and_computes_the_same_batch_in_parts(gte):
    bundle, tokens, expected = gte
    executor = ReferenceExecutor(bundle.graph("cuda-fp32"), room=200)
    session = BufferedSession("cuda-fp32", executor, 600)
    assert_scores(compute(session, tokens, budget=600), expected.scores)
    assert max(map(sum, executor.computed)) <= 200
    # 600 tokens, and a half that has more than 200; batches that were planned before are divided without another try.
    assert len(executor.refused) == 2
    assert sum(executor.refused[0]) == next(plan_batches(tokens, Budget(600, "packed"))).n_tokens
    assert 100 <= session.budget.tokens <= 200


def test_down_to_one_document(gte):
    bundle, tokens, expected = gte
    executor = ReferenceExecutor(bundle.graph("cuda-fp32"), room=64)
    assert_scores(compute(BufferedSession("cuda-fp32", executor, 600), tokens, budget=600), expected.scores)
    assert [64] in executor.computed


def test_a_document_that_does_not_fit_alone_is_named(gte):
    bundle, tokens, _ = gte
    session = BufferedSession("cuda-fp32", ReferenceExecutor(bundle.graph("cuda-fp32"), room=50), 600)
    with pytest.raises(DeviceError, match=r"cuda-fp32: a document of \d+ tokens does not fit .*requested buffer.*free"):
        compute(session, tokens, budget=600)


def test_a_batch_that_buffers_do_not_hold_is_divided(gte):
    bundle, tokens, expected = gte
    capacity = Capacity("packed", 600, documents=4, rectangle=100)
    executor = ReferenceExecutor(bundle.graph("cuda-fp32"), capacity)
    session = BufferedSession("cuda-fp32", executor, 600)
    assert_scores(compute(session, tokens, budget=600), expected.scores)
    assert max(map(len, executor.computed)) <= 4 and session.budget.tokens == 600


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy says that it overflows
def test_documents_that_overflow_are_computed_again_in_fp32_and_counted(overflowing):
    bundle, tokens, expected = overflowing
    broken = np.zeros(len(tokens.rows), np.bool_)
    for batch in plan_batches(tokens, Budget(300, "packed")):
        output = ReferenceExecutor(bundle.graph("cuda-fp16")).run(batch)
        broken[batch.rows] = ~np.isfinite(output.embeddings).all(1)
    assert 0 < broken.sum() < len(broken)
    opened = []

    def open_fp32():
        opened.append(ReferenceExecutor(bundle.graph("cuda-fp32")))
        return BufferedSession("cuda-fp32", opened[-1], 300)

    session = BufferedSession(
        "cuda-fp16", ReferenceExecutor(bundle.graph("cuda-fp16")), 300, Fallback("cuda-fp32", open_fp32)
    )
    found = compute(session, tokens, threads=4)
    assert_scores(found[broken], expected.scores[broken])
    assert_scores(found[~broken], expected.scores[~broken], "fp16")
    assert session.n_overflowed == broken.sum() and len(opened) == 1
    assert sum(map(len, opened[0].computed)) == broken.sum(), "no other document"


def test_the_fp32_session_is_opened_for_an_overflow_only(gte):
    bundle, tokens, expected = gte
    session = BufferedSession(
        "cuda-fp16", ReferenceExecutor(bundle.graph("cuda-fp16")), 300, Fallback("cuda-fp32", pytest.fail)
    )
    assert_scores(compute(session, tokens), expected.scores, "fp16")
    assert session.n_overflowed == 0


def test_an_overflow_that_scores_hide_is_seen_in_the_embedding():
    class Hiding:
        capacity = LARGE

        def run(self, batch):
            n_docs = len(batch.rows)
            return BatchOutput(np.zeros((n_docs, 1), np.float32), np.full((n_docs, 2), np.nan, np.float32))

    class Sound(Hiding):
        def run(self, batch):
            return BatchOutput(*(np.ones((len(batch.rows), n), np.float32) for n in (1, 2)))

    fallback = Fallback("cuda-fp32", lambda: BufferedSession("cuda-fp32", Sound(), 300))
    session = BufferedSession("cuda-fp16", Hiding(), 300, fallback)
    output = session.run(batch_of([2, 3]))
    assert output.scores.tolist() == [[1], [1]] and output.embeddings.tolist() == [[1, 1], [1, 1]]
    assert session.n_overflowed == 2


def test_fp16_needs_a_graph_in_fp32_beside_it(gte):
    bundle, _, _ = gte
    assert cuda.fp32_twin(bundle, "cuda-fp16") == "cuda-fp32" and cuda.fp32_twin(bundle, "cuda-fp32") is None
    variants = {"cuda-fp16": bundle.manifest.variants["cuda-fp16"]}
    alone = replace(bundle, manifest=replace(bundle.manifest, variants=variants))
    with pytest.raises(BundleError, match=r"no packed fp32 graph .* export again with .*--variant cuda-fp32"):
        cuda.fp32_twin(alone, "cuda-fp16")


def test_an_onnx_runtime_without_cuda_is_refused():
    with pytest.raises(DeviceError, match=r"cuda:1: .* is built for CPUExecutionProvider, expected CUDA.*\[gpu\]"):
        onnxruntime_cuda.check_built(["CPUExecutionProvider"], 1)
    onnxruntime_cuda.check_built([onnxruntime_cuda.PROVIDER, "CPUExecutionProvider"], 1)


def test_a_release_whose_norms_are_wrong_is_refused(monkeypatch):
    monkeypatch.setattr(ort, "__version__", "1.30.2")
    with pytest.raises(DeviceError, match=r"cuda:0: ONNX Runtime 1\.30\.2 is too old: .* expected 1\.31 or newer"):
        onnxruntime_cuda.check_built([onnxruntime_cuda.PROVIDER], 0)


def test_a_session_that_went_to_the_cpu_is_refused():
    with pytest.raises(DeviceError, match="cuda:0: ONNX Runtime activated CPUExecutionProvider, expected CUDA"):
        onnxruntime_cuda.check_active(["CPUExecutionProvider"], 0)
    onnxruntime_cuda.check_active([onnxruntime_cuda.PROVIDER, "CPUExecutionProvider"], 0)


@pytest.mark.parametrize(
    ("message", "shortage"),
    [
        ("BFCArena::AllocateRawInternal Available memory of 5 is smaller than requested bytes of 9", True),
        ("Failed to allocate memory for requested buffer of size 4294967296", True),
        ("CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc((void**)&p, size);", True),
        ("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0 ; expr=cublasCreate(&handle);", True),
        ("CUBLAS failure 1: CUBLAS_STATUS_NOT_INITIALIZED ; GPU=0 ; expr=cublasCreate(&handle);", True),
        ("CUDA failure 700: an illegal memory access was encountered ; GPU=0", False),
        ("Invalid memory pattern", False),
    ],
)
def test_what_counts_as_out_of_memory(message, shortage):
    assert onnxruntime_cuda.is_shortage(message) == shortage


@pytest.mark.skipif(
    onnxruntime_cuda.PROVIDER in ort.get_available_providers(), reason="ONNX Runtime has a CUDA provider here"
)
def test_no_session_is_opened_on_another_device(gte):
    with pytest.raises(DeviceError, match=r"device cuda:0: ONNX Runtime .* expected CUDAExecutionProvider"):
        cuda.open_cuda(gte[0], "cuda-fp16")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("variant", CUDA)
def test_the_gpu_gives_the_oracles_scores(gte, variant):
    bundle, tokens, expected = gte
    session = cuda.open_cuda(bundle, variant)
    for budget, threads in ((600, 1), (100, 4), (1, 2)):
        assert_scores(compute(session, tokens, budget, threads), expected.scores, variant.removeprefix("cuda-"))


@pytest.mark.gpu
@on_gpu
def test_the_gpu_computes_documents_that_overflow_again_in_fp32(overflowing):
    bundle, tokens, expected = overflowing
    session = cuda.open_cuda(bundle, "cuda-fp16")
    assert_scores(compute(session, tokens, threads=2), expected.scores, "fp16")
    assert session.n_overflowed > 0
