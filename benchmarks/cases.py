"""What the throughput benchmark shares on every device: a case is timed, its scores are held against the oracle's."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file
from scipy.stats import spearmanr

from benchmarks.table import Row
from jql_engine.bundle import READOUTS, Bundle
from jql_engine.data import TokenBatch, score_column
from jql_engine.job.finish import run
from jql_engine.job.plan import Job
from jql_engine.job.progress import Meter, RunLog
from jql_engine.job.scoring import prepare
from jql_engine.job.worker import Worker
from jql_engine.readouts import Readouts
from jql_engine.sessions.base import CHUNK_BYTES, Session
from jql_engine.tokenizer import Tokenizer
from jql_export.readouts.base import Readout
from jql_export.readouts.head_file import jql_head
from jql_export.tensors import Linear

ORACLE = ("reference", "transformers, one at a time", "fp32")
Run = Callable[[TokenBatch], np.ndarray | None]  # scores [N, H] in the order of the documents


def time_once(row: Row, run_case: Run, tokens: TokenBatch, warm_up: TokenBatch) -> np.ndarray | None:
    """Scores of `tokens`; their seconds go into the row, those of `warm_up` do not."""
    run_case(warm_up)
    start = time.perf_counter()
    found = run_case(tokens)
    took = time.perf_counter() - start
    row.seconds.append(round(took, 3) or took)
    print(f"{row.what:10} {row.name} {row.variant}: {row.tokens / row.seconds[-1]:,.0f} tokens/s", flush=True)
    return found


def compare(row: Row, found: np.ndarray | None, expected: np.ndarray | None, heads: tuple[str, ...]) -> None:
    """Largest difference and Spearman's rank correlation of the scores [N, H] of a row, to those of the oracle."""
    if found is None or expected is None or found is expected:
        return
    row.score_difference = float(f"{np.abs(found - expected).max():.2e}")
    ranks = [float(spearmanr(found[:, i], expected[:, i])[0]) for i in range(len(heads))]
    row.spearman = dict(zip(heads, [round(rank, 6) for rank in ranks], strict=True))


def heads_of(bundle: Bundle) -> list[Readout]:
    """JQL's heads of a bundle, in their order, to write graphs with."""
    tensors = load_file(bundle.path / READOUTS)

    def layer(name: str) -> Linear:
        return Linear(tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    heads = bundle.manifest.readouts
    return [jql_head(head.name, layer(f"{head.name}.0"), layer(f"{head.name}.1"), head.sha256) for head in heads]


def scored(bundle: Bundle, embeddings: np.ndarray) -> np.ndarray:
    """The bundle's heads in fp32."""
    return Readouts.of(bundle).score(embeddings)


class EndToEnd:
    """A parquet file of documents, and its scores through jql-run's own pipeline, parquet to parquet."""

    def __init__(
        self, bundle: Bundle, session: Session, tokenizer: Tokenizer, texts: list[str], chunk_bytes: int
    ) -> None:
        """Write the documents."""
        self._how = bundle, session, tokenizer, chunk_bytes
        self._folder = tempfile.TemporaryDirectory()
        self._source = Path(self._folder.name, "documents.parquet")
        pq.write_table(pa.table({"text": texts}), self._source)

    def run(self) -> np.ndarray:
        """Scores [N, H]."""
        bundle = self._how[0]
        with tempfile.TemporaryDirectory() as out:
            run_job(Job((str(self._source),), Path(out)), *self._how)
            written = pq.read_table(Path(out, self._source.name))
            return np.stack([written[score_column(head)].to_numpy() for head in bundle.heads], axis=1)


def run_job(job: Job, bundle: Bundle, session: Session, tokenizer: Tokenizer, chunk: str | int) -> Meter:
    """What jql-run does with one worker, on any session; chunks of so many bytes, or as for a kind of device."""
    chunk_bytes = CHUNK_BYTES[chunk] if isinstance(chunk, str) else chunk
    work = prepare(job, bundle, next(iter(bundle.manifest.variants)), chunk_bytes)
    meter = Meter(work.n_docs)
    worker = Worker(bundle, session, tokenizer, dict(enumerate(work.outputs)), work.claim)
    outcome = run(work, worker.run(work.tasks), meter, RunLog(None))
    work.release()
    assert not outcome.unfinished
    return meter


def take(tokens: TokenBatch, index: np.ndarray) -> TokenBatch:
    """Some documents, numbered anew."""
    ids = np.concatenate([tokens.ids[tokens.offsets[i] : tokens.offsets[i + 1]] for i in index])
    offsets = np.concatenate([[0], np.cumsum(tokens.lengths[index])])
    return TokenBatch(np.arange(len(index)), ids, offsets, tokens.truncated[index])
