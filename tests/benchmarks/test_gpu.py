"""benchmarks.gpu.measure on the CPU, from the first case to the table; what needs a GPU is replaced."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.cases import ORACLE
from benchmarks.gpu import measure as gpu
from benchmarks.gpu.jql import JqlPipeline
from benchmarks.gpu.nvidia import gpu_ceilings
from benchmarks.gpu.profile import Profile
from benchmarks.table import print_rows
from jql_engine.data import Budget, DocumentBatch
from jql_engine.engine import as_texts
from jql_engine.tokenizer import Tokenizer
from jql_export.probes import SENTENCES
from tests.benchmarks.test_throughput import GIB, RAGGED, engine_row


@pytest.fixture
def sample_on_cpu(encoders, bundle):
    texts = list(SENTENCES[:6])
    tokens = Tokenizer.of(bundle).encode(DocumentBatch.of(as_texts(texts)))
    return gpu.Sample(encoders["gte"], bundle, texts, tokens, "cpu")


class Shrinking:
    """A session that runs out of memory on the way, and whose documents overflow."""

    def __init__(self):
        self.budget, self.n_overflowed = Budget(4096, "packed"), 5

    def run(self, tokens):
        self.budget, self.n_overflowed = Budget(1024, "packed"), self.n_overflowed + 2


def test_a_row_says_what_memory_allowed_and_how_many_documents_overflowed_in_it():
    row, session = engine_row("cuda-fp16 4k", 1.0), Shrinking()
    row.budget_tokens = 4096
    run = gpu._noted(row, session, session.run)
    run(RAGGED)
    run(RAGGED)
    assert (row.budget_tokens, row.overflowed) == (1024, 2)
    assert row.note == "memory allows 1,024 tokens a batch"


def test_batches_of_the_graph_alone_hold_the_budget_that_memory_allows(sample_on_cpu, monkeypatch):
    sample = replace(sample_on_cpu, device="cuda:1")
    info = sample.bundle.manifest.variants["cpu-fp32"]
    packed_info = replace(info, layout="packed", precision="fp16", provider="cuda")
    monkeypatch.setitem(sample.bundle.manifest.variants, "cuda-fp16", packed_info)
    made = []

    class Recorded:
        def __init__(self, session, batches, device, number, synchronize, pad_id):
            made.append((batches, device, number))

    monkeypatch.setattr(gpu, "Resident", Recorded)
    monkeypatch.setattr(gpu, "Gpu", lambda _: SimpleNamespace(stream=7, synchronize=None, free_bytes=lambda: GIB))
    monkeypatch.setattr(gpu.onnxruntime_cuda, "load", lambda *_: None)
    case = gpu.Case([sample.row("kernel", "jql-engine", "cuda-fp16 64k", 64)], lambda _: [])
    gpu._kernel(sample, case, "cuda-fp16", 64)
    ((batches, device, number),) = made
    assert (device, number, case.rows[0].budget_tokens) == ("cuda", 1, 64)
    assert sum(batch.n_tokens for batch in batches) == len(sample.tokens.ids) and len(batches) > 1
    assert all(batch.n_tokens <= 64 or len(batch.rows) == 1 for batch in batches)


def test_a_run_from_the_first_case_to_the_table(sample_on_cpu, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "runnable", lambda *_: ["cpu-fp32"])
    monkeypatch.setattr(gpu, "gpu_ceilings", lambda device: gpu_ceilings(device, 128, (128, 64, 128), 1 << 20))
    kept = []
    rows = gpu.gpu_rows(sample_on_cpu, [8192], [], 2, keep=lambda rows: kept.append([row.what for row in rows]))
    print_rows(rows)
    assert [row.what for row in rows] == kept[-1]
    assert kept[0] == ["reference", *["ceiling"] * 4] and kept[1] == ["reference", "kernel", *["ceiling"] * 4]
    ours = {row.what: row for row in rows if row.variant == "cpu-fp32"}
    assert ours.keys() == {"kernel", "engine", "end_to_end"}
    for row in ours.values():
        assert len(row.seconds) == 2 and row.mfu > 0 and row.to_reference > 0, row
    assert ours["engine"].score_difference < 1e-4 and ours["end_to_end"].score_difference < 1e-4
    loops = [row for row in rows if row.name.startswith("JQL's loop")]
    assert [row.variant for row in loops] == ["bf16, 6", "bf16, 6"]
    assert max(row.to_reference for row in loops) == 1 and all(row.score_difference < 1 for row in loops)
    assert (rows[0].what, rows[0].name, rows[0].variant) == ORACLE and rows[0].score_difference is None


def test_no_case_begins_when_the_time_is_up(sample_on_cpu, monkeypatch):
    monkeypatch.setattr(gpu, "runnable", lambda *_: ["cpu-fp32"])
    monkeypatch.setattr(gpu, "gpu_ceilings", lambda device: gpu_ceilings(device, 128, (128, 64, 128), 1 << 20))
    rows = gpu.gpu_rows(sample_on_cpu, [8192], [], 1, ends=0.0)
    assert {row.note for row in rows if row.what != "ceiling"} == {gpu.NO_TIME}
    assert not any(row.seconds for row in rows if row.what != "ceiling")


def test_a_row_that_was_timed_once_is_a_row_where_there_was_no_time_for_more(sample_on_cpu):
    case = gpu.Case([sample_on_cpu.row("engine", "jql-engine", "cuda-fp16")], lambda _: [])
    case.rows[0].seconds = [1.0]
    gpu.skip(case)
    assert case.rows[0].note == ""


def test_a_row_that_was_timed_does_not_fail_with_the_next_of_its_case(sample_on_cpu):
    def broken(tokens):
        raise ValueError("broken")

    case = gpu.Case(
        [sample_on_cpu.row(what, "jql-engine", "cuda-fp16") for what in ("engine", "end_to_end")],
        lambda _: [lambda tokens: np.zeros((len(tokens.rows), 2)), broken],
    )
    gpu.time_case(case, sample_on_cpu.tokens)
    engine, whole = case.rows
    assert engine.seconds and not engine.note and whole.note == "failed: ValueError: broken"


def test_what_does_not_fit_and_what_fails_are_rows(sample_on_cpu, monkeypatch):
    scores = JqlPipeline.scores

    def short_of_memory(self, tokens, n_docs):
        if self.layout == "padded" and n_docs > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if self.layout == "varlen":
            raise TypeError("varlen_attn() got an unexpected keyword")
        return scores(self, tokens, n_docs)

    monkeypatch.setattr(JqlPipeline, "scores", short_of_memory)
    loops = [case for case in gpu.references(sample_on_cpu) if case.rows[0].name.startswith("JQL's loop")]
    cases = [gpu.oracle(sample_on_cpu), *loops]
    for case in cases:
        gpu.time_case(case, sample_on_cpu.tokens)
    rows = [(row.variant, row.note) for row in gpu.finished(sample_on_cpu, cases, 1.0, 1.0)][1:]
    assert rows == [
        ("bf16, 1000", "failed: TypeError: varlen_attn() got an unexpected keyword"),
        ("bf16, 6", "out of memory"),
        ("bf16, 3", "out of memory"),
        ("bf16, 1", ""),
    ]


def test_profiles_are_made_at_the_best_budget(sample_on_cpu, monkeypatch):
    asked = []

    def fake(path, variant, device, batches):
        asked.append((variant, sum(batch.n_tokens for batch in batches)))
        return Profile(
            {"MatMul": {"seconds": 2.0, "share": 1.0, "nodes": 1, "gigabytes": 1.0, "teraflop": 1.0}},
            {"CUDAExecutionProvider": 1},
            {},
        )

    info = sample_on_cpu.bundle.manifest.variants["cpu-fp32"]
    monkeypatch.setitem(
        sample_on_cpu.bundle.manifest.variants, "cuda-fp16", replace(info, layout="packed", provider="cuda")
    )
    monkeypatch.setattr(gpu, "profile", fake)
    rows = []
    for budget, speed in ((64, 10.0), (128, 20.0)):
        for what in ("kernel", "engine"):
            row = sample_on_cpu.row(what, "jql-engine", f"cuda-fp16 {budget}", budget)
            row.seconds, row.tokens_per_second = [1.0], speed
            rows.append(row)
    (found,) = gpu.profiles(sample_on_cpu, rows)
    assert asked == [("cuda-fp16", len(sample_on_cpu.tokens.ids))]
    assert (found.variant, found.budget_tokens, found.tokens) == ("cuda-fp16 128", 128, asked[0][1])
    assert found.nodes == {"CUDAExecutionProvider": 1}
