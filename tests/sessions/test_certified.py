"""A GPU that export did not have: what a bundle carries so that the machine that opens it can certify it."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jql_engine.bundle import MANIFEST, PROBES, Bundle
from jql_engine.data import BatchOutput
from jql_engine.errors import BundleError, DeviceError, ParityError
from jql_engine.sessions import select as choice
from jql_engine.sessions.base import run_in_order
from jql_engine.sessions.certify import SHORT_TOKENS, read_probes, tolerance_of, write_probes
from jql_engine.sessions.cpu import CpuSession
from jql_engine.sessions.cuda import session as cuda
from jql_engine.sessions.cuda.capacity import BufferedSession, Capacity, OutOfMemoryError
from jql_engine.sessions.open import open_session, open_variant
from jql_engine.sessions.select import Choice, choose, runnable
from jql_engine.sessions.tensorrt import session as tensorrt
from jql_export.tolerances import TOLERANCES
from tests.conftest import FAMILIES, export, without_gpu
from tests.sessions.test_cuda import ReferenceExecutor

FP16, FP32, TENSORRT = "cuda-fp16", "cuda-fp32", "tensorrt-fp16"


@pytest.fixture(scope="module")
def gpu_bundles(encoders, head_files, tmp_path_factory):
    root, variants = tmp_path_factory.mktemp("gpu"), ["cpu-fp32", FP16, FP32]
    return {family: export(encoders[family], head_files, root / family, variants) for family in FAMILIES}


@pytest.fixture
def evaluated(monkeypatch):
    """Packed graphs run in the reference evaluator instead of on a GPU; those that are open.

    Python collects no garbage meanwhile: memory of a GPU must not wait for it.
    """
    executors = weakref.WeakSet()

    class Executor(ReferenceExecutor):
        budget = 600

        def __init__(self, bundle, variant, device, budget=None):
            super().__init__(bundle.graph(variant), Capacity.of(600, bundle.manifest.max_tokens))
            self.variant = variant
            executors.add(self)

    monkeypatch.setattr(cuda, "CudaExecutor", Executor)
    gc.disable()
    yield executors
    gc.enable()


def opened(bundle, variant, tolerance=None):
    said = []
    session = open_session(bundle, Choice(("cuda:0",), variant, tolerance), "cuda:0", report=said.append)
    return session, said


def test_a_bundle_carries_documents_and_what_the_reference_computes_of_them(gpu_bundles):
    bundle = gpu_bundles["gte"]
    assert PROBES in bundle.manifest.files
    tokens, expected = read_probes(bundle)
    found = run_in_order(open_variant(bundle, "cpu-fp32"), tokens)
    np.testing.assert_allclose(found.embeddings, expected.embeddings, atol=TOLERANCES["fp32"].embedding)
    np.testing.assert_allclose(found.scores, expected.scores, atol=TOLERANCES["fp32"].score)
    assert len(set(tokens.lengths.tolist())) > 15 and tokens.lengths.max() == bundle.manifest.max_tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": np.zeros((5, 1), np.float32)}, r"float32 \[5, 1\] as scores, expected float32 \[\d+, 2\]"),
        ({"embedding": None}, r"nothing as embedding, expected float32 \[\d+, 32\]"),
        ({"ids": np.zeros(9, np.int64)}, r"int64 \[9\] as ids, expected int32 \[9\]"),
        ({"ids": np.zeros(9, np.int32)}, "offsets that do not span its ids"),
    ],
)
def test_probes_of_another_shape_are_named(bundle, tmp_path, change, message):
    copy = Path(shutil.copytree(bundle.path, tmp_path / "copy"))
    tensors = {**load_file(copy / PROBES), **change}
    save_file({name: value for name, value in tensors.items() if value is not None}, copy / PROBES)
    with pytest.raises(BundleError, match=f"{PROBES} has {message}"):
        read_probes(replace(bundle, path=copy))


def test_a_limit_that_is_missing_is_named_and_one_of_a_later_version_ignored(bundle):
    variant = bundle.manifest.variants["cpu-fp32"]

    def with_limits(limits: dict[str, float]) -> Bundle:
        variants = {"cpu-fp32": replace(variant, tolerance=limits)}
        return replace(bundle, manifest=replace(bundle.manifest, variants=variants))

    assert tolerance_of(with_limits(variant.tolerance | {"later": 1.0}), "cpu-fp32").score == variant.tolerance["score"]
    few = {name: limit for name, limit in variant.tolerance.items() if name != "batch"}
    with pytest.raises(BundleError, match="tolerance of cpu-fp32 lacks batch"):
        tolerance_of(with_limits(few), "cpu-fp32")


def test_nothing_is_claimed_of_a_gpu_at_export(gpu_bundles):
    variants = gpu_bundles["gte"].manifest.variants
    assert variants["cpu-fp32"].parity and not variants[FP16].parity and not variants[FP32].parity
    assert variants[FP16].layout == "packed" and variants[FP16].tolerance["score"] == TOLERANCES["fp16"].score


@pytest.mark.parametrize("family", FAMILIES)
def test_a_graph_is_certified_before_its_first_batch(gpu_bundles, family, evaluated):
    session, said = opened(gpu_bundles[family], FP16)
    assert session.variant == FP16 and session.budget.layout == "packed"
    assert said[:-1] == [f"{FP32}, for documents that overflow fp16, is certified"]
    assert said[-1].startswith(f"{FP16} on cuda:0 is certified: within ")


def test_only_on_a_gpu_a_score_alone_may_differ_by_as_much_as_from_the_reference(gpu_bundles):
    limits = {name: variant.tolerance for name, variant in gpu_bundles["gte"].manifest.variants.items()}
    assert limits["cpu-fp32"] == asdict(TOLERANCES["fp32"]) and limits["cpu-fp32"]["batch"] == 1e-5
    assert limits[FP32] == limits["cpu-fp32"] | {"batch": limits[FP32]["score"]}


@pytest.mark.parametrize(("difference", "holds"), [(3e-5, True), (2e-4, False)])
def test_a_kernel_for_few_rows_may_sum_in_another_order(gpu_bundles, evaluated, monkeypatch, difference, holds):
    run = cuda.CudaExecutor.run

    def other_kernel(executor, batch):
        output = run(executor, batch)
        output.scores[:] += difference if len(batch.rows) == 1 else 0
        return output

    monkeypatch.setattr(cuda.CudaExecutor, "run", other_kernel)
    monkeypatch.setattr(cuda.CudaExecutor, "budget", 10_000)  # in a batch no document is alone
    with nullcontext() if holds else pytest.raises(ParityError, match=f"variant {FP32} .*: batch differs by 2"):
        opened(gpu_bundles["gte"], FP32)


@pytest.mark.parametrize("part", ["embedding", "scores"])
def test_a_device_that_computes_something_else_is_refused(gpu_bundles, tmp_path, evaluated, part):
    copy = replace(gpu_bundles["gte"], path=shutil.copytree(gpu_bundles["gte"].path, tmp_path / "copy"))
    tokens, expected = read_probes(copy)
    changed = {"embedding": "embeddings", "scores": "scores"}[part]
    other = getattr(expected, changed).copy()
    other[7] += 0.02
    write_probes(copy.path / PROBES, tokens, replace(expected, **{changed: other}))
    with pytest.raises(ParityError, match=rf"variant {FP32} is out of tolerance: .* 1 of {len(tokens.rows)} probe"):
        opened(copy, FP32)


def test_a_requested_tolerance_counts_on_the_device_too(gpu_bundles, evaluated):
    with pytest.raises(ParityError, match=r"on cuda:0 differs by .* allowed is 1e-06; allow more with --tolerance"):
        opened(gpu_bundles["gte"], FP16, tolerance=1e-6)


def test_the_graph_for_what_overflows_is_certified_before_the_first_batch(gpu_bundles, evaluated, monkeypatch):
    run = cuda.CudaExecutor.run

    def wrong_in_fp32(executor, batch):
        output = run(executor, batch)
        output.scores[0] += 0.01 if executor.variant == FP32 else 0
        return output

    monkeypatch.setattr(cuda.CudaExecutor, "run", wrong_in_fp32)
    with pytest.raises(ParityError, match=f"variant {FP32} is out of tolerance: score"):
        opened(gpu_bundles["gte"], FP16)


@pytest.mark.parametrize("exact", [FP32, "cpu-fp32"])
@pytest.mark.parametrize("sound", [True, False])
def test_the_graph_for_what_overflows_in_tensorrt_is_certified_too(gpu_bundles, evaluated, monkeypatch, exact, sound):
    kind = cuda.CudaExecutor if exact == FP32 else CpuSession
    bundle, run = gpu_bundles["gte"], kind.run
    variants = bundle.manifest.variants
    graphs = {TENSORRT: replace(variants[FP16], provider="tensorrt"), exact: variants[exact]}
    bundle = replace(bundle, manifest=replace(bundle.manifest, variants=graphs))

    def open_tensorrt(bundle, variant, device, engines, report, fallback):
        return BufferedSession(variant, cuda.CudaExecutor(bundle, variant, device), 600, fallback)

    def wrong_in_fp32(executor, batch):
        output = run(executor, batch)
        output.scores[0] += 0.01 if executor.variant == exact else 0
        return output

    monkeypatch.setattr(tensorrt, "TensorRTSession", open_tensorrt)
    monkeypatch.setattr(choice, "unavailable_reason", lambda _: None)
    if sound:
        found, said = opened(bundle, TENSORRT)
        assert found.fallback.variant == exact
        assert f"{exact}, for documents that overflow fp16, is certified" in said
        return
    monkeypatch.setattr(kind, "run", wrong_in_fp32)
    with pytest.raises(ParityError, match=f"variant {exact} is out of tolerance: score"):
        opened(bundle, TENSORRT)


def test_the_graph_for_what_overflows_is_closed_until_then_and_not_certified_again(gpu_bundles, evaluated, monkeypatch):
    bundle, run, computed = gpu_bundles["gte"], cuda.CudaExecutor.run, Counter()

    def overflowing(executor, batch):
        output = run(executor, batch)
        computed[executor.variant] += len(batch.rows)
        return output if executor.variant == FP32 else BatchOutput(output.scores, output.embeddings * np.nan)

    session, _ = opened(bundle, FP16)
    assert [executor.variant for executor in evaluated] == [FP16], "its memory is given back"
    monkeypatch.setattr(cuda.CudaExecutor, "run", overflowing)
    tokens, expected = read_probes(bundle)
    for documents in (tokens.slice(0), tokens):
        scores = run_in_order(session, documents).scores
        np.testing.assert_allclose(scores, expected.scores[: len(scores)], atol=1e-5)
    assert computed == dict.fromkeys((FP16, FP32), 1 + len(tokens.rows)), "what overflowed, and nothing else"
    assert sorted(executor.variant for executor in evaluated) == [FP16, FP32]


def test_probe_documents_that_overflow_open_no_third_graph(gpu_bundles, evaluated, monkeypatch):
    run, n_open = cuda.CudaExecutor.run, set()

    def overflowing(executor, batch):
        output = run(executor, batch)
        n_open.add(len(evaluated))
        return output if executor.variant == FP32 else BatchOutput(output.scores, output.embeddings * np.nan)

    monkeypatch.setattr(cuda.CudaExecutor, "run", overflowing)
    session, _ = opened(gpu_bundles["gte"], FP16)
    assert session.n_overflowed > 0 and max(n_open) == 2


def test_the_graph_for_what_overflows_is_certified_with_what_fits(gpu_bundles, evaluated, monkeypatch):
    run, tried = cuda.CudaExecutor.run, []

    def short_of_memory(executor, batch):
        if executor.variant == FP32:
            tried.append(batch.n_tokens)
            if batch.n_tokens > SHORT_TOKENS:
                raise OutOfMemoryError("no room")
        return run(executor, batch)

    monkeypatch.setattr(cuda.CudaExecutor, "run", short_of_memory)
    session, _ = opened(gpu_bundles["gte"], FP16)
    assert max(tried) > SHORT_TOKENS and len(set(tried)) > 5
    assert [executor.variant for executor in evaluated] == [session.variant], "memory is short: it is given back"


def test_the_graph_for_what_overflows_must_still_be_that_of_the_bundle(gpu_bundles, tmp_path, evaluated, monkeypatch):
    copy = Bundle.open(shutil.copytree(gpu_bundles["gte"].path, tmp_path / "copy"))
    session, _ = opened(copy, FP16)
    (copy.path / MANIFEST).write_text((copy.path / MANIFEST).read_text() + "\n")
    with pytest.raises(BundleError, match=r"copy is bundle .* now, the job began with"):
        session.fallback.open()


def test_without_probes_no_gpu_is_certified(gpu_bundles, tmp_path, evaluated):
    copy = replace(gpu_bundles["gte"], path=shutil.copytree(gpu_bundles["gte"].path, tmp_path / "copy"))
    (copy.path / PROBES).unlink()
    with pytest.raises(BundleError, match=f"has no {PROBES} to certify this device with"):
        opened(copy, FP32)


def test_a_bundle_without_heads_is_certified_by_its_embeddings(encoders, tmp_path, evaluated):
    from jql_export.bundle import Checkpoint, export_bundle

    checkpoint = Checkpoint(encoders["bert"], "bert", None)
    bundle = export_bundle(checkpoint, (), tmp_path / "out", "mean", 96, [FP32])
    session, _ = opened(bundle, FP32)
    tokens, expected = read_probes(bundle)
    np.testing.assert_allclose(run_in_order(session, tokens).embeddings, expected.embeddings, atol=1e-5)


@without_gpu
class TestWithoutGpu:
    def test_auto_takes_the_cpu(self, gpu_bundles):
        assert choose(gpu_bundles["gte"], "auto") == Choice(("cpu",), "cpu-fp32")
        assert runnable(gpu_bundles["gte"], "cuda") == []

    def test_a_bundle_for_gpus_alone_says_why_it_cannot_run(self, gpu_bundles):
        bundle = gpu_bundles["gte"]
        variants = {FP16: bundle.manifest.variants[FP16]}
        only = replace(bundle, manifest=replace(bundle.manifest, variants=variants))
        with pytest.raises(BundleError, match=rf"can be taken on cpu \({FP16}: written for cuda, fp16\)"):
            choose(only, "auto")
        with pytest.raises(DeviceError, match=r"device cuda:0: ONNX Runtime .*install jql-engine\[gpu\]"):
            open_variant(bundle, FP16, "cuda:0")

    @pytest.mark.parametrize("device", ["auto", "cuda"])
    def test_a_named_variant_for_gpus_says_that_there_is_none(self, gpu_bundles, device):
        with pytest.raises(DeviceError, match="device cuda was requested; the NVIDIA driver"):
            choose(gpu_bundles["gte"], device, FP16)


def test_the_identity_of_a_bundle_covers_its_probes(gpu_bundles, tmp_path):
    folder = shutil.copytree(gpu_bundles["gte"].path, tmp_path / "copy")
    (folder / PROBES).write_bytes((folder / PROBES).read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match=f"{PROBES} was changed"):
        Bundle.open(folder)
