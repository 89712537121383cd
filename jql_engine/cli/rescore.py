"""jql-rescore: the command line."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from jql_engine.cli import options

app = options.command()


@app.command()
def rescore(
    bundle: options.Bundle,
    scores: Annotated[list[str], typer.Argument(help="Outputs of jql-run --embeddings: files, folders, globs, URLs.")],
    out: Annotated[str, options.OUT],
    overwrite: options.Overwrite = False,
    assume_unchanged: options.AssumeUnchanged = False,
    retry_minutes: options.RetryMinutes = 10.0,  # noqa: ARG001
    workers: options.Workers = None,
    rank: options.Rank = None,
    world_size: options.WorldSize = None,
    metrics: options.Metrics = None,
    version: options.Version = False,  # noqa: ARG001
) -> None:
    """Apply the heads of a bundle with the same encoder to stored vectors: new scores without the encoder."""
    from jql_engine.bundle import Bundle
    from jql_engine.job.interrupt import interruptible
    from jql_engine.job.launch import rescore as apply_heads
    from jql_engine.job.plan import Job
    from jql_engine.job.progress import RunLog
    from jql_engine.job.ranks import rank_of

    options.check_rank(rank, world_size)
    job = Job(
        tuple(scores),
        out,
        overwrite=overwrite,
        rank=rank_of(rank, world_size, os.environ),
        assume_unchanged=assume_unchanged,
    )
    with interruptible() as stop:
        summary = apply_heads(job, Bundle.open(bundle), workers or 1, RunLog(metrics), stop)
    options.finish(summary)


def main() -> None:
    """Exit 0 done, 1 failed, 2 misuse."""
    options.run_command(app, "jql-rescore")
