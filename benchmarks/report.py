"""jql-report over many rows: seconds, processor seconds, and the most memory that the process held.

    python -m benchmarks.report --work /tmp/report [--rows 10000000] [--files 1000]

Writes score files as jql-run does, with three heads that agree by half, twenty languages of unequal size, lengths,
truncation and a few nulls, once; then runs the installed jql-report on them, with --html and --json, as a process of
its own. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

HEADS = ("education", "prose", "facts")
GROUPS = 20
NULLS = 0.001  # share of documents


def main() -> None:
    """Make the files unless they are there, run, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the score files, some 30 bytes a row")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--files", type=int, default=1_000)
    given = parser.parse_args()
    scores = given.work / f"scores-{given.rows}-{given.files}"
    if not scores.exists():
        write_scores(scores, given.rows, given.files)
    print(
        json.dumps({"rows": given.rows, "files": given.files, "cores": len(os.sched_getaffinity(0)), **measure(scores)})
    )


def write_scores(folder: Path, n_rows: int, n_files: int) -> None:
    """Score files of one job; the same ones each time."""
    rng = np.random.default_rng(0)
    aside = folder.with_suffix(".writing")
    aside.mkdir(parents=True)
    sizes = np.diff(np.linspace(0, n_rows, n_files + 1).astype(int))
    for number, size in enumerate(sizes.tolist()):
        pq.write_table(_table(rng, number, size), aside / f"{number:05}.parquet", compression="zstd")
    aside.rename(folder)


def _table(rng: np.random.Generator, number: int, n_rows: int) -> pa.Table:
    common = rng.normal(size=n_rows)
    null = rng.random(n_rows) < NULLS
    shares = 1 / np.arange(1, GROUPS + 1)
    groups = rng.choice([f"lang{i:02}" for i in range(GROUPS)], n_rows, p=shares / shares.sum())
    n_tokens = np.minimum(rng.lognormal(5.5, 1.2, n_rows).astype(np.int32) + 2, 8_192)
    columns = {"id": pa.array([f"{number}-{i}" for i in range(n_rows)]), "lang": pa.array(groups)}
    for head in HEADS:
        scores = (2.5 + 0.7 * common + 0.7 * rng.normal(size=n_rows)).astype(np.float32)
        columns[f"score_{head}"] = pa.array(scores, mask=null)
    columns["n_tokens"] = pa.array(n_tokens, mask=null)
    columns["truncated"] = pa.array(n_tokens == 8_192, mask=null)
    settings = {"bundle": "0" * 64, "variant": "cpu-fp32", "precision": "fp32", "heads": list(HEADS)}
    return pa.table(columns).replace_schema_metadata({"jql_engine": json.dumps(settings)})


def measure(scores: Path) -> dict[str, object]:
    """Of one run of jql-report."""
    program = Path(sys.executable).with_name("jql-report")
    out = ["--html", str(scores.with_suffix(".html")), "--json", str(scores.with_suffix(".json"))]
    began = time.monotonic()
    done = subprocess.run([program, scores, "--group-column", "lang", *out], check=True, stdout=subprocess.PIPE)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": round(time.monotonic() - began, 2),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 2),
        "memory_mib": used.ru_maxrss // 1024,
        "html_bytes": scores.with_suffix(".html").stat().st_size,
        "summary": json.loads(done.stdout.splitlines()[-1]),
    }


if __name__ == "__main__":
    main()
