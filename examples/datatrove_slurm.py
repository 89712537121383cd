"""The same pipeline as a SLURM job array: one array task for each datatrove task.

    python examples/datatrove_slurm.py CORPUS BUNDLE OUT --partition cpu --tasks 64

Run it on a login node; it submits with sbatch and returns. All paths must be on a file system that the nodes share, and
the environment (`--venv`) as well. The same command again submits the tasks that have not finished.

For GPUs, once the bundle has a CUDA graph: `--gpus-per-task 1`, whereupon a task sees one GPU and takes it.

Checked with datatrove 0.10: the executor is built, survives being pickled as for a node, and its steps then score a
rank; `--dry-run` prints the job script that sbatch would get. It has not been run under SLURM.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from datatrove.executor import SlurmPipelineExecutor
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.writers import JsonlWriter, ParquetWriter

from jql_engine.integrations.datatrove import JQLAnnotator, stats_adapter


def stage_of(args: argparse.Namespace) -> SlurmPipelineExecutor:
    pipeline = [
        ParquetReader(data_folder=args.corpus, glob_pattern="**/*.parquet"),
        JQLAnnotator(
            bundle=args.bundle,
            threads=args.cpus_per_task,
            stats_writer=JsonlWriter(output_folder=f"{args.out}/stats", adapter=stats_adapter, expand_metadata=True),
        ),
        ParquetWriter(output_folder=f"{args.out}/data"),
    ]
    return SlurmPipelineExecutor(
        pipeline,
        job_name="jql",
        tasks=args.tasks,
        time=args.time,
        partition=args.partition,
        qos=None,
        cpus_per_task=args.cpus_per_task,
        mem_per_cpu_gb=4,
        gpus_per_task=args.gpus_per_task,
        venv_path=str(args.venv / "bin" / "activate"),
        logging_dir=f"{args.out}/logs",
        randomize_start_duration=30,  # so that not all of them read the bundle in the same second
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", help="folder of parquet files with a column text")
    parser.add_argument("bundle")
    parser.add_argument("out")
    parser.add_argument("--partition", required=True)
    parser.add_argument("--tasks", type=int, required=True, help="at most the number of files")
    parser.add_argument("--time", default="24:00:00")
    parser.add_argument("--cpus-per-task", type=int, default=8)
    parser.add_argument("--gpus-per-task", type=int, default=0)
    parser.add_argument("--venv", type=Path, default=Path(sys.prefix))
    parser.add_argument("--dry-run", action="store_true", help="print the job script and submit nothing")
    args = parser.parse_args()
    stage = stage_of(args)
    if args.dry_run:
        print(stage.get_launch_file_contents(stage.get_sbatch_args(args.tasks), "srun -l launch_pickled_pipeline ..."))
    else:
        stage.run()


if __name__ == "__main__":
    main()
