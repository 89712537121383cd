"""Is libjql as fast as the Python Engine on the same graph, and what do several callers of one engine give?

Method. Documents of the corpus, longest cut to the bundle's max_tokens, texts to scores. Each round runs, in turn, the
Engine and libjql with 1, 2 and 4 calling threads on one engine, each thread with its share of the documents; the median
round counts. Both use all cores. libjql is called through ctypes, which holds no lock meanwhile: a call lasts seconds,
and what Python adds to it microseconds. Each row has the largest difference of a score to the Engine's. The memory that
opening the bundle takes is measured in a process of its own, and stands beside the size of the weights.

    python -m benchmarks.native --bundle BUNDLE --corpus CORPUS.parquet --name NAME [--variant cpu-fp32]

The last line of stdout is the path of the JSON it wrote, benchmarks/results/NAME.json.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import typer
from numpy.typing import NDArray

from benchmarks.table import Row, print_rows, write_result
from jql_engine.bundle import Bundle
from jql_engine.engine import Engine
from tests.native.binding import NativeEngine

CALLERS = (1, 2, 4)


def main(
    bundle: Annotated[Path, typer.Option()],
    corpus: Annotated[Path, typer.Option(help="Parquet with a column `text`.")],
    name: Annotated[str, typer.Option(help="Of the result file.")],
    variant: Annotated[str, typer.Option()] = "cpu-fp32",
    documents: Annotated[int, typer.Option()] = 300,
    characters: Annotated[int | None, typer.Option(help="Of each document, at most; by default all.")] = None,
    rounds: Annotated[int, typer.Option()] = 3,
) -> None:
    """Measure and write benchmarks/results/NAME.json."""
    memory = _memory(bundle, variant)
    texts = pq.read_table(corpus)["text"].to_pylist()
    texts = [text[:characters] for text in texts[:: max(1, len(texts) // documents)][:documents]]
    python = Engine(Bundle.open(bundle), device="cpu", variant=variant)
    expected = python.score(texts)
    n_tokens = int(expected.n_tokens.sum())
    rows = [Row("engine", "Engine", variant, len(texts), n_tokens)]
    rows += [Row("libjql", f"{n} calling threads", variant, len(texts), n_tokens) for n in CALLERS]
    with NativeEngine(bundle, variant=variant) as engine:
        for _ in range(rounds):
            started = time.perf_counter()
            python.score(texts)
            rows[0].seconds.append(round(time.perf_counter() - started, 3))
            for row, n_callers in zip(rows[1:], CALLERS, strict=True):
                started = time.perf_counter()
                found = _score(engine, texts, n_callers)
                row.seconds.append(round(time.perf_counter() - started, 3))
                row.score_difference = float(np.abs(found - expected.values).max())
    for row in rows:
        row.finish()
    print_rows(rows)
    print(f"resident after opening: {memory}")
    print(write_result(name, rows, {"corpus": corpus.name, "rounds": rounds, **memory}))


def _score(engine: NativeEngine, texts: Sequence[str], n_callers: int) -> NDArray[np.float32]:
    """Scores by `n_callers` threads, each with every n-th document."""
    with ThreadPoolExecutor(n_callers) as pool:
        parts = list(pool.map(lambda i: engine.shared().score(texts[i::n_callers]).values, range(n_callers)))
    found = np.empty((len(texts), len(engine.heads)), np.float32)
    for i, part in enumerate(parts):
        found[i::n_callers] = part
    return found


def _memory(bundle: Path, variant: str) -> dict[str, Any]:
    """MiB that opening adds, anonymous and in all, beside the files of the graph."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_open, args=(theirs, bundle, variant))
    process.start()
    anonymous, resident = ours.recv()
    process.join()
    graph = bundle / Bundle.open(bundle).manifest.variants[variant].graph
    weights = sum(file.stat().st_size for file in graph.parent.glob(f"{graph.stem}.*")) >> 20
    return {"weights_mib": weights, "opened_resident_mib": resident, "opened_anonymous_mib": anonymous}


def _open(pipe: multiprocessing.connection.Connection, bundle: Path, variant: str) -> None:
    before = _resident()
    with NativeEngine(bundle, variant=variant):
        after = _resident()
    pipe.send([after[i] - before[i] for i in (0, 1)])


def _resident() -> tuple[int, int]:
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) >> 10, int(fields["VmRSS"].split()[0]) >> 10


if __name__ == "__main__":
    typer.run(main)
