"""The same pipeline with its tasks on a Ray cluster.

    ray start --head                                   # or join a cluster that is there
    python examples/datatrove_ray.py CORPUS BUNDLE OUT --tasks 16

CORPUS, BUNDLE and OUT are paths that every node can read and write. Each task reserves `--cpus-per-task` cores (and
2 GB of memory for each core) and computes with as many threads; with `--gpus-per-task 1`, once the bundle has a CUDA
graph, Ray shows it one GPU. A Ray Data pipeline needs no datatrove: see jql_engine.integrations.ray.

Checked with datatrove 0.10 and Ray 2.60 on one machine, `--address local --tasks 2 --cpus-per-task 1`; not yet on a
cluster of several.
"""

from __future__ import annotations

import argparse

import ray
from datatrove.executor import RayPipelineExecutor
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.writers import JsonlWriter, ParquetWriter

from jql_engine.integrations.datatrove import JQLAnnotator, stats_adapter


def stage_of(args: argparse.Namespace) -> RayPipelineExecutor:
    pipeline = [
        ParquetReader(data_folder=args.corpus, glob_pattern="**/*.parquet"),
        JQLAnnotator(
            bundle=args.bundle,
            threads=args.cpus_per_task,
            stats_writer=JsonlWriter(output_folder=f"{args.out}/stats", adapter=stats_adapter, expand_metadata=True),
        ),
        ParquetWriter(output_folder=f"{args.out}/data"),
    ]
    return RayPipelineExecutor(
        pipeline,
        tasks=args.tasks,
        cpus_per_task=args.cpus_per_task,
        gpus_per_task=args.gpus_per_task,
        logging_dir=f"{args.out}/logs",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", help="folder of parquet files with a column text")
    parser.add_argument("bundle")
    parser.add_argument("out")
    parser.add_argument("--tasks", type=int, required=True, help="at most the number of files")
    parser.add_argument("--cpus-per-task", type=int, default=2)
    parser.add_argument("--gpus-per-task", type=int, default=0)
    parser.add_argument("--address", default="auto", help="of the cluster; local starts one on this machine")
    args = parser.parse_args()
    ray.init(address=args.address)
    stage_of(args).run()


if __name__ == "__main__":
    main()
