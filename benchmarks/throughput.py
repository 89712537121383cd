"""Tokens per second of the reference and of this engine: same documents, same run, same machine.

Method. A sample of real documents (every length at its own frequency, see corpus.py) is tokenized once. Each encoder
is loaded, runs the two shortest documents to warm up, and is then timed on all of them; `--rounds` repeats the whole
table, so that a slow minute of a shared machine hits every row, and the median of a row's rounds is reported.
Tokens are real ones: padding is work, not throughput. What is compared:

    reference   transformers, fp32 and bf16: sorted by length and padded to batches of 8,192 tokens; one at a time
    engine      the graphs of a bundle, ids to scores, planned by jql_engine.batching
    end_to_end  jql-run's own pipeline, parquet to parquet, scores included
    feed        the same pipeline with a session that returns zeros: read, tokenise, plan, write (cold: no text twice)
    ceiling     a large fp32 matrix product with the engine's library and with torch's: what the chip can give

    python benchmarks/throughput.py --encoder DIR --bundle BUNDLE --corpus CORPUS.parquet --name NAME

The last line of stdout is the path of the JSON it wrote, benchmarks/results/NAME.json: machine, versions, date, rows.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer

from benchmarks.corpus import sample
from jql_engine.bundle import Bundle
from jql_engine.data import Batch, BatchOutput, Budget, TokenBatch
from jql_engine.engine import Engine
from jql_engine.progress import Meter, RunLog
from jql_engine.run import Job, prepare, run
from jql_engine.sessions import CHUNK_BYTES, Session
from jql_engine.tokens import Tokenizer
from jql_engine.worker import Worker

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jql-engine", "onnxruntime", "onnxruntime-gpu", "torch", "transformers", "tokie", "tokenizers", "pyarrow")
ISA = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
MEAN_TOKENS = 690  # documents per minute are given at the published mean, so that corpora can be compared


@dataclass(slots=True)
class Row:
    """One line of the table."""

    what: str  # reference | engine | end_to_end | feed | ceiling
    name: str
    variant: str
    documents: int
    tokens: int
    seconds: list[float] = field(default_factory=list)
    tokens_per_second: float = 0.0
    documents_per_minute: float = 0.0  # at MEAN_TOKENS
    gflops: float = 0.0  # of a ceiling
    peak_memory_mib: int = 0  # resident, where a row has a process of its own
    stages: dict[str, dict[str, float]] = field(default_factory=dict)  # shares of the time, of a pipeline

    def finish(self) -> None:
        """Fill in the rates from the median of the rounds."""
        self.tokens_per_second = round(self.tokens / statistics.median(self.seconds), 1)
        self.documents_per_minute = round(self.tokens_per_second * 60 / MEAN_TOKENS, 1)


class ZeroSession:
    """Takes batches as a GPU session would, and computes nothing."""

    variant = "zero"

    def __init__(self, bundle: Bundle) -> None:
        self.budget = Budget(65_536, "packed")
        self._n_heads, self._width = len(bundle.heads), bundle.manifest.encoder.hidden_size

    def run(self, batch: Batch) -> BatchOutput:
        """Zeros."""
        n_docs = len(batch.rows)
        return BatchOutput(np.zeros((n_docs, self._n_heads), np.float32), np.zeros((n_docs, self._width), np.float32))


def main(
    bundle: Annotated[Path, typer.Option()],
    corpus: Annotated[Path, typer.Option(help="Parquet with a column `text`.")],
    name: Annotated[str, typer.Option(help="Of the result file.")],
    encoder: Annotated[Path | None, typer.Option(help="Its checkpoint; without it no reference rows.")] = None,
    documents: Annotated[int, typer.Option(help="In the sample.")] = 24,
    max_tokens: Annotated[int, typer.Option(help="Longest document of the sample.")] = 8_192,
    rounds: Annotated[int, typer.Option()] = 1,
    bf16: Annotated[bool, typer.Option(help="Time bf16 as well; slow where the CPU has no bf16 instructions.")] = True,
    feed: Annotated[bool, typer.Option(help="Time the feed on the whole corpus.")] = True,
) -> None:
    """Measure and write benchmarks/results/NAME.json."""
    opened = Bundle.open(bundle)
    texts, tokens = sample(corpus, documents, Tokenizer.of(opened), max_tokens)
    cases = [*(_references(encoder, opened, bf16) if encoder else []), *_engines(bundle, texts)]
    rows = [Row(what, case, variant, len(texts), len(tokens.ids)) for what, case, variant, _ in cases]
    for _ in range(rounds):
        for row, (*_, load) in zip(rows, cases, strict=True):
            _time(row, load(), tokens)
    ceilings = _ceilings()
    for row in rows:
        row.finish()
    rows += ceilings
    if feed:
        rows.append(_feed(opened, corpus))
    print_rows(rows)
    write_result(
        name, rows, {"corpus": corpus.name, "documents": documents, "max_tokens": max_tokens, "rounds": rounds}
    )


Run = Callable[[TokenBatch], object]
Case = tuple[str, str, str, Callable[[], Run]]


def _references(encoder: Path, bundle: Bundle, bf16: bool) -> list[Case]:
    import torch

    from benchmarks.reference import TransformersEncoder

    def load(dtype: torch.dtype, budget: int) -> Callable[[], Run]:
        def loaded() -> Run:
            model = TransformersEncoder(encoder, bundle.manifest.pooling, dtype)
            return lambda tokens: model.embed(tokens, budget)

        return loaded

    types = [("fp32", torch.float32), *([("bf16", torch.bfloat16)] if bf16 else [])]
    layouts = [("transformers, sorted and padded to 8,192 tokens", 8_192), ("transformers, one at a time", 1)]
    return [("reference", layout, kind, load(dtype, n)) for kind, dtype in types for layout, n in layouts]


def _engines(bundle: Path, texts: list[str]) -> list[Case]:
    opened = Bundle.open(bundle)
    names = [name for name, variant in opened.manifest.variants.items() if variant.provider == "cpu"]

    def engine(variant: str) -> Run:
        return Engine(bundle, device="cpu", variant=variant).score_tokens

    def end_to_end(variant: str) -> Run:
        loaded = Engine(bundle, device="cpu", variant=variant)

        def job(tokens: TokenBatch) -> object:
            if len(tokens.rows) != len(texts):
                return loaded.score_tokens(tokens)  # the warm-up
            with tempfile.TemporaryDirectory() as folder:
                source = Path(folder, "documents.parquet")
                pq.write_table(pa.table({"text": texts}), source)
                task = Job((str(source),), Path(folder, "scores"))
                return run_job(task, opened, loaded.session, loaded.tokenizer, "cpu")

        return job

    cases: list[Case] = []
    for name in names:
        cases.append(("engine", "jql-engine, ids to scores", name, lambda name=name: engine(name)))
        cases.append(("end_to_end", "jql-engine, parquet to parquet", name, lambda name=name: end_to_end(name)))
    return cases


def run_job(job: Job, bundle: Bundle, session: Session, tokenizer: Tokenizer, provider: str) -> Meter:
    """What jql-run does with one worker, on any session, in chunks as for `provider`."""
    work = prepare(job, bundle, next(iter(bundle.manifest.variants)), CHUNK_BYTES[provider])
    meter = Meter(work.n_docs)
    worker = Worker(bundle, session, tokenizer, dict(enumerate(work.targets)))
    outcome = run(work, worker.run(work.tasks), meter, RunLog(None))
    assert not outcome.unfinished
    return meter


def _time(row: Row, run_case: Run, tokens: TokenBatch) -> None:
    shortest = np.sort(np.argsort(tokens.lengths, kind="stable")[:2])
    run_case(_take(tokens, shortest))
    start = time.perf_counter()
    run_case(tokens)
    row.seconds.append(round(time.perf_counter() - start, 3))
    print(f"{row.what:10} {row.name} {row.variant}: {row.tokens / row.seconds[-1]:,.0f} tokens/s", flush=True)


def _take(tokens: TokenBatch, index: np.ndarray) -> TokenBatch:
    ids = np.concatenate([tokens.ids[tokens.offsets[i] : tokens.offsets[i + 1]] for i in index])
    offsets = np.concatenate([[0], np.cumsum(tokens.lengths[index])])
    return TokenBatch(np.arange(len(index)), ids, offsets, tokens.truncated[index])


def _feed(bundle: Bundle, corpus: Path) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        task = Job((str(corpus),), Path(folder, "scores"))
        session, tokenizer = ZeroSession(bundle), Tokenizer.of(bundle)
        meter = run_job(task, bundle, session, tokenizer, "cuda")
    row = Row("feed", "read, tokenise, plan, write", "zero", meter.documents, meter.tokens, [round(meter.seconds, 3)])
    row.finish()
    return row


def _ceilings() -> list[Row]:
    """GFLOP/s of x [2048, 768] times w [768, 3072]."""
    n, k, m = 2048, 768, 3072
    x, w = np.random.default_rng(0).standard_normal((2, n * m), np.float32)
    x, w = x[: n * k].reshape(n, k), w[: k * m].reshape(k, m)
    rows = []
    for name, product in (("onnxruntime", _onnx_product(w)), ("torch", _torch_product(w))):
        product(x)
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            product(x)
            seconds.append(time.perf_counter() - start)
        row = Row("ceiling", f"matrix product, {name}", "fp32", 0, 0, [round(s, 4) for s in seconds])
        row.gflops = round(2 * n * k * m / statistics.median(seconds) / 1e9, 1)
        rows.append(row)
    return rows


def _onnx_product(w: np.ndarray) -> Callable[[np.ndarray], object]:
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "product", [x], [y], [numpy_helper.from_array(w, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda value: session.run(None, {"x": value})


def _torch_product(w: np.ndarray) -> Callable[[np.ndarray], object]:
    import torch

    weight = torch.from_numpy(np.ascontiguousarray(w.T))
    return lambda value: torch.nn.functional.linear(torch.from_numpy(value), weight)


def print_rows(rows: list[Row]) -> None:
    """One line each."""
    for row in rows:
        rate = f"{row.gflops:12,.1f} GFLOP/s " if row.gflops else f"{row.tokens_per_second:12,.1f} tokens/s"
        print(f"{row.what:11}{row.name:50}{row.variant:15}{rate}")


def write_result(name: str, rows: list[Row], settings: dict[str, object]) -> None:
    """Write benchmarks/results/NAME.json and print its path."""
    result = {
        "schema": 1,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": _machine(),
        "versions": {package: v for package in PACKAGES if (v := _version(package))},
        "settings": settings,
        "rows": [asdict(row) for row in rows],
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(file)


def _machine() -> dict[str, object]:
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    fields = dict(line.split(":", 1) for line in info.split("\n\n")[0].splitlines() if ":" in line)
    known = {key.strip(): value.strip() for key, value in fields.items()}
    flags = known.get("flags", "").split()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": f"{known.get('model name', platform.processor())}, family {known.get('cpu family', '?')}",
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30, 1),
        "isa": [flag for flag in ISA if flag in flags],
        "python": platform.python_version(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    typer.run(main)
