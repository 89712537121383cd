"""The pipeline of the JQL annotation pipeline's README, with one import changed, on this repository's documents.

    make demo                            # exports .demo/bundle
    .venv/bin/pip install 'datatrove[io]'
    .venv/bin/python examples/datatrove_local.py

Two tasks share twelve files; the documents with their scores come out in .demo/datatrove/data, the scores alone in
.demo/datatrove/stats. A second run finds both tasks finished and computes nothing; with `--work` elsewhere it begins
anew.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter, ParquetWriter

from jql_engine.integrations.datatrove import JQLAnnotator, stats_adapter

ROOT = Path(__file__).resolve().parent.parent
TASKS = 2


def stage_of(bundle: Path, out: Path) -> LocalPipelineExecutor:
    pipeline = [
        JsonlReader(data_folder=str(ROOT / "examples" / "documents"), glob_pattern="*.jsonl"),
        JQLAnnotator(
            bundle=bundle,  # without it: the model and the heads of the paper, exported once
            threads=1,  # of each task, since they share the cores
            stats_writer=JsonlWriter(output_folder=f"{out}/stats", adapter=stats_adapter, expand_metadata=True),
        ),
        ParquetWriter(output_folder=f"{out}/data"),
    ]
    return LocalPipelineExecutor(pipeline, tasks=TASKS, local_tasks=TASKS, logging_dir=f"{out}/logs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=ROOT / ".demo" / "bundle")
    parser.add_argument("--work", type=Path, default=ROOT / ".demo" / "datatrove", help="folder for what this writes")
    args = parser.parse_args()
    stage_of(args.bundle, args.work).run()
    table = pa.concat_tables(pq.read_table(file) for file in sorted((args.work / "data").glob("*.parquet")))
    rows = sorted(table.to_pylist(), key=lambda row: row["metadata"]["score_education"])
    print(f"{len(rows)} documents; the least and the most educational:")
    for row in (rows[0], rows[-1]):
        print(f"{row['metadata']['score_education']:6.2f}  {row['id']}  {' '.join(row['text'].split())[:80]}")


if __name__ == "__main__":  # datatrove's tasks are processes, which import this file
    main()
