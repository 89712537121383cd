"""What a process does in a recorder's environment; each returns what JSON can say.

    python -m tests.recorded.scenarios NAME '{"argument": ...}'

prints it as its last line.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cuda.bindings.runtime as cudart
import numpy as np
import pyarrow as pa

from benchmarks.gpu.kernel import Resident
from jql_engine.bundle import Bundle
from jql_engine.data import Batch, DocumentBatch, TokenBatch
from jql_engine.engine import Engine
from jql_engine.errors import EngineError
from jql_engine.sessions.base import Session, execute
from jql_engine.sessions.certify import Tolerance, certify, read_probes
from jql_engine.sessions.cuda.layouts import carve, fields_of, pack, used_bytes
from jql_engine.sessions.cuda.provider import load
from jql_engine.sessions.cuda.session import open_cuda
from jql_engine.sessions.gpu import Gpu
from jql_engine.sessions.open import open_session
from jql_engine.sessions.select import Choice, choose
from jql_engine.tokenizer import Tokenizer
from tests.recorder import Record


def batch_of(lengths: list[int], seed: int = 0, layout: str = "packed") -> Batch:
    """Documents of random ids."""
    offsets = np.cumsum([0, *lengths], dtype=np.int32)
    ids = np.random.default_rng(seed).integers(5, 100, offsets[-1], dtype=np.int32)
    return Batch(np.arange(len(lengths)), ids, offsets, None if layout == "packed" else max(lengths))


def launches(bundle: str, variant: str, lengths: list[int]) -> dict[str, Any]:
    """The record of opening a session, and of the second batch of the same lengths."""
    record = Record()
    session = open_cuda(Bundle.open(bundle), variant)
    opening = record.take()
    for _ in range(2):
        record.take()
        output = session.run(batch_of(lengths, layout=session.budget.layout))
    return {"opening": opening, "batch": record.take(), "shapes": [output.scores.shape, output.embeddings.shape]}


def memory(bundle: str, variant: str, n_batches: int) -> dict[str, Any]:
    """Bytes on the GPU once a session is open, and after each of many batches close to its budget."""
    record, rng = Record(), np.random.default_rng(0)
    session = open_cuda(Bundle.open(bundle), variant)
    before, used = record.used(), []
    for _ in range(n_batches):
        longest = min(int(rng.lognormal(6, 1)) + 5, 8192)
        n_docs = session.budget.tokens // longest
        lengths = rng.integers(longest - longest // 20, longest + 1, n_docs).tolist()
        session.run(batch_of(lengths, layout=session.budget.layout))
        used.append(record.used())
    return {"budget": session.budget.tokens, "before": before, "used": used}


def shortage(bundle: str, budget: int, lengths: list[int]) -> dict[str, Any]:
    """What a session of too large a budget does, and whether its output is that of all documents."""
    record = Record()
    try:
        session = open_cuda(Bundle.open(bundle), "cuda-fp16", budget=budget)
    except EngineError as error:
        return {"error": str(error)}
    after_opening, used = session.budget.tokens, record.used()
    refused = sum(line.startswith("refused") for line in record.take())
    output = session.run(batch_of(lengths))
    return {
        "refused": refused,
        "budget": after_opening,
        "used": used,
        "later": [sum(line.startswith("refused") for line in record.take()), session.budget.tokens],
        "documents": len(output.scores),
    }


def overflow(bundle: str, lengths: list[int], fills: list[int], budget: int | None = None) -> dict[str, Any]:
    """What becomes of documents of which the fp16 graph, and then that in fp32, gives what their memory holds."""
    os.environ["RECORDER_FILL"] = str(fills[0])
    session = open_cuda(Bundle.open(bundle), "cuda-fp16", budget=budget)
    os.environ["RECORDER_FILL"] = str(fills[1])
    try:
        output = session.run(batch_of(lengths))
    except EngineError as error:
        return {"error": str(error)}
    return {"again": session.n_overflowed, "finite": bool(np.isfinite(output.embeddings).all())}


def uploads(bundle: str, n_docs: int) -> dict[str, int]:
    """Batches through two threads, and which of their inputs arrived on the GPU as they were packed."""
    record, lengths = Record(), np.random.default_rng(1).integers(1, 90, n_docs)
    session = open_cuda(Bundle.open(bundle), "cuda-fp16", budget=512)
    n_before = len(record.kept())
    docs = batch_of(lengths.tolist())
    tokens = TokenBatch(docs.rows, docs.ids, docs.offsets.astype(np.int64), np.zeros(n_docs, np.bool_))
    batches = [batch for batch, _ in execute(session, tokens)]
    copies = record.kept()[n_before:]
    return {"batches": len(batches), "copies": len(copies), "arrived": sum(arrived(b, copies) for b in batches)}


def under_way(bundle: str, n_docs: int) -> list[int]:
    """How many batches the GPU has before it, each time another was handed over."""
    record = Record()
    session = open_cuda(Bundle.open(bundle), "cuda-fp16", budget=8192)
    docs = batch_of([8192] * n_docs)
    tokens = TokenBatch(docs.rows, docs.ids, docs.offsets.astype(np.int64), np.zeros(n_docs, np.bool_))
    record.take()
    list(execute(session, tokens))
    found, n = [], 0
    for line in record.take():
        if line.startswith("copy async kind=1"):
            n += 1
            found.append(n)
        n -= line.startswith("reached")
    return found


def arrived(batch: Batch, copies: list[bytes]) -> bool:
    """Whether one of the copies is what a batch is packed to."""
    fields, room = fields_of(batch), np.zeros(1 << 20, np.uint8)
    packed = pack(batch, room)
    for content in copies:
        if len(content) == used_bytes(fields):
            found = carve(np.frombuffer(content, np.uint8), fields)
            if all(np.array_equal(found[name], array) for name, array in packed.items()):
                return True
    return False


def second_gpu(bundle: str) -> list[int]:
    """Bytes on both GPUs once a session is open on the second."""
    record = Record()
    session = open_cuda(Bundle.open(bundle), "cuda-fp16", 1)
    session.run(batch_of([5, 70]))
    return [record.used(0), record.used(1)]


def engine(bundle: str, device: str, texts: list[str]) -> dict[str, Any]:
    """An engine on one of two GPUs: the device it names, what it scores, bytes on each."""
    record = Record()
    engine = Engine(bundle, device=device, variant="cuda-fp16")
    scores = engine.score(texts)
    return {
        "shape": scores.values.shape,
        "n_tokens": scores.n_tokens.tolist(),
        "used": [record.used(0), record.used(1)],
    }


def closed(bundle: str) -> dict[str, Any]:
    """Bytes on the second GPU while a session lives, and when it is gone, and what the thread's GPU is then."""
    record = Record()
    session = open_cuda(Bundle.open(bundle), "cuda-fp16", 1)
    session.run(batch_of([5, 70]))
    alive = record.used(1)
    Gpu(0)
    del session
    gc.collect()
    return {"alive": alive, "gone": record.used(1), "device": cudart.cudaGetDevice()[1]}


def certified(bundle: str) -> list[int]:
    """Bytes on the GPU once a session is certified, its fallback too, and once one is open that ran the same alone."""
    record, opened, used = Record(), Bundle.open(bundle), []
    session: Session = open_session(opened, Choice(("cuda:0",), "cuda-fp16"), "cuda:0")
    used.append(record.used())
    del session
    session = open_cuda(opened, "cuda-fp16")
    certify(session, *read_probes(opened), Tolerance(**opened.manifest.variants["cuda-fp16"].tolerance))
    return [*used, record.used()]


def chosen(bundle: str, tolerance: float | None = None) -> str:
    """What is taken where nothing is asked for."""
    try:
        return choose(Bundle.open(bundle), "auto", tolerance=tolerance).variant
    except EngineError as error:
        return str(error)


def benchmark(bundle: str, texts: list[str]) -> list[dict[str, Any]]:
    """Our rows of the GPU benchmark; their times are those of launching."""
    from benchmarks.gpu import measure as gpu

    opened = Bundle.open(bundle)
    tokens = Tokenizer.of(opened).encode(DocumentBatch.of(pa.array(texts, pa.large_string())))
    sample = gpu.Sample(Path(bundle), opened, texts, tokens, "cuda:0")
    cases = gpu.engines(sample, [8192], [])
    for case in cases:
        gpu.time_case(case, tokens)
    rows = [row for case in cases for row in case.rows]
    for row in rows:
        row.finish()
    return [asdict(row) for row in [*rows, *gpu.profiles(sample, rows)]]


def alternatives(encoder: str, bundle: str, lengths: list[int]) -> dict[str, Any]:
    """The kernels that each of benchmarks.gpu.alternatives launches for a batch, with their blocks; and its rows."""
    from benchmarks.gpu import alternatives
    from jql_export.families.read import read_encoder

    record, opened, weights, launched = Record(), Bundle.open(bundle), read_encoder(Path(encoder)), {}
    with tempfile.TemporaryDirectory() as folder:
        for name, file in alternatives.write_alternatives(Path(folder), weights, opened):
            gpu = Gpu(0)
            case = Resident(load(file, 0, gpu.stream), [batch_of(lengths)], "cuda", 0, gpu.synchronize)
            case.run()
            record.take()
            case.run()
            launched[name] = record.take()
    docs = batch_of(lengths)
    tokens = TokenBatch(docs.rows, docs.ids, docs.offsets.astype(np.int64), np.zeros(len(lengths), np.bool_))
    (rows,) = alternatives.measure(weights, opened, tokens, 0, [8192], 2)
    return {"launched": launched, "rows": [asdict(row) for row in rows]}


def loading_error(file: str) -> str:
    """Why a graph is not loaded."""
    try:
        load(Path(file), 0, Gpu(0).stream)
    except EngineError as error:
        return str(error)
    return ""


def opening_error(bundle: str, variant: str) -> str:
    """Why a session does not open."""
    try:
        open_cuda(Bundle.open(bundle), variant)
    except EngineError as error:
        return str(error)
    return ""


SCENARIOS: dict[str, Callable[..., Any]] = {
    scenario.__name__: scenario
    for scenario in (
        launches,
        memory,
        shortage,
        overflow,
        uploads,
        under_way,
        second_gpu,
        engine,
        closed,
        certified,
        chosen,
        benchmark,
        alternatives,
        loading_error,
        opening_error,
    )
}

if __name__ == "__main__":
    sys.stdout.write(json.dumps(SCENARIOS[sys.argv[1]](**json.loads(sys.argv[2]))) + "\n")
