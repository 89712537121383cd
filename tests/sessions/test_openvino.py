from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import util

import numpy as np
import openvino
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jql_engine.bundle import MANIFEST, PROBES, describe_files
from jql_engine.data import Budget
from jql_engine.engine import Engine
from jql_engine.errors import BundleError, DeviceError, ParityError
from jql_engine.sessions import certify as parity
from jql_engine.sessions import openvino as session_file
from jql_engine.sessions.base import EngineOptions, SessionOptions, run_in_order
from jql_engine.sessions.open import open_variant
from jql_engine.sessions.select import TOLERANCE, choose
from jql_export import probes
from jql_export.readouts.head_file import read_head
from jql_export.reference import Reference
from jql_export.tolerances import TOLERANCES
from tests.conftest import FAMILIES, POOLING, export

HAS_BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bf16 instructions")
FP32, BF16 = "openvino-fp32", "openvino-bf16"
TEXTS = ["Water boils at a lower temperature on a mountain.", "", "Der Regen hat den Weg aufgeweicht. " * 5, None]


@pytest.fixture(scope="module")
def openvino_bundles(encoders, head_files, tmp_path_factory):
    root = tmp_path_factory.mktemp("openvino")
    variants = ["cpu-fp32", FP32, *([BF16] if HAS_BF16 else [])]
    return {family: export(encoders[family], head_files, root / family, variants) for family in FAMILIES}


@pytest.fixture(scope="module")
def bundle(openvino_bundles):
    return openvino_bundles["gte"]


def with_parity(bundle, **worst):
    """The bundle as if its variants had been found `worst` away from the reference."""
    variants = {
        name: replace(v, parity=v.parity | ({"max_abs_score": worst[v.precision]} if v.precision in worst else {}))
        for name, v in bundle.manifest.variants.items()
    }
    return replace(bundle, manifest=replace(bundle.manifest, variants=variants))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_precision_is_certified_within_its_own_tolerance(openvino_bundles, encoders, head_files, family):
    bundle = openvino_bundles[family]
    tokens = probes.token_batch(Engine(bundle.path, device="cpu").tokenizer)
    heads = [read_head(name, file) for name, file in head_files.items()]
    expected = Reference(encoders[family], heads, POOLING[family]).run(tokens)
    found = {}
    for name, variant in bundle.manifest.variants.items():
        figures = parity.certify(open_variant(bundle, name), tokens, expected, TOLERANCES[variant.precision])
        assert variant.tolerance["score"] == TOLERANCES[variant.precision].score
        found[name] = figures["max_abs_score"]
        assert figures["max_abs_score"] == pytest.approx(variant.parity["max_abs_score"], rel=0.2, abs=1e-5)
    if HAS_BF16:
        assert found[FP32] < found[BF16], "bf16 rounds"


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_reaches_openvino_as_its_fused_operator_in_every_layer(openvino_bundles, family):
    bundle = openvino_bundles[family]
    kinds = [op.get_type_name() for op in openvino.Core().read_model(bundle.graph(FP32)).get_ops()]
    assert kinds.count("ScaledDotProductAttention") == bundle.manifest.encoder.layers
    assert "Softmax" not in kinds


def test_precisions_share_one_graph(bundle):
    assert bundle.graph(FP32).name == "openvino.onnx"
    assert not any(name.startswith("graphs/openvino-fp32") for name in bundle.manifest.files)
    if HAS_BF16:
        assert bundle.graph(BF16) == bundle.graph(FP32)


def test_a_batch_holds_documents_of_one_length(bundle):
    session = open_variant(bundle, FP32)
    assert session.budget.layout == "exact"
    scores = Engine(bundle.path, device="cpu", variant=FP32).score(TEXTS)
    expected = Engine(bundle.path, device="cpu", variant="cpu-fp32").score(TEXTS)
    np.testing.assert_allclose(scores.values, expected.values, atol=1e-4)
    assert scores.valid.tolist() == [True, True, True, False]


def test_a_session_may_be_shared_by_threads(bundle):
    from concurrent.futures import ThreadPoolExecutor

    engine = Engine(bundle.path, device="cpu", variant=FP32, threads=1)
    texts = [[f"{word} " * n for n in range(1, 12)] for word in ("one", "two", "three", "four")]
    alone = [engine.score(batch).values for batch in texts]
    with ThreadPoolExecutor(4) as pool:
        for found, expected in zip(pool.map(lambda t: engine.score(t).values, texts * 4), alone * 4, strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5)


class TestChoice:
    @pytest.mark.parametrize("device", ["auto", "cpu"])
    def test_the_fastest_within_the_default_tolerance(self, bundle, device):
        assert choose(with_parity(bundle, bf16=TOLERANCE), device).variant == (BF16 if HAS_BF16 else FP32)
        assert choose(with_parity(bundle, bf16=TOLERANCE * 1.01), device).variant == FP32

    def test_the_requested_tolerance_decides(self, bundle):
        measured = with_parity(bundle, bf16=0.01)
        assert choose(measured, "cpu", tolerance=0.01).variant == (BF16 if HAS_BF16 else FP32)
        exact = choose(measured, "cpu", tolerance=0.001)
        assert exact.variant == FP32 and list(exact.passed_over) == [BF16]

    def test_nothing_close_enough_is_an_error_with_each_reason(self, bundle):
        with pytest.raises(BundleError, match=rf"{FP32}: its scores differ by up to 1e-06 .*allowed is 0"):
            choose(with_parity(bundle, fp32=1e-6, bf16=0.01), "cpu", tolerance=0.0)

    def test_a_named_variant_is_taken_as_it_is_unless_a_tolerance_is_named_too(self, bundle):
        measured = with_parity(bundle, fp32=0.1)
        assert choose(measured, "cpu", FP32).variant == FP32
        with pytest.raises(BundleError, match=f"variant {FP32}: its scores differ.*--tolerance"):
            choose(measured, "cpu", FP32, tolerance=0.01)

    def test_without_heads_the_embedding_decides(self, bundle):
        no_scores = {"max_abs_embedding": 0.003, "max_abs_embedding_long": 0.004}
        variants = {FP32: replace(bundle.manifest.variants[FP32], parity=no_scores)}
        embedding = replace(bundle, manifest=replace(bundle.manifest, variants=variants))
        assert choose(embedding, "cpu", tolerance=0.004).variant == FP32
        with pytest.raises(BundleError, match=r"its embeddings differ by up to 0\.004 .*, allowed is 0\.0039"):
            choose(embedding, "cpu", tolerance=0.0039)

    def test_a_graph_without_figures_is_not_taken_for_exact(self, bundle):
        variants = {FP32: replace(bundle.manifest.variants[FP32], parity={})}
        unknown = replace(bundle, manifest=replace(bundle.manifest, variants=variants))
        with pytest.raises(BundleError, match="is not known"):
            choose(unknown, "cpu")

    def test_options_of_engines_are_for_tensorrt(self, bundle):
        with pytest.raises(DeviceError, match=f"variant {FP32} does not run with TensorRT; leave out the options"):
            open_variant(bundle, FP32, options=SessionOptions(engines=EngineOptions(build=False)))

    def test_without_the_package_auto_takes_what_is_installed(self, bundle, monkeypatch):
        spec = util.find_spec
        without = lambda name: None if name == "openvino" else spec(name)  # noqa: E731
        monkeypatch.setattr(session_file.importlib.util, "find_spec", without)
        assert choose(bundle, "auto").variant == "cpu-fp32"
        only = replace(bundle, manifest=replace(bundle.manifest, variants={FP32: bundle.manifest.variants[FP32]}))
        with pytest.raises(BundleError, match=rf"can be taken on cpu \({FP32}: the package openvino is not"):
            choose(only, "auto")
        with pytest.raises(DeviceError, match=r"variant openvino-fp32: .*pip install 'jql-engine\[openvino\]'"):
            Engine(bundle.path, variant=FP32)

    def test_bf16_on_a_cpu_without_it_is_an_error_and_never_chosen(self, bundle, monkeypatch):
        monkeypatch.setattr(session_file, "_capabilities", lambda: ("FP32", "INT8"))
        bf16 = replace(bundle.manifest.variants[FP32], precision="bf16")
        both = replace(
            bundle, manifest=replace(bundle.manifest, variants={BF16: bf16, FP32: bundle.manifest.variants[FP32]})
        )
        chosen = choose(both, "cpu")
        assert chosen.variant == FP32 and list(chosen.passed_over) == [BF16]
        assert chosen.notes()[0].startswith(
            f"variant {BF16}, which is taken first where it can be, is not: this CPU has no bf16"
        )
        with pytest.raises(
            DeviceError, match=f"variant {BF16}: this CPU has no bf16 .*finds FP32, INT8\\); or take a variant in fp32"
        ):
            open_variant(both, BF16)


def test_a_worker_with_a_share_of_the_cores_pins_none(bundle):
    shared, whole = open_variant(bundle, FP32, options=SessionOptions(threads=1)), open_variant(bundle, FP32)
    assert shared._compiled.get_property("INFERENCE_NUM_THREADS") == 1 == shared.n_parallel
    if len(session_file.os.sched_getaffinity(0)) > 1:
        assert not shared._compiled.get_property("ENABLE_CPU_PINNING")
    assert whole._compiled.get_property("NUM_STREAMS") == whole.n_parallel


def test_jql_run_scores_with_the_chosen_variant_and_says_so(bundle, tmp_path):
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "texts.parquet")
    command = [
        sys.executable,
        "-m",
        "jql_engine.cli.run",
        str(tmp_path / "texts.parquet"),
        "--bundle",
        str(bundle.path),
    ]
    code = "import sys; from jql_engine.cli.run import main; sys.argv[0] = 'jql-run'; main()"
    command[1:3] = ["-c", code]
    limit = str(bundle.manifest.variants[FP32].parity["max_abs_score"])
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "scores"), "--tolerance", limit, "--workers", "2"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1])["variant"] == FP32
    assert f"variant {FP32}" in done.stderr
    table = pq.read_table(tmp_path / "scores" / "texts.parquet")
    expected = Engine(bundle.path, variant=FP32).score(TEXTS).to_table()
    np.testing.assert_allclose(table["score_edu"].to_pylist()[:3], expected["score_edu"].to_pylist()[:3], atol=1e-5)


@needs_bf16
def test_a_score_in_bf16_hardly_depends_on_its_batch(bundle):
    session = open_variant(bundle, BF16)
    tokens = probes.token_batch(Engine(bundle.path, device="cpu").tokenizer)
    together, alone = (run_in_order(session, tokens, Budget(n, "exact")).embeddings for n in (1024, 1))
    np.testing.assert_allclose(together, alone, atol=TOLERANCES["bf16"].embedding)


def test_a_session_that_computes_something_else_is_refused_when_it_is_opened(bundle, tmp_path):
    copy = shutil.copytree(bundle.path, tmp_path / "copy")
    tokens, expected = parity.read_probes(bundle)
    changed = expected.scores.copy()
    changed[3] += 0.01
    parity.write_probes(copy / PROBES, tokens, replace(expected, scores=changed))
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["files"] = describe_files(copy)
    (copy / MANIFEST).write_text(json.dumps(manifest))
    for variant in ("cpu-fp32", FP32):
        with pytest.raises(ParityError, match=f"variant {variant} is out of tolerance: score differs by 1.00e-02"):
            Engine(copy, variant=variant)


@pytest.mark.parametrize("threads", [1, 2])
def test_without_memory_there_is_an_error_and_no_score(bundle, tmp_path, threads):
    """With one thread OpenVINO's own infer() says nothing, and gives the scores of the call before."""
    script = tmp_path / "limited.py"
    script.write_text(LIMITED)
    found = subprocess.run(
        [sys.executable, script, bundle.path, str(threads)], check=False, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    first, second = found.stdout.splitlines()
    assert first.startswith("RuntimeError"), first
    assert second.startswith("DeviceError") and "open the engine again" in second, second


def test_an_interrupted_batch_leaves_the_session_as_it_was(bundle, monkeypatch):
    """Ctrl-C is seen once the batch is done: its request goes on meanwhile."""
    engine = Engine(bundle, "cpu", FP32)
    expected = engine.score(TEXTS).values
    session = engine.session

    class Interrupted:
        def __init__(self, request):
            self.request, self.n_waits = request, 0

        def __getattr__(self, name):
            return getattr(self.request, name)

        def wait(self):
            self.request.wait()
            self.n_waits += 1
            if self.n_waits == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(session, "_request", Interrupted(session._request))
    with pytest.raises(KeyboardInterrupt):
        engine.score(TEXTS)
    np.testing.assert_array_equal(engine.score(TEXTS).values, expected)


LIMITED = """
import os, resource, sys
from pathlib import Path
import numpy as np
from jql_engine import Engine
from jql_engine.data import TokenBatch
engine = Engine(Path(sys.argv[1]), "cpu", "openvino-fp32", threads=int(sys.argv[2]))
def score(n):
    return engine.score_tokens(
        TokenBatch(np.arange(n), np.full(n * 32, 7, np.int32), np.arange(n + 1) * 32, np.zeros(n, bool))
    )
score(1)
size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
resource.setrlimit(resource.RLIMIT_AS, (size, -1))
for n in (32, 1):
    try:
        print("scores", score(n).values[0])
    except Exception as error:
        print(type(error).__name__, str(error).replace(chr(10), " "))
"""
