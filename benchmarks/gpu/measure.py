"""The throughput of one NVIDIA GPU: `python -m benchmarks.throughput --device cuda`.

Method. The sample is the one of benchmarks.throughput (real documents, up to 8,192 tokens, in a fixed random order, the
order of arrival). Everything runs in one process, one case at a time, each on a GPU that the others have left; a case
is warmed up on the first documents and then timed on all of them. What is compared:

    reference   the oracle: transformers, fp32, one document at a time
                JQL's loop: transformers, bf16, 1,000 documents in the order of arrival and its heads, without padding
                (torch.nn.attention.varlen) and padded (sdpa). Where a batch does not fit, a row says so and the batch
                is halved, as its users do. `to_reference` is the ratio to the faster of the two. cuDNN's attention
                is off: it builds a plan for every new shape, and every batch has another
                sentence-transformers, bf16, sorted by length, from texts to scores; where it is installed
    kernel      ours: the graph alone, every batch on the GPU beforehand (TensorRT: within the session, copies included)
    engine      ours: ids to scores, jql_engine.sessions.base.execute
    end_to_end  ours: parquet to parquet, jql-run's own pipeline, the sample in 8 chunks at least
    profile     time by op, nodes by provider, attention kernels: see benchmarks.gpu.profile
    ceiling     large matrix products with torch, and a copy on the device, by CUDA events

cuda-fp16 (packed) and cuda-bf16 (padded) run with every token budget; cuda-fp32, which is there for what overflows in
fp16, and TensorRT's graphs, whose buckets are built in, with their own.

MFU is tokens/s times the model's FLOP per token (benchmarks.figures), over the rate of the large fp16 product of the
same run. A case that fails is a row that says why; the others go on, unless it leaves the GPU unusable, so what is ours
comes before what it is compared with. What is measured is written after every case.
"""

from __future__ import annotations

import importlib.util
import math
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from benchmarks.cases import ORACLE, EndToEnd, Run, scored, take, time_once
from benchmarks.figures import LOOP, best_rows, compare_finite, flops_per_token, rate, record
from benchmarks.gpu.jql import Heads, JqlPipeline, Layout, arrivals, free_memory, largest_that_fits, reason
from benchmarks.gpu.kernel import Resident, batches_of, spread
from benchmarks.gpu.nvidia import gpu_ceilings
from benchmarks.gpu.profile import padding_of, profile
from benchmarks.reference import SentenceEncoder, TransformersEncoder
from benchmarks.table import GpuRow, print_ops
from jql_engine.batching import plan_batches
from jql_engine.bundle import Bundle
from jql_engine.data import Batch, ScoreBatch, TokenBatch
from jql_engine.sessions.base import CHUNK_BYTES, Session, execute
from jql_engine.sessions.cuda import provider as onnxruntime_cuda
from jql_engine.sessions.cuda import session as cuda
from jql_engine.sessions.cuda.capacity import MAX_BATCH_TOKENS, token_budget
from jql_engine.sessions.gpu import Gpu
from jql_engine.sessions.open import open_variant
from jql_engine.sessions.select import runnable
from jql_engine.tokenizer import Tokenizer
from jql_export.families.base import read_config
from jql_export.families.jina_v3 import is_jina_v3
from jql_export.families.read import read_encoder

BUDGETS = (8_192, 16_384, 32_768, 65_536, 131_072)
ARRIVALS = 1_000  # documents in a batch of JQL's loop
SORTED_BATCH = 256  # documents in a batch of sentence-transformers, halved until the longest fit
WARM_UP = 1_000
CHUNKS = 8  # a real job has many, and reading one overlaps with computing another
PROFILED = 16  # batches
NO_TIME = "no time was left"


@dataclass(frozen=True, slots=True)
class Sample:
    """What every case runs on."""

    encoder: Path
    bundle: Bundle
    texts: list[str]
    tokens: TokenBatch
    device: str  # cuda:N

    @property
    def number(self) -> int:
        """Of the GPU."""
        return int(self.device.partition(":")[2])

    def row(self, what: str, name: str, variant: str, budget_tokens: int = 0) -> GpuRow:
        """A row of this sample."""
        return GpuRow(what, name, variant, len(self.texts), len(self.tokens.ids), budget_tokens=budget_tokens)


@dataclass(slots=True)
class Case:
    """What is loaded together, and the rows that are timed on it."""

    rows: list[GpuRow]
    load: Callable[[Case], list[Run]]  # one for each row
    n_warm: int = WARM_UP  # documents
    failures: tuple[GpuRow, ...] = ()  # what did not fit
    scores: list[np.ndarray | None] = field(init=False)  # of each row

    def __post_init__(self) -> None:
        self.scores = [None] * len(self.rows)


def gpu_rows(
    sample: Sample,
    budgets: list[int],
    variants: list[str],
    rounds: int,
    ends: float = math.inf,
    keep: Callable[[list[GpuRow]], object] = lambda _: None,
) -> list[GpuRow]:
    """Measure everything; see the module. No case begins past `ends`; `keep` is given what is there after each."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    limits = gpu_ceilings(sample.device)
    flops = _flops(sample)
    cases = [oracle(sample), *engines(sample, budgets, variants), *references(sample)]
    rows: list[GpuRow] = []
    for _ in range(rounds):
        for case in cases:
            if time.monotonic() < ends:
                time_case(case, sample.tokens)
            else:
                skip(case)
            rows = finished(sample, cases, flops, limits[0].gflops)
            keep([*rows, *limits])
    profiled: list[GpuRow] = []
    for row in profiles(sample, rows, ends):
        profiled.append(row)
        print_ops(row)
        keep([*rows, *profiled, *limits])
    return [*rows, *profiled, *limits]


def _flops(sample: Sample) -> float:
    """Of the model, for each token."""
    weights = read_encoder(sample.encoder)
    return flops_per_token(weights.spec, sample.tokens.lengths, sum(layer.windowed for layer in weights.layers))


def skip(case: Case) -> None:
    """Say of the rows that have no time yet why that is."""
    for row in case.rows:
        if not row.seconds:
            row.note = row.note or NO_TIME


def time_case(case: Case, tokens: TokenBatch) -> None:
    """Load a case, time its rows, keep what they score."""
    rounds = [len(row.seconds) for row in case.rows]
    try:
        _time_rows(case, tokens)
    except Exception as error:  # the rows of the other cases must not be lost
        traceback.print_exc()
        for row, n_before in zip(case.rows, rounds, strict=True):
            if len(row.seconds) == n_before:
                row.note = row.note or f"failed: {reason(error)}"
                print(f"{row.what:10} {row.name} {row.variant}: {row.note}", flush=True)
    free_memory()


def _time_rows(case: Case, tokens: TokenBatch) -> None:
    """What was loaded lives no longer than this call."""
    warm_up = take(tokens, np.arange(min(case.n_warm, len(tokens.rows))))
    for i, run in enumerate(case.load(case)):
        case.scores[i] = time_once(case.rows[i], run, tokens, warm_up)


def finished(sample: Sample, cases: list[Case], flops: float, matrix_gflops: float) -> list[GpuRow]:
    """The rows of the cases so far, with all that follows from times and scores; `flops`: of the model per token."""
    (expected,) = cases[0].scores  # the oracle's
    for case in cases:
        for row, found in zip(case.rows, case.scores, strict=True):
            row.finish()
            compare_finite(row, found, expected, sample.bundle.heads)
    rows = [row for case in cases for row in (*case.failures, *case.rows) if row.seconds or row.note]
    rate(rows, flops, matrix_gflops)
    return rows


# --- what users run today


def oracle(sample: Sample) -> Case:
    """What all scores are held against."""
    return Case([sample.row(*ORACLE)], lambda _: [_oracle(sample)], n_warm=8)


def references(sample: Sample) -> list[Case]:
    """JQL's loop without padding, sentence-transformers, and JQL's loop padded, which is the most likely to fail."""
    cases = [_loop(sample, "varlen", "padding removed")]
    if importlib.util.find_spec("sentence_transformers"):
        row = sample.row("reference", "sentence-transformers, sorted, from texts", f"bf16, {SORTED_BATCH}")
        cases.append(Case([row], lambda case: [_sentence_transformers(sample, case)]))
    else:
        print("sentence-transformers is not installed: its row is left out")
    return [*cases, _loop(sample, "padded", "padded, sdpa")]


def _loop(sample: Sample, layout: Layout, how: str) -> Case:
    row = sample.row("reference", f"{LOOP}, {how}", f"bf16, {ARRIVALS}")
    return Case([row], lambda case: [_jql(sample, case, layout)])


def _oracle(sample: Sample) -> Run:
    model = TransformersEncoder(sample.encoder, sample.bundle.manifest.pooling, torch.float32, sample.device)
    return lambda tokens: scored(sample.bundle, model.embed(tokens, 1))


def _jql(sample: Sample, case: Case, layout: Layout) -> Run:
    if is_jina_v3(read_config(sample.encoder)):
        raise RuntimeError("the adapters of jina-embeddings-v3 are computed on the CPU alone")
    model = JqlPipeline(sample.encoder, sample.bundle, torch.bfloat16, sample.device, layout)

    def largest_batch(n_docs: int) -> None:
        batches = arrivals(sample.tokens, n_docs)
        size = [batch.n_tokens + (batch.n_padding if layout == "padded" else 0) for batch in batches]
        start = int(np.argmax(size)) * n_docs
        model.scores(take(sample.tokens, np.arange(start, min(start + n_docs, len(sample.texts)))), n_docs)

    n_docs = _fit(sample, case, largest_batch, min(ARRIVALS, len(sample.texts)))
    return lambda tokens: model.scores(tokens, n_docs)


def _sentence_transformers(sample: Sample, case: Case) -> Run:
    manifest = sample.bundle.manifest
    model = SentenceEncoder(sample.encoder, manifest.pooling, manifest.max_tokens, torch.bfloat16, sample.device)
    heads = Heads(sample.bundle, torch.bfloat16, sample.device)

    def score(texts: list[str], n_docs: int) -> np.ndarray:
        return heads(model.embed(texts, n_docs)).float().cpu().numpy()

    longest = [sample.texts[i] for i in np.argsort(-sample.tokens.lengths, kind="stable")[:SORTED_BATCH]]
    n_docs = _fit(sample, case, lambda n: score(longest[:n], n), min(SORTED_BATCH, len(longest)))
    return lambda tokens: score(sample.texts[: len(tokens.rows)], n_docs)


def _fit(sample: Sample, case: Case, attempt: Callable[[int], object], n_docs: int) -> int:
    """The documents of a batch that fit; the case says so of what does not."""
    (row,) = case.rows
    fits, failures = largest_that_fits(attempt, n_docs)
    case.failures = tuple(sample.row(row.what, row.name, f"bf16, {n}") for n, _ in failures)
    for failed, (_, why) in zip(case.failures, failures, strict=True):
        failed.note = why
        print(f"{failed.what:10} {failed.name} {failed.variant}: {why}", flush=True)
    row.variant = f"bf16, {fits}"
    return fits


# --- ours


def engines(sample: Sample, budgets: list[int], variants: list[str]) -> list[Case]:
    """Kernel, engine and end to end of each variant and budget."""
    cases = []
    for variant in runnable(sample.bundle, "cuda"):
        if variants and variant not in variants:
            continue
        info = sample.bundle.manifest.variants[variant]
        sweep = budgets if info.provider == "cuda" and info.precision != "fp32" else [0]
        for budget in sweep:
            label = variant if not budget else f"{variant} {budget // 1024}k"
            kernel = sample.row("kernel", "jql-engine, the graph alone", label, budget)
            both = [
                sample.row("engine", "jql-engine, ids to scores", label, budget),
                sample.row("end_to_end", "jql-engine, parquet to parquet", label, budget),
            ]
            cases.append(Case([kernel], lambda case, v=variant, b=budget: [_kernel(sample, case, v, b)]))
            cases.append(Case(both, lambda case, v=variant, b=budget: _engine(sample, case, v, b)))
    return cases


def _engine(sample: Sample, case: Case, variant: str, budget: int) -> list[Run]:
    if sample.bundle.manifest.variants[variant].provider == "cuda":
        session: Session = cuda.open_cuda(sample.bundle, variant, sample.number, budget or None)
    else:
        session = open_variant(sample.bundle, variant, sample.device, report=print)
    chunk_bytes = min(CHUNK_BYTES["cuda"], sum(len(text.encode()) for text in sample.texts) // CHUNKS + 1)
    job = EndToEnd(sample.bundle, session, Tokenizer.of(sample.bundle), sample.texts, chunk_bytes)

    def engine(tokens: TokenBatch) -> np.ndarray:
        return score_tokens(session, tokens, len(sample.bundle.heads))

    def whole(tokens: TokenBatch) -> np.ndarray | None:
        return job.run() if len(tokens.rows) == len(sample.texts) else None  # warm from the row before

    return [_noted(row, session, run) for row, run in zip(case.rows, (engine, whole), strict=True)]


def _noted(row: GpuRow, session: Session, run: Run) -> Run:
    """`run`, and what became of the budget and how many documents overflowed in it, into the row."""

    def noted(tokens: TokenBatch) -> np.ndarray | None:
        before = session.n_overflowed
        found = run(tokens)
        if row.budget_tokens > session.budget.tokens:
            row.note = f"memory allows {session.budget.tokens:,} tokens a batch"
        row.budget_tokens, row.overflowed = session.budget.tokens, session.n_overflowed - before
        return found

    return noted


def score_tokens(session: Session, tokens: TokenBatch, n_heads: int) -> np.ndarray:
    """Scores [N, H] in the order of the documents."""
    scores = ScoreBatch.empty(tokens, n_heads)
    for batch, output in execute(session, tokens):
        scores.put(batch.rows, output)
    return scores.values


def _kernel(sample: Sample, case: Case, variant: str, budget: int) -> Run:
    info, manifest = sample.bundle.manifest.variants[variant], sample.bundle.manifest
    if info.provider != "cuda":
        return _within_session(open_variant(sample.bundle, variant, sample.device, report=print), sample)
    gpu = Gpu(sample.number)
    graph = onnxruntime_cuda.load(sample.bundle.graph(variant), sample.number, gpu.stream)
    width, itemsize = manifest.encoder.hidden_size, cuda.ITEM_BYTES[info.precision]
    fits = token_budget(gpu.free_bytes(), width, itemsize, budget or MAX_BATCH_TOKENS)
    batches = _batches(sample, variant, fits)
    case.rows[0].budget_tokens = fits
    pad_id = padding_of(sample.bundle, variant)
    resident = Resident(graph, batches, "cuda", sample.number, gpu.synchronize, pad_id)
    return lambda _: resident.run()  # to warm up as well: each batch that is larger than all before takes memory


def _batches(sample: Sample, variant: str, budget: int) -> list[Batch]:
    manifest = sample.bundle.manifest
    return batches_of(sample.tokens, budget, manifest.max_tokens, manifest.variants[variant].layout)


def _within_session(session: Session, sample: Sample) -> Run:
    batches = list(plan_batches(sample.tokens, session.budget))

    def run(tokens: TokenBatch) -> None:
        for batch in batches[:2] if len(tokens.rows) < len(sample.texts) else batches:
            session.run(batch)

    return run


# --- what the time goes to


def profiles(sample: Sample, rows: list[GpuRow], ends: float = math.inf) -> Iterator[GpuRow]:
    """A row for each variant of ONNX Runtime's, at its best budget; none begins past `ends`."""
    for best in best_rows(rows):
        variant = best.variant.partition(" ")[0]
        if sample.bundle.manifest.variants[variant].provider != "cuda":
            continue
        batches = spread(_batches(sample, variant, best.budget_tokens), PROFILED)
        row = GpuRow("profile", "jql-engine, op by op", best.variant, 0, 0, budget_tokens=best.budget_tokens)
        row.documents, row.tokens = sum(len(b.rows) for b in batches), sum(b.n_tokens for b in batches)
        kernel = next(r for r in rows if (r.what, r.variant) == ("kernel", best.variant))
        try:
            if time.monotonic() < ends:
                record(row, profile(sample.bundle.path, variant, sample.device, batches), kernel.tokens_per_second)
            else:
                row.note = NO_TIME
        except Exception as error:  # the rest is measured already
            traceback.print_exc()
            row.note = f"failed: {reason(error)}"
        yield row
