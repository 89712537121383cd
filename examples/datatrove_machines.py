"""One datatrove job on several machines without a scheduler: every machine takes its own range of ranks.

Started on each machine, with folders that all of them see (or s3:// and the like) and another `--machine` on each:

    python examples/datatrove_machines.py CORPUS BUNDLE OUT --machines 2 --machine 0
    python examples/datatrove_machines.py CORPUS BUNDLE OUT --machines 2 --machine 1

The ranks of all machines together are the tasks of the job; `local_rank_offset` is the first of this machine. Rank r
reads every tasks-th file, so there should be more files than tasks. A machine that was down is started again with the
same command: datatrove skips the ranks that have finished.

With one task for each GPU of a machine, `--tasks-per-machine 8`, the ranks spread over the GPUs by themselves, once the
bundle has a CUDA graph; on the CPU the tasks share the cores.

Checked with datatrove 0.10: both commands above, one after the other on one machine, score all of the demo's documents.
"""

from __future__ import annotations

import argparse
import os

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.writers import JsonlWriter, ParquetWriter

from jql_engine.integrations.datatrove import JQLAnnotator, stats_adapter


def stage_of(args: argparse.Namespace) -> LocalPipelineExecutor:
    n_local = args.tasks_per_machine
    pipeline = [
        ParquetReader(data_folder=args.corpus, glob_pattern="**/*.parquet"),
        JQLAnnotator(
            bundle=args.bundle,
            threads=max(1, len(os.sched_getaffinity(0)) // n_local),
            stats_writer=JsonlWriter(output_folder=f"{args.out}/stats", adapter=stats_adapter, expand_metadata=True),
        ),
        ParquetWriter(output_folder=f"{args.out}/data"),
    ]
    return LocalPipelineExecutor(
        pipeline,
        tasks=n_local * args.machines,
        local_tasks=n_local,
        local_rank_offset=n_local * args.machine,
        logging_dir=f"{args.out}/logs",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", help="folder of parquet files with a column text")
    parser.add_argument("bundle", help="a path on every machine")
    parser.add_argument("out")
    parser.add_argument("--machines", type=int, required=True, help="how many there are")
    parser.add_argument("--machine", type=int, required=True, help="which one this is, from 0")
    parser.add_argument("--tasks-per-machine", type=int, default=1)
    stage_of(parser.parse_args()).run()


if __name__ == "__main__":  # datatrove's tasks are processes, which import this file
    main()
