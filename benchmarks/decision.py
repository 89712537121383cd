"""How long do exact thresholds take, in which memory, beside the same on whole columns?

Method. `--documents` rows (10 million) in `--files` files (1,000) are made from a seed: three correlated heads, seven
languages of 5 to 40 %, lengths. Each row of the table is a process of its own, whose peak resident memory the operating
system reports, pinned to two cores; `--rounds` repeats all in turn, and the median is reported. All of them must keep
the same documents: the run ends with an error if one does not.

    jql-cut       files to thresholds.json, as the command does it
    numpy         the files as whole columns by pyarrow, np.quantile by group, the rule, what it keeps
    pandas        the same by groupby
    duckdb        quantile_disc by group, joined with the files again
    numpy, keep   the common quantile on whole columns: ranks by sorting each group, the smallest one of each document

    python -m benchmarks.decision --name decision

The last line of stdout is the path of the JSON it wrote, benchmarks/results/NAME.json.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer

from benchmarks.table import Row, peak_memory_mib, write_result
from jql_engine.decision.cut import Sources, cut
from jql_engine.decision.result import Request

HEADS = ("gemma", "mistral", "llama")
COLUMNS = [f"score_{head}" for head in HEADS]
LANGUAGES = {"de": 0.2, "en": 0.4, "es": 0.1, "fr": 0.1, "ja": 0.05, "ru": 0.1, "zh": 0.05}
CORES = 2
QUANTILE, KEEP = 0.6, 0.4
Measured = Callable[[Path], int]  # folder of score files -> documents kept


@dataclass(slots=True)
class DecisionRow(Row):
    """One line of the table."""

    cpu_seconds: list[float] = field(default_factory=list)  # of all threads: other work on the machine hardly counts
    kept_documents: int = 0

    def rate(self) -> str:
        """For the table."""
        seconds, cpu = np.median(self.seconds), np.median(self.cpu_seconds)
        return f"{seconds:8.1f} s {cpu:8.1f} CPU s {self.peak_memory_mib:8,} MiB {self.kept_documents:12,} kept"


def main(
    name: Annotated[str, typer.Option(help="Of the result file.")],
    documents: Annotated[int, typer.Option()] = 10_000_000,
    files: Annotated[int, typer.Option()] = 1_000,
    rounds: Annotated[int, typer.Option()] = 3,
) -> None:
    """Measure and write benchmarks/results/NAME.json."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = _make(Path(folder), documents, files)
        rows = [
            DecisionRow("engine" if ours else "peer", case, "", documents, tokens) for case, (ours, _) in CASES.items()
        ]
        for _ in range(rounds):
            for row in rows:
                _measure(row, CASES[row.name][1], Path(folder))
                print(f"{row.name:50} {row.seconds[-1]:8.1f} s", flush=True)
    for row in rows:
        row.finish()
        print(f"{row.what:8}{row.name:50}{row.rate()}")
    _check_same(rows)
    settings: dict[str, object] = {"files": files, "rounds": rounds, "cores": CORES, "quantile": QUANTILE, "keep": KEEP}
    versions = {package: version(package) for package in ("numpy", "pandas", "duckdb")}
    print(write_result(name, rows, settings, versions=versions))


def _make(folder: Path, n_docs: int, n_files: int) -> int:
    """Write the score files; returns their tokens."""
    rng, total = np.random.default_rng(0), 0
    names = pa.array(list(LANGUAGES))
    for number in range(n_files):
        n = n_docs * (number + 1) // n_files - n_docs * number // n_files
        lang, quality = rng.choice(len(LANGUAGES), n, p=list(LANGUAGES.values())), rng.standard_normal(n)
        scores = [1.5 + 0.2 * lang + 0.64 * quality + 0.48 * rng.standard_normal(n) for _ in HEADS]
        n_tokens = np.minimum(8192, rng.lognormal(6, 1, n)).astype(np.int32)
        table = {column: one.astype(np.float32) for column, one in zip(COLUMNS, scores, strict=True)}
        group = pa.DictionaryArray.from_arrays(pa.array(lang.astype(np.int32)), names).cast(pa.string())
        pq.write_table(
            pa.table({"id": np.arange(n), **table, "n_tokens": n_tokens, "truncated": n_tokens == 8192, "lang": group}),
            folder / f"{number:04}.parquet",
            compression="zstd",
        )
        total += int(n_tokens.sum())
    return total


def _measure(row: DecisionRow, case: Measured, folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(theirs, case, folder))
    process.start()
    seconds, cpu_seconds, row.kept_documents, peak = ours.recv()
    process.join()
    row.seconds.append(round(seconds, 2))
    row.cpu_seconds.append(round(cpu_seconds, 2))
    row.peak_memory_mib = max(row.peak_memory_mib, peak)


def _run(result: multiprocessing.connection.Connection, case: Measured, folder: Path) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    began, cpu = time.perf_counter(), time.process_time()
    kept = case(folder)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    result.send((seconds, cpu, kept, peak_memory_mib()))


def _check_same(rows: list[DecisionRow]) -> None:
    """Raise where rows of one question kept different numbers of documents."""
    for question in (QUANTILE, KEEP):
        kept = {row.name: row.kept_documents for row in rows if f"{question} of documents" in row.name}
        assert len(set(kept.values())) == 1, kept


def _cut(request: Request, folder: Path) -> int:
    sources = Sources((str(folder),), tuple(COLUMNS), "lang")
    with tempfile.TemporaryDirectory() as out:
        return int(cut(sources, request, str(Path(out, "thresholds.json")))["kept_documents"])


def _numpy(folder: Path) -> int:
    table = pq.read_table(folder, columns=[*COLUMNS, "n_tokens", "lang"])
    lang = table["lang"].dictionary_encode().unify_dictionaries().combine_chunks().indices.to_numpy()
    kept = np.ones(len(lang), np.bool_)
    for column in COLUMNS:
        scores = table[column].to_numpy()
        for group in range(lang.max() + 1):
            here = lang == group
            kept[here] &= scores[here] >= np.quantile(scores[here], [QUANTILE], method="inverted_cdf")
    return int(kept.sum())


def _pandas(folder: Path) -> int:
    frame = pq.read_table(folder, columns=[*COLUMNS, "n_tokens", "lang"]).to_pandas()

    def quantile(scores: Any) -> Any:
        return np.quantile(scores, [QUANTILE], method="inverted_cdf")[0]

    thresholds = frame.groupby("lang")[COLUMNS].transform(quantile)
    return int((frame[COLUMNS] >= thresholds).all(axis=1).sum())


def _duckdb(folder: Path) -> int:
    import duckdb

    quantiles = ", ".join(f"quantile_disc({column}, {QUANTILE}) AS t_{column}" for column in COLUMNS)
    rule = " AND ".join(f"{column} >= t_{column}" for column in COLUMNS)
    files = f"read_parquet('{folder}/*.parquet')"
    connection = duckdb.connect(config={"threads": CORES})
    found = connection.execute(
        f"WITH t AS (SELECT lang, {quantiles} FROM {files} GROUP BY lang) "
        f"SELECT count(*), sum(n_tokens) FROM {files} JOIN t USING (lang) WHERE {rule}"
    ).fetchone()
    assert found is not None
    return int(found[0])


def _numpy_keep(folder: Path) -> int:
    table = pq.read_table(folder, columns=[*COLUMNS, "lang"])
    lang = table["lang"].dictionary_encode().unify_dictionaries().combine_chunks().indices.to_numpy()
    last = np.ones(len(lang))  # the quantile up to which a document is kept
    for column in COLUMNS:
        scores = table[column].to_numpy()
        for group in range(lang.max() + 1):
            here = np.flatnonzero(lang == group)
            ordered = np.sort(scores[here])
            last[here] = np.minimum(last[here], np.searchsorted(ordered, scores[here], side="right") / len(here))
    target = int(np.ceil(KEEP * len(last)))
    return int((last >= np.partition(last, len(last) - target)[len(last) - target]).sum())


CASES: dict[str, tuple[bool, Measured]] = {  # and whether it is ours
    f"jql-cut, quantile {QUANTILE} of documents": (True, partial(_cut, Request("all", quantile=QUANTILE))),
    f"jql-cut, quantile {QUANTILE} of tokens": (True, partial(_cut, Request("all", "tokens", quantile=QUANTILE))),
    f"jql-cut, keep {KEEP} of documents": (True, partial(_cut, Request("all", keep=KEEP))),
    f"jql-cut, keep {KEEP} of tokens": (True, partial(_cut, Request("all", "tokens", keep=KEEP))),
    f"numpy, quantile {QUANTILE} of documents": (False, _numpy),
    f"pandas, quantile {QUANTILE} of documents": (False, _pandas),
    f"duckdb, quantile {QUANTILE} of documents": (False, _duckdb),
    f"numpy, keep {KEEP} of documents": (False, _numpy_keep),
}

if __name__ == "__main__":
    typer.run(main)
