"""Tokens per second of the reference and of this engine: same documents, same run, same machine.

Method. A sample of real documents (every length at its own frequency, see corpus.py) is tokenized once. Each encoder
is loaded, runs the two shortest documents to warm up, and is then timed on all of them; `--rounds` repeats the whole
table, so that a slow minute of a shared machine hits every row, and the median of a row's rounds is reported.
Tokens are real ones: padding is work, not throughput. What is compared:

    reference   transformers, fp32 and bf16: sorted by length and padded to batches of 8,192 tokens; one at a time
    engine      the graphs of a bundle, ids to scores, planned by jql_engine.batching
    end_to_end  jql-run's own pipeline, parquet to parquet, scores included
    feed        the same pipeline with a session that returns zeros: read, tokenise, plan, write (cold: no text twice)
    ceiling     a large matrix product with the engine's libraries and with torch: what the chip can give

Scores are compared too: every row's largest difference to the fp32 reference of the same run, and Spearman's rank
correlation for each head. A reference row scores with the bundle's heads, in fp32.

    python -m benchmarks.throughput --encoder DIR --bundle BUNDLE --corpus CORPUS.parquet --name NAME

The last line of stdout is the path of the JSON it wrote, benchmarks/results/NAME.json: machine, versions, date, rows.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from safetensors.numpy import load_file
from scipy.stats import spearmanr

from benchmarks.ceilings import ceilings
from benchmarks.corpus import sample
from benchmarks.table import Row, print_rows, write_result
from jql_engine.bundle import Bundle
from jql_engine.data import Batch, BatchOutput, Budget, TokenBatch, score_column
from jql_engine.engine import Engine
from jql_engine.progress import Meter, RunLog
from jql_engine.run import Job, prepare, run
from jql_engine.sessions import CHUNK_BYTES, Session, runnable
from jql_engine.tokens import Tokenizer
from jql_engine.worker import Worker

ORACLE = ("reference", "transformers, one at a time", "fp32")


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
    scores: dict[tuple[str, str, str], np.ndarray] = {}
    for _ in range(rounds):
        for row, (*key, load) in zip(rows, cases, strict=True):
            found = _time(row, load(), tokens)
            if found is not None:
                scores[key[0], key[1], key[2]] = found
    for row in rows:
        row.finish()
        _compare(row, scores, opened.heads)
    rows += ceilings(bf16)
    if feed:
        rows.append(_feed(opened, corpus))
    print_rows(rows)
    write_result(
        name, rows, {"corpus": corpus.name, "documents": documents, "max_tokens": max_tokens, "rounds": rounds}
    )


Run = Callable[[TokenBatch], np.ndarray | None]  # scores [N, H] in the order of the documents
Case = tuple[str, str, str, Callable[[], Run]]


def _compare(row: Row, scores: dict[tuple[str, str, str], np.ndarray], heads: tuple[str, ...]) -> None:
    found, expected = scores.get((row.what, row.name, row.variant)), scores.get(ORACLE)
    if found is None or expected is None or found is expected:
        return
    row.score_difference = float(f"{np.abs(found - expected).max():.2e}")
    ranks = [float(spearmanr(found[:, i], expected[:, i])[0]) for i in range(len(heads))]
    row.spearman = dict(zip(heads, [round(rank, 6) for rank in ranks], strict=True))


def _references(encoder: Path, bundle: Bundle, bf16: bool) -> list[Case]:
    import torch

    from benchmarks.reference import TransformersEncoder

    def load(dtype: torch.dtype, budget: int) -> Callable[[], Run]:
        def loaded() -> Run:
            model = TransformersEncoder(encoder, bundle.manifest.pooling, dtype)
            return lambda tokens: _scored(bundle, model.embed(tokens, budget))

        return loaded

    types = [("fp32", torch.float32), *([("bf16", torch.bfloat16)] if bf16 else [])]
    layouts = [("transformers, sorted and padded to 8,192 tokens", 8_192), ("transformers, one at a time", 1)]
    return [("reference", layout, kind, load(dtype, n)) for kind, dtype in types for layout, n in layouts]


def _engines(bundle: Path, texts: list[str]) -> list[Case]:
    opened = Bundle.open(bundle)
    names = runnable(opened, "cpu")

    def engine(variant: str) -> Run:
        loaded = Engine(bundle, device="cpu", variant=variant)
        return lambda tokens: loaded.score_tokens(tokens).values

    def end_to_end(variant: str) -> Run:
        loaded = Engine(bundle, device="cpu", variant=variant)

        def job(tokens: TokenBatch) -> np.ndarray | None:
            if len(tokens.rows) != len(texts):
                return loaded.score_tokens(tokens).values  # the warm-up
            with tempfile.TemporaryDirectory() as folder:
                source = Path(folder, "documents.parquet")
                pq.write_table(pa.table({"text": texts}), source)
                task = Job((str(source),), Path(folder, "scores"))
                run_job(task, opened, loaded.session, loaded.tokenizer, "cpu")
                written = pq.read_table(Path(folder, "scores", source.name))
                return np.stack([written[score_column(head)].to_numpy() for head in opened.heads], axis=1)

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


def _scored(bundle: Bundle, embeddings: np.ndarray) -> np.ndarray:
    """The bundle's heads in fp32."""
    heads = load_file(bundle.path / "heads.safetensors")
    hidden = np.maximum(embeddings @ heads["hidden.weight"].T + heads["hidden.bias"], 0)
    return hidden @ heads["output.weight"] + heads["output.bias"]


def _time(row: Row, run_case: Run, tokens: TokenBatch) -> np.ndarray | None:
    shortest = np.sort(np.argsort(tokens.lengths, kind="stable")[:2])
    run_case(_take(tokens, shortest))
    start = time.perf_counter()
    found = run_case(tokens)
    row.seconds.append(round(time.perf_counter() - start, 3))
    print(f"{row.what:10} {row.name} {row.variant}: {row.tokens / row.seconds[-1]:,.0f} tokens/s", flush=True)
    return found


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


if __name__ == "__main__":
    typer.run(main)
