"""The CUDA session on the published ONNX Runtime, without a GPU: see tests/recorder."""

from __future__ import annotations

import ctypes.util
import json
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from benchmarks.gpu.alternatives import ALTERNATIVES
from jql_export.families.read import read_encoder
from jql_export.probes import SENTENCES
from jql_export.readouts.head_file import read_head
from tests.conftest import FAMILIES, export
from tests.graphs import CUDA, write_bundle, write_modernbert_base, write_snowflake
from tests.recorder import MISSING, Recorder

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

RAGGED = [5, 9, 700, 1, 64]
FP32, FP16, ACCUMULATE_IN_FP32 = "0", "2", "68"  # as cuBLAS numbers types of values and of sums
TO_DEVICE, FROM_DEVICE = "1", "2"
FUSED = {"fp16": "FLASH_ATTENTION", "bf16": "FLASH_ATTENTION", "fp32": "EFFICIENT_ATTENTION"}


@pytest.fixture(scope="module")
def recorder(tmp_path_factory):
    return Recorder.build(tmp_path_factory.mktemp("recorder"))


@pytest.fixture
def run(recorder):
    def run(scenario, settings=None, **arguments):
        done = process(
            recorder.environment(**settings or {}), "tests.recorded.scenarios", scenario, json.dumps(arguments)
        )
        assert done.returncode == 0, done.stderr
        run.printed = done.stdout
        return json.loads(done.stdout.splitlines()[-1])

    return run


def process(environment, module, *arguments):
    environment |= {"ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO": "1"}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def snowflake(bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("snowflake")
    return str(write_snowflake(folder, bundle.manifest, CUDA).path)


@pytest.fixture(scope="module")
def modernbert(bundle, tmp_path_factory):
    return str(write_modernbert_base(tmp_path_factory.mktemp("modernbert"), bundle.manifest, CUDA).path)


@pytest.fixture(scope="module")
def families(encoders, head_files, bundle, tmp_path_factory):
    heads, root = [read_head(name, file) for name, file in head_files.items()], tmp_path_factory.mktemp("packed")
    return {
        (family, pooling): str(
            write_bundle(
                root / f"{family}-{pooling}", read_encoder(encoders[family]), heads, pooling, bundle.manifest
            ).path
        )
        for family in FAMILIES
        for pooling in ("cls", "mean")
    }


def kernels(lines):
    """Names of the kernels that were launched, without their parameters, in order."""
    return [
        re.split(r"[<(]", line.split(" ", 5)[5].removeprefix("void "))[0] for line in lines if line.startswith("kernel")
    ]


def blocks(lines, kernel):
    """How many blocks of a kernel were launched."""
    grids = [re.findall(r"grid=(\d+),(\d+),(\d+)", line)[0] for line in lines if kernel in line]
    return sum(math.prod(map(int, grid)) for grid in grids)


def products(lines):
    """(m, n, k), types and accumulation of the products, in order."""
    found = [dict(part.split("=") for part in line.split()[1:]) for line in lines if line.startswith("product")]
    return [((int(p["m"]), int(p["n"]), int(p["k"])), p["a"] + p["b"] + p["c"], p["compute"]) for p in found]


def copies(lines):
    """Kind and size of the copies, in order."""
    return [tuple(re.findall(r"kind=(\d) bytes=(\d+)", line)[0]) for line in lines if line.startswith("copy")]


def attention_kernels(printed):
    """Type and kernel of every attention that ran."""
    return set(re.findall(r"Operator=\w*Attention .*DataType=(\w+) SdpaKernel=(\w+)", printed))


def test_every_layer_of_snowflakes_shape_takes_flash_attention_and_the_fused_gelu(run, snowflake):
    found = run("launches", bundle=snowflake, variant="cuda-fp16", lengths=RAGGED)
    assert attention_kernels(run.printed) == {("fp16", "FLASH_ATTENTION")}
    launched = Counter(kernels(found["batch"]))
    assert launched["onnxruntime::flash::flash_fwd_kernel"] == 2
    assert launched["onnxruntime::contrib::cuda::biasSplitGeluKernel"] == 2
    assert found["shapes"] == [[5, 2], [5, 768]]


@pytest.mark.parametrize("variant", ["cuda-fp16", "cuda-bf16"])
def test_gelu_is_not_computed_in_narrow_types(run, families, variant):
    found = run("launches", bundle=families["bert", "cls"], variant=variant, lengths=RAGGED[:2])
    launched = [line for line in found["batch"] if "Gelu" in line]
    assert len(launched) == 2 and not [line for line in launched if "BiasGelu" in line]


def test_fp32_takes_an_attention_that_needs_no_square_of_a_long_document(run, snowflake):
    run("launches", bundle=snowflake, variant="cuda-fp32", lengths=[8192])
    assert attention_kernels(run.printed) == {("fp32", FUSED["fp32"])}


def test_what_may_be_faster_is_taken_as_a_whole_and_launches_less(run, snowflake):
    encoder = str(Path(snowflake).parent / "encoder")
    found = run("alternatives", encoder=encoder, bundle=snowflake, lengths=RAGGED)
    launched = {name: Counter(kernels(lines)) for name, lines in found["launched"].items()}
    assert launched.keys() == ALTERNATIVES.keys() == {row["name"] for row in found["rows"]}
    assert all(row["tokens_per_second"] > 0 for row in found["rows"])
    bias, rope = "onnxruntime::cuda::BroadcastBiasKernel", "onnxruntime::contrib::cuda::RotaryEmbeddingBSNH"
    before = launched["as exported"]
    assert before[bias] - launched["without biases"][bias] == 4, "queries and keys of two layers"
    assert blocks(found["launched"]["as exported"], rope) == 3 * 12 * sum(RAGGED)
    assert blocks(found["launched"]["RoPE of 12 heads at once"], rope) == 3 * sum(RAGGED)
    flash = "onnxruntime::flash::flash_fwd_kernel"
    assert blocks(found["launched"]["first queries alone"], flash) < blocks(found["launched"]["as exported"], flash)


def test_the_products_are_those_of_the_model_and_the_last_layers_of_first_tokens_alone(run, snowflake):
    found = run("launches", bundle=snowflake, variant="cuda-fp16", lengths=RAGGED)
    n, b, fp16, fp32 = sum(RAGGED), len(RAGGED), 3 * FP16, 3 * FP32

    def layer(first_tokens):
        rows = b if first_tokens else n
        qkv = [((768, n, 768), fp16)] * 3
        return [*qkv, ((768, rows, 768), fp16), ((6144, rows, 768), fp16), ((768, rows, 3072), fp16)]

    heads = [((2000, b, 768), fp32), ((2, b, 2000), fp32)]
    assert [(shape, types) for shape, types, _ in products(found["batch"])] == [*layer(False), *layer(True), *heads]
    assert {compute for *_, compute in products(found["batch"])} == {ACCUMULATE_IN_FP32}
    modes = {line for line in found["opening"] + found["batch"] if line.startswith("math mode")}
    assert modes == {"math mode 0", "math mode 16"}, "16: no sums in half; and not 3, TF32"


@pytest.mark.parametrize("variant", CUDA)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_two_copies_and_one_wait_and_nothing_else_leaves_the_gpu(run, families, family, pooling, variant):
    found = run("launches", bundle=families[family, pooling], variant=variant, lengths=[5, 90, 33])
    lines, precision = found["batch"], variant.removeprefix("cuda-")
    assert attention_kernels(run.printed) == {(precision, FUSED[precision])}
    assert [kind for kind, _ in copies(lines) if kind in (TO_DEVICE, FROM_DEVICE)] == [TO_DEVICE, FROM_DEVICE]
    assert [line.split()[1] for line in lines if line.startswith("synchronize")] == ["event"]
    assert not [line for line in found["opening"] + lines if line.startswith("unexpected")]
    assert not [line for line in lines if line.startswith(("malloc", "host malloc"))], "all memory is there already"
    assert len({re.findall(r"stream=(\w+)", line)[0] for line in lines if "stream=" in line}) == 1


@pytest.mark.parametrize("variant", CUDA)
def test_windows_run_on_the_gpu_alone_fused_and_in_time_that_is_linear_in_the_length(run, modernbert, variant):
    windows, launched = "attention_kernel_batched_impl", {}
    for lengths in ([8192], [1024] * 8, [1024], [1], RAGGED):
        found = run("launches", bundle=modernbert, variant=variant, lengths=lengths)
        precision = variant.removeprefix("cuda-")
        assert attention_kernels(run.printed) == {(precision, FUSED[precision]), (precision, "EFFICIENT_ATTENTION")}
        assert not [line for line in found["opening"] + found["batch"] if line.startswith("unexpected")]
        assert [kind for kind, _ in copies(found["batch"]) if kind in (TO_DEVICE, FROM_DEVICE)] == [
            TO_DEVICE,
            FROM_DEVICE,
        ]
        launched[str(lengths)] = [line for line in found["batch"] if windows in line]
    assert len(launched["[8192]"]) == (2 if FUSED[precision] == "FLASH_ATTENTION" else 5), "and in fp32 all attention"
    if variant != "cuda-fp32":
        n = {lengths: blocks(lines, windows) for lengths, lines in launched.items()}
        assert n["[8192]"] == n[str([1024] * 8)] == 8 * n["[1024]"] == 2 * 12 * 128


def test_the_largest_batch_and_one_token_are_launched(run, snowflake):
    for lengths in ([1], [8192] * 8, [16] * 4096):
        found = run("launches", bundle=snowflake, variant="cuda-fp16", lengths=lengths)
        assert found["shapes"][0] == [len(lengths), 2]


# Where blocks are cut otherwise than in the first batch one more is taken; without a first batch 200 take three times
# as much, and each larger one goes on.
@pytest.mark.parametrize(("variant", "growth"), [("cuda-fp16", 1), ("cuda-bf16", 1.25), ("cuda-fp32", 1)])
def test_memory_is_taken_once(run, snowflake, variant, growth):
    found = run("memory", bundle=snowflake, variant=variant, n_batches=200)
    assert found["budget"] == 65_536
    assert max(found["used"]) <= growth * found["before"]


def test_a_budget_that_does_not_fit_is_lowered_when_the_session_opens(run, snowflake):
    lengths = [8192] * 6 + [70] * 200
    found = run("shortage", {"mib": 700}, bundle=snowflake, budget=65_536, lengths=lengths)
    assert found["refused"] > 0 and found["budget"] == 16_384
    assert found["later"] == [0, 16_384] and found["documents"] == 206
    direct = run("shortage", {"mib": 700}, bundle=snowflake, budget=16_384, lengths=lengths)
    assert direct["refused"] == 0 and found["used"] == direct["used"], "what was tried in vain is given back"


def test_a_document_that_does_not_fit_is_said_when_the_session_opens(run, snowflake):
    found = run("shortage", {"mib": 200}, bundle=snowflake, budget=65_536, lengths=[1])
    assert "cuda-fp16: a document of 8192 tokens does not fit" in found["error"]
    assert "requested buffer of size" in found["error"] and "\n" not in found["error"]


def test_a_graph_that_does_not_fit_is_said(run, snowflake):
    said = run("opening_error", {"mib": 30}, bundle=snowflake, variant="cuda-fp16")
    assert "cuda-fp16.onnx does not fit into the GPU's memory" in said and "free memory there" in said


@pytest.mark.parametrize("mib", [81_559, 1000])
def test_what_is_not_finite_is_computed_again_in_fp32(run, snowflake, mib):
    # Bytes of 255 are NaN. With 1,000 MiB the budget is lowered first, and the fp32 graph must find room all the same.
    found = run("overflow", {"mib": mib}, bundle=snowflake, lengths=RAGGED, fills=[255, 0], budget=65_536)
    assert found == {"again": 5, "finite": True}


def test_what_is_finite_is_not_computed_again(run, snowflake):
    assert run("overflow", bundle=snowflake, lengths=RAGGED, fills=[0, 255]) == {"again": 0, "finite": True}


def test_what_is_not_finite_in_fp32_either_is_an_error(run, snowflake):
    found = run("overflow", bundle=snowflake, lengths=RAGGED, fills=[255, 255])
    assert "cuda-fp16: 5 of the 5 documents of a batch have values that are not finite" in found["error"]
    assert "in fp32 as well; check the weights" in found["error"]


def test_inputs_stay_as_they_are_until_they_are_copied(run, snowflake):
    found = run("uploads", {"keep": 1}, bundle=snowflake, n_docs=300)
    assert found["batches"] > 20 and found["arrived"] == found["batches"] == found["copies"]


def test_the_gpu_has_the_next_batch_before_it_ends_one(run, snowflake):
    # The clock is slow enough for a pause of the machine: a batch takes a fifth of a second.
    assert run("under_way", {"tflops": 1}, bundle=snowflake, n_docs=10) == [1, *[2] * 9]


def test_a_session_keeps_to_its_gpu(run, families):
    others, own = run("second_gpu", {"gpus": 2}, bundle=families["gte", "cls"])
    assert others == 0 < own


def test_a_session_gives_its_memory_back_and_leaves_the_thread_its_gpu(run, families):
    found = run("closed", {"gpus": 2}, bundle=families["gte", "cls"])
    assert found["gone"] == 0 < found["alive"] and found["device"] == 0


def test_bf16_is_taken_only_where_it_is_asked_for(run, exported, bundle, encoders, head_files, tmp_path):
    assert run("chosen", bundle=str(exported.path)) == "cuda-fp16"
    without_fp16 = str(export(encoders["gte"], head_files, tmp_path / "b", ("cuda-bf16", "cuda-fp32")).path)
    assert run("chosen", bundle=without_fp16) == "cuda-fp32"
    assert run("chosen", bundle=without_fp16, tolerance=0.1) == "cuda-bf16"
    assert run("chosen", bundle=without_fp16, tolerance=1e-4) == "cuda-fp32"
    beside_cpu = str(export(encoders["gte"], head_files, tmp_path / "c", ("cpu-fp32", "cuda-bf16")).path)
    assert run("chosen", bundle=beside_cpu) == "cpu-fp32"


@pytest.mark.parametrize("capability", [80, 86, 89, 120])
def test_other_gpus_take_flash_attention_too(run, snowflake, capability):
    for variant in ("cuda-fp16", "cuda-bf16"):
        run("launches", {"capability": capability}, bundle=snowflake, variant=variant, lengths=RAGGED)
        assert attention_kernels(run.printed) == {(variant.removeprefix("cuda-"), "FLASH_ATTENTION")}


def test_small_heads_on_older_gpus_take_efficient_attention(run, families):
    run("launches", {"capability": 75}, bundle=families["gte", "cls"], variant="cuda-fp16", lengths=[5, 90])
    assert attention_kernels(run.printed) == {("fp16", "EFFICIENT_ATTENTION")}


def test_a_graph_with_a_node_for_the_cpu_is_refused(run, bundle, families):
    said = run("loading_error", file=str(bundle.graph("standard-fp32")))  # its masks follow from shapes
    assert "standard-fp32.onnx cannot be loaded on the GPU alone" in said and "assigned to the default CPU EP" in said
    assert run("loading_error", file=f"{families['gte', 'cls']}/graphs/cuda-fp16.onnx") == ""


def test_bf16_on_an_older_gpu_is_refused(run, families):
    said = run("opening_error", {"capability": 75}, bundle=families["gte", "cls"], variant="cuda-bf16")
    assert "recorder has compute capability 7.5, bf16 needs 8.0; use --variant cuda-fp32" in said
    assert run("opening_error", {"capability": 80}, bundle=families["gte", "cls"], variant="cuda-bf16") == ""


@pytest.mark.skipif(ctypes.util.find_library("cublasLt") is not None, reason="this machine has CUDA")
def test_a_library_that_is_missing_is_named(recorder, families):
    environment = recorder.environment() | {"LD_LIBRARY_PATH": ""}
    arguments = json.dumps({"bundle": families["gte", "cls"], "variant": "cuda-fp16"})
    done = process(environment, "tests.recorded.scenarios", "opening_error", arguments)
    said = json.loads(done.stdout.splitlines()[-1])
    assert "libcublasLt.so" in said and "jql-engine[gpu]" in said


@pytest.fixture(scope="module")
def exported(encoders, head_files, tmp_path_factory):
    return export(encoders["gte"], head_files, tmp_path_factory.mktemp("exported") / "bundle", ("cpu-fp32", *CUDA))


def test_our_part_of_the_benchmark(run, exported):
    rows = run("benchmark", bundle=str(exported.path), texts=list(SENTENCES[:40]))
    assert not [row["note"] for row in rows if "failed" in row["note"]]
    timed = {(row["what"], row["variant"]) for row in rows if row["tokens_per_second"] > 0}
    labels = {"cuda-fp16 8k": "cuda-fp16", "cuda-bf16 8k": "cuda-bf16", "cuda-fp32": "cuda-fp32"}
    assert timed == {(what, label) for what in ("kernel", "engine", "end_to_end", "profile") for label in labels}
    for row in rows:
        assert row["budget_tokens"] > 0
        if row["what"] == "profile":
            assert row["nodes"].keys() == {"CUDAExecutionProvider"} and row["ops"]["MatMul"]["nodes"] > 0
            kernel = FUSED[row["variant"].partition(" ")[0].removeprefix("cuda-")]
            assert row["attention"] == {kernel: 2}


@pytest.fixture(scope="module")
def lenient(exported, tmp_path_factory):
    """A bundle that a GPU may run which computes nothing."""
    bundle = shutil.copytree(exported.path, tmp_path_factory.mktemp("lenient") / "bundle")
    manifest = json.loads((bundle / "bundle.json").read_text())
    for variant in ("cuda-fp16", "cuda-fp32"):
        tolerance = manifest["variants"][variant]["tolerance"]
        tolerance |= dict.fromkeys(tolerance, 1e3)
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    return bundle


@pytest.mark.parametrize("gpu", [0, 1])
def test_an_engine_takes_the_gpu_that_is_named(run, lenient, gpu):
    found = run("engine", {"gpus": 2}, bundle=str(lenient), device=f"cuda:{gpu}", texts=list(SENTENCES[:3]))
    assert found["shape"] == [3, 2] and min(found["n_tokens"]) > 2
    assert found["used"][gpu] > 0 == found["used"][1 - gpu]


def test_the_graph_for_what_overflows_takes_no_memory_until_then(run, lenient):
    certified, alone = run("certified", bundle=str(lenient))
    assert 0 < certified == alone


def test_jql_run_takes_every_gpu(recorder, lenient, tmp_path):
    rows = [{"id": i, "text": SENTENCES[i % len(SENTENCES)]} for i in range(3_000)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = (tmp_path / "in.jsonl", "--bundle", lenient, "--out", tmp_path / "out", "--chunk-rows", 100)
    environment = recorder.environment(gpus=2, fill=0)
    done = process(environment, "tests.recorded.jql_run", *arguments, "--device", "cuda", "--variant", "cuda-fp16")
    assert done.returncode == 0, done.stderr
    assert all(f"cuda-fp16 on cuda:{gpu} is certified" in done.stderr for gpu in (0, 1))
    (file,) = (tmp_path / "out").glob("*.parquet")
    table = pq.read_table(file)
    assert table["id"].to_pylist() == list(range(3_000)) and table["score_edu"].null_count == 0


def test_a_gpu_that_computes_nothing_is_refused(recorder, exported, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "one"}\n')
    arguments = (tmp_path / "in.jsonl", "--bundle", exported.path, "--out", tmp_path / "out", "--device", "cuda")
    done = process(recorder.environment(), "tests.recorded.jql_run", *arguments)
    assert done.returncode != 0 and "cuda-fp32 is out of tolerance" in done.stderr
