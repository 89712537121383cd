from __future__ import annotations

import inspect
import json
from dataclasses import asdict

import numpy as np
import onnxruntime as ort
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import table, throughput
from benchmarks.cases import scored
from benchmarks.figures import best_rows, compare_finite, flops_per_token, rate, record
from benchmarks.gpu import measure as gpu
from benchmarks.gpu import nvidia
from benchmarks.gpu.jql import JqlPipeline, arrivals, largest_that_fits, reason
from benchmarks.gpu.kernel import Resident, divided, spread
from benchmarks.gpu.nvidia import gpu_ceilings, parse_query
from benchmarks.gpu.profile import aggregate, attention_kernels, feeds_of, profile, read_batches, write_batches
from benchmarks.reference import SentenceEncoder, TransformersEncoder
from benchmarks.table import GpuRow, print_ops, print_rows
from jql_engine.batching import plan_batches
from jql_engine.data import Batch, Budget, DocumentBatch, TokenBatch
from jql_engine.engine import as_texts
from jql_engine.errors import DeviceError
from jql_engine.sessions.cuda.capacity import MAX_BATCH_TOKENS, Capacity, token_budget
from jql_engine.sessions.open import open_variant
from jql_engine.tokenizer import Tokenizer
from jql_export.families.base import EncoderSpec
from jql_export.probes import SENTENCES
from tests.conftest import FAMILIES
from tests.sessions.test_cuda import batch_of

GIB = 1 << 30


def tokens_of(lengths, seed=0):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.random.default_rng(seed).integers(5, 100, offsets[-1]).astype(np.int32)
    return TokenBatch(np.arange(len(lengths)), ids, offsets, np.zeros(len(lengths), np.bool_))


RAGGED = tokens_of([7, 1, 40, 12, 3, 96, 2, 2, 30])


def base_spec(**changes):
    shape = {
        "architecture": "gte", "n_layers": 12, "hidden_size": 768, "n_attention_heads": 12, "intermediate_size": 3072,
        "positions": "rope", "mlp": "geglu", "max_positions": 8192, "norm_epsilon": 1e-12, "pad_id": 1,
        "inverse_frequencies": None,
    }  # fmt: skip
    return EncoderSpec(**shape | changes)


def test_the_flops_of_a_token_are_those_of_the_design():
    lengths = np.array([1366, 1366])  # E[S^2] / E[S] of the real mix
    assert flops_per_token(base_spec(), lengths) / 1e6 == pytest.approx(277, abs=0.5)
    assert flops_per_token(base_spec(), np.array([1])) / 1e6 == pytest.approx(226.5, abs=0.1)


@pytest.mark.parametrize(
    ("hidden", "intermediate", "layers", "windowed", "ratio"), [(768, 1152, 22, 14, 1.69), (1024, 2624, 28, 18, 1.40)]
)
def test_windows_count_three_blocks_of_keys(hidden, intermediate, layers, windowed, ratio):
    """ModernBERT's Base and Large at 8,192 tokens, over the same at 1,024."""
    shape = {"n_layers": layers, "hidden_size": hidden, "intermediate_size": intermediate, "window": 64}
    long, short = (flops_per_token(base_spec(**shape), np.array([n]), windowed) for n in (8192, 1024))
    assert long / short == pytest.approx(ratio, abs=0.005)
    all_windows = flops_per_token(base_spec(**shape), np.array([8192]), layers)
    assert all_windows == pytest.approx(flops_per_token(base_spec(**shape), np.array([192]), layers))


def test_the_flops_of_a_batch_are_those_of_its_documents():
    spec, lengths = base_spec(mlp="gelu", n_layers=3), np.array([5, 100, 17])
    alone = sum(flops_per_token(spec, lengths[i : i + 1]) * n for i, n in enumerate(lengths))
    assert flops_per_token(spec, lengths) * lengths.sum() == pytest.approx(alone)


def engine_row(variant, speed, what="engine", name="jql-engine"):
    row = GpuRow(what, name, variant, 10, 6900, [1.0])
    row.tokens_per_second = speed
    return row


def test_mfu_ratio_and_best_budget():
    rows = [
        engine_row("bf16, 1000", 100.0, "reference", "JQL's loop, padded, sdpa"),
        engine_row("bf16, 1000", 400.0, "reference", "JQL's loop, padding removed"),
        engine_row("fp32", 3000.0, "reference", "transformers, one at a time"),
        engine_row("cuda-fp16 8k", 1000.0),
        engine_row("cuda-fp16 16k", 2000.0),
        engine_row("cuda-fp32", 50.0),
        engine_row("tensorrt-fp16", 0.0),
    ]
    rate(rows, flops=2e6, matrix_gflops=8.0)
    assert [row.to_reference for row in rows] == [0.25, 1.0, 7.5, 2.5, 5.0, 0.125, 0.0]
    assert rows[4].mfu == 0.5
    assert [row.best_budget for row in rows] == [False, False, False, False, True, True, False]
    assert best_rows(rows) == [rows[4], rows[5]]


def test_documents_that_overflowed_are_counted_and_not_compared():
    row, expected = engine_row("cuda-fp16", 1.0), np.arange(12, dtype=np.float32).reshape(6, 2)
    found = expected + np.float32(1e-3)
    found[2, 0] = np.nan
    compare_finite(row, found, expected, ("a", "b"))
    assert row.overflowed == 1 and row.score_difference == pytest.approx(1e-3, rel=1e-2)
    assert row.spearman == {"a": 1.0, "b": 1.0}


def test_a_row_that_failed_has_no_rate_and_says_why(capsys):
    row = GpuRow("reference", "JQL's loop, padded, sdpa", "bf16, 1000", 10, 6900, note="out of memory")
    row.finish()
    print_rows([row])
    assert row.tokens_per_second == 0 and "-            out of memory" in capsys.readouterr().out


def test_the_table_of_a_gpu(capsys):
    row = GpuRow("engine", "jql-engine, ids to scores", "cuda-fp16 64k", 10, 6900, [0.5, 0.3, 0.4])
    row.finish()
    row.mfu, row.to_reference, row.score_difference, row.spearman = 0.5, 4.2, 1e-3, {"a": 0.99991}
    copy = GpuRow("ceiling", "copy", "torch", 0, 0, [0.1])
    copy.gigabytes_per_second = 4300.0
    print_rows([row, copy])
    line, other = capsys.readouterr().out.splitlines()
    for part in ("17,250.0 tokens/s", "MFU 0.500", "1,500 documents/min", "4.20 x", "within 1.0e-03", "0.99991"):
        assert part in line
    assert "4,300.0 GB/s" in other
    json.dumps(asdict(row))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loop_without_padding_scores_what_the_padded_one_and_the_oracle_score(family, encoders, bundles):
    bundle = bundles[family]
    oracle = TransformersEncoder(encoders[family], bundle.manifest.pooling, torch.float32)
    expected = scored(bundle, oracle.embed(RAGGED, 1))
    for layout in ("varlen", "padded"):
        loop = JqlPipeline(encoders[family], bundle, torch.float32, "cpu", layout)
        for n_docs in (2, 9):
            np.testing.assert_allclose(loop.scores(RAGGED, n_docs), expected, atol=2e-4, err_msg=f"{layout} {n_docs}")


def test_sentence_transformers_embeds_as_the_oracle(encoders, bundle):
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    manifest = bundle.manifest
    model = SentenceEncoder(encoders["gte"], manifest.pooling, manifest.max_tokens, torch.float32, "cpu")
    tokens = Tokenizer.of(bundle).encode(DocumentBatch.of(as_texts(SENTENCES[:6])))
    expected = TransformersEncoder(encoders["gte"], manifest.pooling, torch.float32).embed(tokens, 1)
    np.testing.assert_allclose(model.embed(list(SENTENCES[:6]), 4).numpy(), expected, atol=1e-5)


def test_documents_stay_in_the_order_of_arrival():
    batches = arrivals(RAGGED, 4)
    assert [batch.row_length for batch in batches] == [40, 96, 30]
    np.testing.assert_array_equal(np.concatenate([batch.ids for batch in batches]), RAGGED.ids)
    np.testing.assert_array_equal(np.concatenate([batch.rows for batch in batches]), RAGGED.rows)


def test_a_batch_is_halved_until_it_fits():
    def attempt(n_docs):
        if n_docs > 500:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.00 GiB.")
        if n_docs > 100:
            raise RuntimeError("Expected canUse32BitIndexMath(input) to be true\nand more")

    fits, failures = largest_that_fits(attempt, 1000)
    assert fits == 62 and [n for n, _ in failures] == [1000, 500, 250, 125]
    assert failures[0][1] == "out of memory" and failures[1][1].endswith("to be true")


def test_the_gpus_kernel_is_called_as_torch_declares_it():
    from torch.nn.attention.varlen import varlen_attn

    inspect.signature(varlen_attn).bind("q", "k", "v", "offsets", "offsets", 9, 9)


def test_what_fits_no_batch_raises():
    def attempt(n_docs):
        raise torch.OutOfMemoryError("no")

    with pytest.raises(torch.OutOfMemoryError):
        largest_that_fits(attempt, 8)


def test_after_an_error_that_ends_cuda_no_smaller_batch_is_tried():
    tried = []

    def attempt(n_docs):
        tried.append(n_docs)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        largest_that_fits(attempt, 8)
    assert tried == [8]


@pytest.mark.parametrize("said", ["CUBLAS_STATUS_ALLOC_FAILED", "out of memory", "invalid configuration argument"])
def test_after_other_errors_of_cuda_a_smaller_batch_is_tried(said):
    def attempt(n_docs):
        if n_docs > 2:
            raise RuntimeError(f"CUDA error: {said}")

    assert largest_that_fits(attempt, 8)[0] == 2


def test_an_error_is_one_line():
    assert reason(ValueError("")) == "ValueError: "
    assert reason(ValueError("a\nb")) == "ValueError: a"


@given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.integers(1, 200))
def test_divided_batches_hold_every_document_once_and_fit(lengths, budget):
    batch, capacity = batch_of(lengths), Capacity.of(budget, 60)
    parts = list(divided(batch, capacity))
    assert all(capacity.holds(part) for part in parts)
    np.testing.assert_array_equal(np.concatenate([part.rows for part in parts]), batch.rows)


def test_batches_at_even_distances():
    batches = [batch_of([n]) for n in range(1, 101)]
    assert [b.n_tokens for b in spread(batches, 4)] == [1, 34, 67, 100]
    assert len(spread(batches[:3], 16)) == 3


def test_a_sweep_goes_beyond_the_engines_cap_but_not_beyond_memory():
    assert token_budget(80 * GIB, 768, 2) == MAX_BATCH_TOKENS < 131_072
    assert token_budget(80 * GIB, 768, 2, 131_072) == 131_072
    assert token_budget(GIB, 768, 2, 131_072) == token_budget(GIB, 768, 2) < MAX_BATCH_TOKENS


def test_the_inputs_of_a_packed_batch():
    feeds = feeds_of(batch_of([3, 1, 2]))
    assert feeds["cu_seqlens"].tolist() == [0, 3, 4, 6] and feeds["token_offset"].shape == (3, 3)


def exact_batches(bundle):
    encoded = Tokenizer.of(bundle).encode(DocumentBatch.of(as_texts(SENTENCES[:8])))
    return encoded, list(plan_batches(encoded, Budget(256, "exact")))


def test_the_graph_alone_scores_what_the_session_scores(bundle):
    tokens, batches = exact_batches(bundle)
    expected = gpu.score_tokens(open_variant(bundle, "cpu-fp32"), tokens, len(bundle.heads))
    session = ort.InferenceSession(str(bundle.graph("cpu-fp32")), providers=["CPUExecutionProvider"])
    resident = Resident(session, batches, "cpu")
    np.testing.assert_allclose(resident.run(), expected, atol=1e-5)


def test_a_real_profile_by_op_and_provider(bundle, capsys):
    _, batches = exact_batches(bundle)
    measured = profile(bundle.path, "cpu-fp32", "cpu", batches)
    assert measured.nodes.keys() == {"CPUExecutionProvider"} and measured.attention == {}
    assert sum(op["nodes"] for op in measured.ops.values()) == measured.nodes["CPUExecutionProvider"]
    assert sum(op["share"] for op in measured.ops.values()) == pytest.approx(1, abs=1e-3)
    n_tokens = sum(batch.n_tokens for batch in batches)
    products = measured.ops["MatMul"]
    flop = 2 * n_tokens * (32 * 32 * 4 + 3 * 32 * 48)  # a layer; the other is of first tokens but for keys and values
    assert flop < 1e12 * products["teraflop"] < 2 * flop and 4 * n_tokens * 32 < 1e9 * products["gigabytes"]
    row = GpuRow("profile", "op by op", "cpu-fp32", 8, sum(batch.n_tokens for batch in batches))
    record(row, measured, row.tokens / measured.seconds / 2)
    assert row.note == "the ops add up to 50% of the graph's own time"
    print_ops(row)
    assert "ns/token" in capsys.readouterr().out


def test_a_profile_that_fails_says_what_the_process_wrote(bundle):
    with pytest.raises(RuntimeError, match=r"benchmarks\.gpu\.profile ended with 1: KeyError: 'no-such-variant'"):
        profile(bundle.path, "no-such-variant", "cpu", [batch_of([3])])


def test_the_first_runs_of_a_profile_are_left_out():
    def event(name, op, ts, dur, provider="CUDAExecutionProvider"):
        shapes = {"input_type_shape": [{"float16": [10, 50]}], "output_type_shape": [{"float16": [10, 1500]}]}
        sizes = {"activation_size": "500", "parameter_size": "300", "output_size": "200"}
        return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur,
                "args": {"op_name": op, "provider": provider, **shapes, **sizes}}  # fmt: skip

    events = [
        {"cat": "Session", "name": "model_run", "ts": 0, "dur": 10_000, "args": {}},
        event("a", "MatMul", 10, 9_000), event("a", "MatMul", 30, 100), event("a", "MatMul", 20, 9_000),
        event("a", "MatMul", 40, 200), event("b", "MatMul", 11, 7), event("b", "MatMul", 12, 7),
        event("b", "MatMul", 31, 300), event("b", "MatMul", 41, 0),
        event("c", "Gelu", 35, 150), event("c", "Gelu", 45, 50),
    ]  # fmt: skip
    ops, nodes = aggregate(events, 2)
    assert ops == {
        "MatMul": {"seconds": 600e-6, "share": 0.75, "nodes": 2, "gigabytes": 4e-6, "teraflop": 6e-6},
        "Gelu": {"seconds": 200e-6, "share": 0.25, "nodes": 1, "gigabytes": 2e-6, "teraflop": 0},
    }
    assert nodes == {"CUDAExecutionProvider": 3}


def test_attention_kernels_are_counted_by_node():
    def line(node, kernel):
        return f"\x1b[36mOperator=PackedMultiHeadAttention Node={node} DataType=fp16 SdpaKernel={kernel}\x1b[0m"

    options = "\x1b[36mAttentionKernelOptions: FLASH_ATTENTION=1 EFFICIENT_ATTENTION=1 MATH=1\x1b[0m"
    nodes = [line(f"/layers/{i}", "FLASH_ATTENTION") for i in range(12)]
    assert attention_kernels([options, *nodes, *nodes, "profile.json"]) == {"FLASH_ATTENTION": 12}
    assert attention_kernels([*nodes[:2], line("/layers/1", "MATH")]) == {"FLASH_ATTENTION": 2, "MATH": 1}
    nameless = "Operator=PackedMultiHeadAttention DataType=fp16 SdpaKernel=FLASH_ATTENTION"
    assert attention_kernels([nameless]) == {"FLASH_ATTENTION": 1}


def test_batches_travel_to_another_process(tmp_path):
    batches = [batch_of([3, 1, 2]), Batch(np.arange(2), np.arange(8, dtype=np.int32), np.array([0, 4, 8], np.int32), 4)]
    write_batches(tmp_path / "batches.npz", batches)
    for found, batch in zip(read_batches(tmp_path / "batches.npz"), batches, strict=True):
        np.testing.assert_array_equal(found.ids, batch.ids)
        np.testing.assert_array_equal(found.offsets, batch.offsets)
        assert found.row_length == batch.row_length


def test_ceilings():
    rows = gpu_ceilings("cpu", large=128, up=(128, 64, 128), copied=1 << 20)
    assert [row.variant for row in rows] == ["float16", "bfloat16", "float16", "torch"]
    assert all(row.gflops > 0 for row in rows[:3]) and rows[3].gigabytes_per_second > 0


def test_a_line_of_nvidia_smi():
    found = parse_query("580.65.06, 700.00 W, 1980 MHz, 2619 MHz\n")
    assert found["driver_version"] == "580.65.06" and found["power.limit"] == "700.00 W"
    assert len(found) == len(nvidia.QUERY)


@pytest.fixture
def corpus(tmp_path):
    pq.write_table(pa.table({"text": SENTENCES}), tmp_path / "corpus.parquet")
    return tmp_path / "corpus.parquet"


def test_the_command_on_the_cpu(bundle, encoders, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table, "RESULTS", tmp_path / "results")
    throughput.main(bundle.path, corpus, "here", encoders["gte"], documents=5, bf16=False)
    result = json.loads((tmp_path / "results" / "here.json").read_text())
    rows = [row["what"] for row in result["rows"]]
    assert rows[:4] == ["reference", "reference", "engine", "end_to_end"] and rows[-1] == "feed"
    assert result["settings"]["documents"] == 5 and "gpu" not in result["machine"]
    assert all(row["score_difference"] < 1e-4 for row in result["rows"][2:4])
    assert capsys.readouterr().out.splitlines()[-1].endswith("here.json")


def test_a_gpu_that_is_not_there_is_refused_before_anything_is_measured(bundle, encoders, corpus, monkeypatch):
    def choose(*_):
        raise DeviceError("the NVIDIA driver shows no GPU")

    monkeypatch.setattr(throughput, "choose", choose)
    with pytest.raises(typer.BadParameter, match="no GPU"):
        throughput.main(bundle.path, corpus, "here", encoders["gte"], device="cuda")
    with pytest.raises(typer.BadParameter, match="--encoder"):
        throughput.main(bundle.path, corpus, "here", device="cuda")
