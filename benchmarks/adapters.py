"""Tokens per second through datatrove and through Ray Data, beside jql-run's: what do the adapters cost?

Method. The first `--documents` documents with text of a real corpus are written to one parquet file. It is then scored
from parquet to parquet, with the same bundle, variant and number of threads, by

    jql-run      jql_engine.job.launch.score, one worker; reads text and id, writes id and scores
    datatrove    LocalPipelineExecutor, one task: ParquetReader, JQLAnnotator, ParquetWriter; carries all columns along
    Ray Data     read_parquet, score_dataset with one actor, write_parquet; carries all columns along

`--rounds` repeats all three in turn, so that a slow minute of a shared machine hits each of them. A rate is that of the
median round, a ratio the median of the rounds' ratios to jql-run; where others load the machine, many rounds of fewer
documents compare better than few long ones. Each path is warmed up by a file of one document. That file is timed in
every round as well: what it takes is the start-up (checking the bundle's hashes, loading the graph; with Ray a new
process that imports everything, in a cluster that runs already), the same for a job of any length. So there are two
rows each: the whole job, and the job less its start-up, which is what a long job comes to.

The scores of the three are compared, document by document, and must be equal to 1e-5.

    python -m benchmarks.adapters --bundle BUNDLE --corpus CORPUS.parquet --name NAME

The last line of stdout is the path of the JSON it wrote, benchmarks/results/NAME.json; see throughput.py.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import typer
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.writers import ParquetWriter

from benchmarks.table import Row, write_result
from jql_engine.bundle import Bundle
from jql_engine.data import DocumentBatch
from jql_engine.engine import as_texts
from jql_engine.integrations.datatrove import JQLAnnotator
from jql_engine.integrations.ray import score_dataset
from jql_engine.job.launch import Machine, score
from jql_engine.job.plan import Job
from jql_engine.job.progress import RunLog
from jql_engine.sessions.base import SessionOptions
from jql_engine.sessions.select import choose
from jql_engine.tokenizer import Tokenizer

EQUAL = 1e-5  # scores of one document in different batches
BASE = "jql-run"
LOGICAL_CPUS = 4  # of the Ray cluster: those of the actor, and some for the tasks that read and write


@dataclass(slots=True)
class Way:
    """One way from parquet to parquet."""

    name: str
    run: Callable[[Path, Path], None]  # (source file, output folder)
    whole: list[float] = field(default_factory=list)  # seconds, one per round
    start: list[float] = field(default_factory=list)
    scores: dict[str, list[float]] = field(default_factory=dict)  # by document


def main(
    bundle: Annotated[Path, typer.Option()],
    corpus: Annotated[Path, typer.Option(help="Parquet with columns `text` and `id`.")],
    name: Annotated[str, typer.Option(help="Of the result file.")],
    documents: Annotated[int, typer.Option()] = 400,
    rounds: Annotated[int, typer.Option()] = 2,
    threads: Annotated[int, typer.Option(help="Of each path.")] = 2,
) -> None:
    """Measure and write benchmarks/results/NAME.json."""
    opened = Bundle.open(bundle)
    paths = [
        Way(BASE, lambda source, out: _jql_run(bundle, threads, source, out)),
        Way("datatrove", lambda source, out: _datatrove(bundle, threads, source, out)),
        Way("Ray Data", lambda source, out: _ray(bundle, threads, source, out)),
    ]
    _start_ray()
    with tempfile.TemporaryDirectory() as folder:
        one, many = _sources(corpus, documents, Path(folder))
        n_tokens = Tokenizer.of(opened).encode(_texts(many)).offsets[-1]
        for path in paths:
            _timed(path, one)
        for _ in range(rounds):
            for path in paths:
                path.start.append(_timed(path, one))
                path.whole.append(_timed(path, many))
                print(f"{path.name:10} start-up {path.start[-1]:.2f} s, all {path.whole[-1]:.2f} s", flush=True)
    ray.shutdown()
    variant = choose(opened, "cpu").variant
    rows = [row for path in paths for row in _rows(path, variant, documents, int(n_tokens))]
    settings = {"corpus": corpus.name, "documents": documents, "rounds": rounds, "threads": threads}
    versions = {package: version(package) for package in ("datatrove", "ray")}
    found = {"ratios": _ratios(rows), "largest_score_difference": _check(paths)}
    print(write_result(name, rows, settings | versions | found))


def _sources(corpus: Path, n_docs: int, folder: Path) -> tuple[Path, Path]:
    """The file of one document and the file of all."""
    table = pq.read_table(corpus)
    table = table.filter(pc.not_equal(table["text"], "")).slice(0, n_docs)
    assert table.num_rows == n_docs, f"{corpus} has only {table.num_rows} documents with text"
    files = folder / "one" / "documents.parquet", folder / "many" / "documents.parquet"
    for file, rows in zip(files, (table.slice(0, 1), table), strict=True):
        file.parent.mkdir()
        pq.write_table(rows, file)
    return files


def _timed(path: Way, source: Path) -> float:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        path.run(source, Path(folder))
        seconds = time.perf_counter() - start
        path.scores = _scores(Path(folder))
    return round(seconds, 3)


def _jql_run(bundle: Path, threads: int, source: Path, out: Path) -> None:
    job, machine = Job((str(source),), out), Machine("cpu", workers=1, options=SessionOptions(threads=threads))
    summary = score(job, Bundle.open(bundle), machine, RunLog(None), threading.Event())
    assert not summary["unfinished"]


def _datatrove(bundle: Path, threads: int, source: Path, out: Path) -> None:
    steps = [
        ParquetReader(str(source.parent), glob_pattern="*.parquet"),
        JQLAnnotator(bundle=bundle, device_overwrite="cpu", threads=threads),
        ParquetWriter(str(out / "data"), expand_metadata=True),
    ]
    LocalPipelineExecutor(steps, tasks=1, workers=1, logging_dir=str(out / "logs")).run()


def _ray(bundle: Path, threads: int, source: Path, out: Path) -> None:
    scored = score_dataset(ray.data.read_parquet(str(source)), bundle=bundle, num_cpus=threads)
    scored.write_parquet(str(out))


def _start_ray() -> None:
    ray.init(num_cpus=LOGICAL_CPUS, include_dashboard=False, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False


def _texts(source: Path) -> DocumentBatch:
    return DocumentBatch.of(as_texts(pq.read_table(source)["text"]))


def _scores(out: Path) -> dict[str, list[float]]:
    """Scores of every document, by its id."""
    found = [pq.read_table(file) for file in sorted(out.rglob("*.parquet"))]
    rows = pa.concat_tables(found).to_pylist()
    heads = sorted(name for name in rows[0] if name.startswith("score_"))
    return {row["id"]: [row[head] for head in heads] for row in rows}


def _rows(path: Way, variant: str, n_docs: int, n_tokens: int) -> tuple[Row, Row]:
    net = [round(whole - start, 3) for whole, start in zip(path.whole, path.start, strict=True)]
    rows = (
        Row("end_to_end", path.name, variant, n_docs, n_tokens, path.whole),
        Row("end_to_end", f"{path.name}, less start-up", variant, n_docs, n_tokens, net),
    )
    for row in rows:
        row.finish()
    return rows


def _ratios(rows: list[Row]) -> dict[str, float]:
    """Of each row's speed to that of jql-run's row of the same kind, round by round, the median; printed as well."""
    ratios = {}
    for i, row in enumerate(rows):
        pairs = zip(rows[i % 2].seconds, row.seconds, strict=True)
        ratios[row.name] = round(statistics.median(base / seconds for base, seconds in pairs), 3)
        print(f"{row.name:25}{row.tokens_per_second:12,.1f} tokens/s   {ratios[row.name]:.3f} of {BASE}")
    return ratios


def _check(paths: list[Way]) -> float:
    """The largest difference between two paths' scores of a document."""
    base = paths[0].scores
    assert all(path.scores.keys() == base.keys() for path in paths)
    values = np.array([[path.scores[document] for document in base] for path in paths])
    largest = float(np.ptp(values, axis=0).max())
    assert largest <= EQUAL, f"scores differ by {largest}"
    return float(f"{largest:.2e}")


if __name__ == "__main__":
    typer.run(main)
