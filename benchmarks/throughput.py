"""Tokens per second of the reference and of this engine: same documents, same run, same machine.

Method. A sample of real documents (every length at its own frequency, see corpus.py) is tokenized once. Each encoder
is loaded, runs the two shortest documents to warm up, and is then timed on all of them; `--rounds` repeats the whole
table, so that a slow minute of a shared machine hits every row, and the median of a row's rounds is reported.
Tokens are real ones: padding is work, not throughput. What is compared:

    reference   transformers, fp32 and bf16: sorted by length and padded to batches of 8,192 tokens; one at a time
    engine      the graphs of a bundle, ids to scores, planned by jql_engine.batching
    end_to_end  jql-run's own pipeline, parquet to parquet, scores included
    feed        the same pipeline with a session that returns zeros: read, tokenize, plan, write (cold: no text twice)
    ceiling     a large matrix product with the engine's libraries and with torch: what the chip can give

Scores are compared too: every row's largest difference to the fp32 reference of the same run, and Spearman's rank
correlation for each head. A reference row scores with the bundle's heads, in fp32.

    python -m benchmarks.throughput --encoder DIR --bundle BUNDLE --corpus CORPUS.parquet --name NAME

With `--device cuda` the same documents go through one GPU; its rows, and what they are compared with, are described in
benchmarks.gpu.measure.

The last line of stdout is the path of the JSON it wrote, benchmarks/results/NAME.json: machine, versions, date, rows.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.cases import ORACLE, EndToEnd, Run, compare, run_job, scored, take, time_once
from benchmarks.ceilings import ceilings
from benchmarks.corpus import sample
from benchmarks.table import Row, print_rows, write_result
from jql_engine.bundle import Bundle
from jql_engine.data import Batch, BatchOutput, Budget, TokenBatch
from jql_engine.engine import Engine
from jql_engine.errors import EngineError
from jql_engine.job.plan import Job
from jql_engine.sessions.base import CHUNK_BYTES
from jql_engine.sessions.select import choose, runnable
from jql_engine.tokenizer import Tokenizer

DOCUMENTS = {"cpu": 24, "cuda": 4_000}


class ZeroSession:
    """Takes batches as a GPU session would, and computes nothing."""

    variant = "zero"
    n_parallel = 1
    n_overflowed = 0

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
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    documents: Annotated[int | None, typer.Option(help="In the sample; by default 24, 4,000 on a GPU.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest document of the sample.")] = 8_192,
    rounds: Annotated[int, typer.Option()] = 1,
    bf16: Annotated[bool, typer.Option(help="Time bf16 as well; slow where the CPU has no bf16 instructions.")] = True,
    feed: Annotated[bool, typer.Option(help="Time the feed on the whole corpus.")] = True,
    budget: Annotated[list[int] | None, typer.Option(help="Tokens of a batch, on a GPU; repeat.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help="Only these of ours; repeat.")] = None,
    seconds: Annotated[float | None, typer.Option(help="On a GPU: after so many, no case begins.")] = None,
) -> None:
    """Measure and write benchmarks/results/NAME.json."""
    opened = Bundle.open(bundle)
    device = _one_device(opened, device, encoder)
    documents = documents or DOCUMENTS[device.partition(":")[0]]
    texts, tokens = sample(corpus, documents, Tokenizer.of(opened), max_tokens)
    ends = math.inf if seconds is None else time.monotonic() + seconds
    settings = {"corpus": corpus.name, "documents": documents, "max_tokens": max_tokens, "rounds": rounds}
    gpu: dict[str, Any] = {}

    def write(rows: Sequence[Row]) -> Path:
        return write_result(name, rows, settings, **gpu)

    rows: list[Row]
    if device == "cpu":
        cases = [*(_references(encoder, opened, bf16) if encoder else []), *_engines(bundle, texts, variant or [])]
        rows = [*_measure(cases, texts, tokens, rounds, opened.heads), *ceilings(bf16)]
    else:
        from benchmarks.gpu.measure import BUDGETS, Sample, gpu_rows
        from benchmarks.gpu.nvidia import gpu_machine, gpu_versions

        assert encoder is not None
        gpu |= {"gpu": gpu_machine(device), "versions": gpu_versions()}
        whole = Sample(encoder, opened, texts, tokens, device)
        rows = [*gpu_rows(whole, budget or list(BUDGETS), variant or [], rounds, ends, write)]
    if feed and time.monotonic() < ends:
        rows.append(_feed(opened, corpus))
    print_rows(rows)
    print(write(rows))


def _one_device(bundle: Bundle, device: str, encoder: Path | None) -> str:
    """The device itself, cpu or cuda:N."""
    if device == "cpu":
        return device
    if encoder is None:
        raise typer.BadParameter("a GPU is measured against the reference: give --encoder as well")
    try:
        return choose(bundle, device).devices[0]
    except EngineError as error:
        raise typer.BadParameter(str(error)) from error


Case = tuple[str, str, str, Callable[[], Run]]


def _measure(cases: list[Case], texts: list[str], tokens: TokenBatch, rounds: int, heads: tuple[str, ...]) -> list[Row]:
    rows = [Row(what, case, variant, len(texts), len(tokens.ids)) for what, case, variant, _ in cases]
    shortest = take(tokens, np.sort(np.argsort(tokens.lengths, kind="stable")[:2]))
    scores: dict[tuple[str, str, str], np.ndarray] = {}
    for _ in range(rounds):
        for row, (*key, load) in zip(rows, cases, strict=True):
            found = time_once(row, load(), tokens, shortest)
            if found is not None:
                scores[key[0], key[1], key[2]] = found
    for row in rows:
        row.finish()
        compare(row, scores.get((row.what, row.name, row.variant)), scores.get(ORACLE), heads)
    return rows


def _references(encoder: Path, bundle: Bundle, bf16: bool) -> list[Case]:
    import torch

    from benchmarks.reference import TransformersEncoder

    def load(dtype: torch.dtype, budget: int) -> Callable[[], Run]:
        def loaded() -> Run:
            model = TransformersEncoder(encoder, bundle.manifest.pooling, dtype)
            return lambda tokens: scored(bundle, model.embed(tokens, budget))

        return loaded

    types = [("fp32", torch.float32), *([("bf16", torch.bfloat16)] if bf16 else [])]
    layouts = [("transformers, sorted and padded to 8,192 tokens", 8_192), ("transformers, one at a time", 1)]
    return [("reference", layout, kind, load(dtype, n)) for kind, dtype in types for layout, n in layouts]


def _engines(bundle: Path, texts: list[str], wanted: list[str]) -> list[Case]:
    opened = Bundle.open(bundle)
    names = [name for name in runnable(opened, "cpu") if name in (wanted or [name])]

    def engine(variant: str) -> Run:
        loaded = Engine(bundle, device="cpu", variant=variant)
        return lambda tokens: loaded.score_tokens(tokens).values

    def whole(variant: str) -> Run:
        loaded = Engine(bundle, device="cpu", variant=variant)
        timed = EndToEnd(opened, loaded.session, loaded.tokenizer, texts, CHUNK_BYTES["cpu"])

        def job(tokens: TokenBatch) -> np.ndarray | None:
            if len(tokens.rows) != len(texts):
                return loaded.score_tokens(tokens).values  # the warm-up
            return timed.run()

        return job

    cases: list[Case] = []
    for name in names:
        cases.append(("engine", "jql-engine, ids to scores", name, lambda name=name: engine(name)))
        cases.append(("end_to_end", "jql-engine, parquet to parquet", name, lambda name=name: whole(name)))
    return cases


def _feed(bundle: Bundle, corpus: Path) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        task = Job((str(corpus),), Path(folder, "scores"))
        session, tokenizer = ZeroSession(bundle), Tokenizer.of(bundle)
        meter = run_job(task, bundle, session, tokenizer, "cuda")
    row = Row("feed", "read, tokenize, plan, write", "zero", meter.documents, meter.tokens, [round(meter.seconds, 3)])
    row.finish()
    return row


if __name__ == "__main__":
    typer.run(main)
