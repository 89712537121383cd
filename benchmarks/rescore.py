"""How many documents a second get new heads from stored vectors, and how many does the matrix product allow?

Method. Random unit vectors in fp16, as many as `--documents`, are written as jql-run --embeddings writes them: in
chunks of 20,000 rows, then joined. They do not compress, which real ones hardly do either. Then jql-rescore's own
function applies each bundle's heads, parquet to parquet; `--rounds` repeats all rows in turn, and the median is
reported. The ceilings are the larger one of the two products alone, [4096, D] times [D, K], in fp32, in the same round:
with numpy, which jql-rescore uses, and with ONNX Runtime. K is the hidden size of all heads of a bundle together.

    rescore     vectors to scores, parquet to parquet; gflops are those of both products at that speed
    ceiling     the product alone; documents a second are what it would allow if it were all there is to do

The heads of JQL have a hidden size of 1,000. What 1,000,000 documents/s would need stands in the settings, for each
bundle: where that is more than the ceiling, no program reaches it on this machine in fp32.

    env -u OPENBLAS_CORETYPE python -m benchmarks.rescore --bundle BUNDLE --bundle SMALL --name NAME

The last line of stdout is the path of the JSON it wrote, benchmarks/results/NAME.json.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer

from benchmarks.ceilings import onnx_product
from benchmarks.table import Row, write_result
from jql_engine.bundle import Bundle
from jql_engine.data import Scores
from jql_engine.job.launch import rescore
from jql_engine.job.plan import Job
from jql_engine.job.progress import RunLog
from jql_engine.job.scoring import prepare
from jql_engine.readouts import BLOCK_ROWS, Readouts
from jql_engine.sessions.base import CHUNK_BYTES

MILLION = 1_000_000
PRODUCTS = 8  # a ceiling's rounds: one product is short


def main(
    bundle: Annotated[list[Path], typer.Option(help="With heads; repeat.")],
    name: Annotated[str, typer.Option(help="Of the result file.")],
    documents: Annotated[int, typer.Option()] = 300_000,
    rounds: Annotated[int, typer.Option()] = 3,
) -> None:
    """Measure and write benchmarks/results/NAME.json."""
    with tempfile.TemporaryDirectory() as folder:
        cases = [case for i, path in enumerate(bundle) for case in _cases(path, Path(folder, str(i)), documents)]
        for _ in range(rounds):
            for case in cases:
                case.row.seconds.append(round(case.time(), 4))
                print(
                    f"{case.row.what:8} {case.row.name}: {case.rate(case.row.seconds[-1]):,.0f} documents/s", flush=True
                )
        rows = [case.finish() for case in cases]
    needed = {case.heads: round(case.flop * MILLION / 1e9, 1) for case in cases if case.row.what == "rescore"}
    for row in rows:
        print(
            f"{row.what:8} {row.name:75} {row.documents_per_minute / 60:12,.0f} documents/s {row.gflops:8,.1f} GFLOP/s"
        )
    coretype = os.environ.get("OPENBLAS_CORETYPE", "as detected")
    print(write_result(
        name,
        rows,
        {
            "documents": documents, "rounds": rounds, "embeddings": "fp16", "openblas_coretype": coretype,
            "gflops_for_1_000_000_documents_per_second": needed,
        },
    ))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """A row of the table, and how to time it."""

    row: Row
    heads: str  # their sizes, in words
    flop: int  # for one document
    time: Callable[[], float]  # seconds for the row's documents

    def rate(self, seconds: float) -> float:
        """Documents a second."""
        return self.row.documents / seconds

    def finish(self) -> Row:
        """The row with its rates; documents are counted as they are here, not at a mean length in tokens."""
        rate = self.rate(statistics.median(self.row.seconds))
        self.row.documents_per_minute = round(60 * rate, 1)
        self.row.gflops = round(self.flop * rate / 1e9, 1)
        return self.row


def _cases(path: Path, folder: Path, n_docs: int) -> list[Case]:
    bundle = Bundle.open(path)
    weight = np.concatenate([chain[0].weight for chain in Readouts.of(bundle).chains], axis=1)
    width, hidden = weight.shape
    n_heads = len(bundle.heads)
    words = f"{n_heads} heads, {hidden:,} hidden together, on {width}"
    _write_vectors(bundle, folder, n_docs)
    first, both = 2 * width * hidden, 2 * hidden * (width + n_heads)
    x = _unit_vectors(np.random.default_rng(0), BLOCK_ROWS, width).astype(np.float32)
    out = np.empty((BLOCK_ROWS, hidden), np.float32)
    onnx = onnx_product(weight)
    products: list[tuple[str, Callable[[], object]]] = [
        ("numpy", lambda: np.matmul(x, weight, out=out)),
        ("onnxruntime", lambda: onnx(x)),
    ]
    return [
        Case(Row("rescore", words, "fp32", n_docs, 0), words, both, lambda: _rescore(bundle, folder)),
        *(
            Case(
                Row("ceiling", f"matrix product, {library}; {words}", "fp32", BLOCK_ROWS * PRODUCTS, 0),
                words,
                first,
                lambda product=product: _repeated(product),
            )
            for library, product in products
        ),
    ]


def _rescore(bundle: Bundle, folder: Path) -> float:
    with tempfile.TemporaryDirectory(dir=folder) as out:
        job = Job((str(folder / "vectors"),), out)
        start = time.perf_counter()
        rescore(job, bundle, 1, RunLog(None), threading.Event())
        return time.perf_counter() - start


def _repeated(product: Callable[[], object]) -> float:
    product()
    start = time.perf_counter()
    for _ in range(PRODUCTS):
        product()
    return time.perf_counter() - start


def _write_vectors(bundle: Bundle, folder: Path, n_docs: int) -> None:
    """FOLDER/vectors, as a job with --embeddings fp16 leaves it; the scores in it are zeros."""
    (folder / "in").mkdir(parents=True)
    pq.write_table(pa.table({"id": range(n_docs), "text": ["x"] * n_docs}), folder / "in/documents.parquet")
    job = Job((str(folder / "in"),), folder / "vectors", embeddings="fp16")
    work = prepare(job, bundle, next(iter(bundle.manifest.variants)), CHUNK_BYTES["cuda"])
    rng = np.random.default_rng(0)
    for task in work.tasks:
        for segment in task.chunk.segments:
            n = segment.stop - segment.start
            vectors = _unit_vectors(rng, n, bundle.manifest.encoder.hidden_size)
            zeros = np.zeros((n, len(bundle.heads)), np.float32)
            scores = Scores(bundle.heads, zeros, np.ones(n, np.int32), np.zeros(n, bool), np.ones(n, bool), vectors)
            ids = pa.chunked_array([pa.array(range(segment.start, segment.stop))])
            work.outputs[segment.file].commit(segment, scores.to_table(), ids)
    for output in work.outputs:
        output.assemble()
    work.release()


def _unit_vectors(rng: np.random.Generator, n: int, width: int) -> np.ndarray:
    vectors = rng.standard_normal((n, width), np.float32)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


if __name__ == "__main__":
    typer.run(main)
