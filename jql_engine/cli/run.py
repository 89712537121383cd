"""jql-run: the command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from jql_engine.cli import options
from jql_engine.cli.options import DEVICE, INPUT, JOB, OUTPUT, TENSORRT

app = options.command()


@app.command()
def run(
    bundle: options.Bundle,
    inputs: Annotated[
        list[str], typer.Argument(help="Parquet or JSON Lines: files, folders, globs, URLs (s3://, hf://, ...).")
    ],
    text_column: Annotated[str, typer.Option(help="Column with the documents.", rich_help_panel=INPUT)] = "text",
    id_column: Annotated[
        str | None,
        typer.Option(
            help="Column with the documents' ids, to copy; by default `id` where there is one.", rich_help_panel=INPUT
        ),
    ] = None,
    group_column: Annotated[
        str | None,
        typer.Option(
            help="Column with each document's group, a language for one, to copy: jql-cut takes thresholds by it.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Score the first documents only.", rich_help_panel=INPUT)
    ] = None,
    assume_unchanged: options.AssumeUnchanged = False,
    retry_minutes: options.RetryMinutes = 10.0,  # noqa: ARG001
    out: Annotated[str | None, options.OUT] = None,
    output: Annotated[
        Literal["sidecar", "append"],
        typer.Option(
            help="sidecar: files of scores alone; append: all columns of the source and the scores.",
            rich_help_panel=OUTPUT,
        ),
    ] = "sidecar",
    windows: Annotated[
        Literal["first", "first+last", "all"] | None,
        typer.Option(
            help="Windows of a long document that are scored; by default those that the bundle names.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    aggregate: Annotated[
        Literal["max", "mean"] | None,
        typer.Option(
            help="How the scores of several windows become one; by default as the bundle says.", rich_help_panel=OUTPUT
        ),
    ] = None,
    embeddings: Annotated[
        Literal["fp16", "fp32"] | None,
        typer.Option(help="Keep the vectors too, in a column `embedding`.", rich_help_panel=OUTPUT),
    ] = None,
    overwrite: options.Overwrite = False,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda (every GPU), cuda:N or cuda:N,cuda:M.", rich_help_panel=DEVICE)
    ] = "auto",
    variant: Annotated[
        str | None,
        typer.Option(
            help="Graph of the bundle; by default that expected to be fastest within --tolerance.",
            rich_help_panel=DEVICE,
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Most that a graph's scores may differ by from the fp32 reference.  [default: 0.02]",
            rich_help_panel=DEVICE,
        ),
    ] = None,
    max_flips: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="In the place of --tolerance: the largest share of documents that a graph may decide differently at "
            "the 0.6 quantile, as the bundle's certificate says.",
            rich_help_panel=DEVICE,
        ),
    ] = None,
    workers: options.Workers = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads of a worker; by default its share of the cores.", rich_help_panel=DEVICE),
    ] = None,
    no_build: Annotated[
        bool,
        typer.Option(
            "--no-build",
            help="Never build a TensorRT engine: one that is missing is an error.",
            rich_help_panel=TENSORRT,
        ),
    ] = False,
    engine_cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the engines that are built here; by default ~/.cache/jql-engine/engines.",
            rich_help_panel=TENSORRT,
        ),
    ] = None,
    library: Annotated[
        Literal["tensorrt", "tensorrt-rtx"] | None,
        typer.Option(help="Library that builds engines; by default the first installed.", rich_help_panel=TENSORRT),
    ] = None,
    rank: options.Rank = None,
    world_size: options.WorldSize = None,
    chunk_rows: Annotated[
        int,
        typer.Option(
            min=1, help="Most rows of a chunk, which a job that was stopped begins anew.", rich_help_panel=JOB
        ),
    ] = 20_000,
    metrics: options.Metrics = None,
    estimate: Annotated[
        bool,
        typer.Option("--estimate", help="Predict tokens, hours and cost, and score nothing.", rich_help_panel=JOB),
    ] = False,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Price of this machine, for --estimate.", rich_help_panel=JOB)
    ] = None,
    version: options.Version = False,  # noqa: ARG001
) -> None:
    """Score the documents of files: one row out for each row in, in the same order."""
    from jql_engine.bundle import Bundle
    from jql_engine.job.interrupt import interruptible
    from jql_engine.job.launch import Machine, score
    from jql_engine.job.launch import estimate as predict
    from jql_engine.job.plan import Job
    from jql_engine.job.progress import RunLog
    from jql_engine.job.ranks import rank_of
    from jql_engine.sessions.base import EngineOptions, SessionOptions

    if out is None and not estimate:
        raise typer.BadParameter("give the folder of the score files", param_hint="--out")
    if price_per_hour is not None and not estimate:
        raise typer.BadParameter("it is for --estimate", param_hint="--price-per-hour")
    if tolerance is not None and max_flips is not None:
        raise typer.BadParameter("is another limit of what --tolerance limits: give one", param_hint="--max-flips")
    options.check_rank(rank, world_size)
    job = Job(
        tuple(inputs),
        out or "",
        text_column=text_column,
        id_column=id_column,
        group_column=group_column,
        overwrite=overwrite,
        output=output,
        embeddings=embeddings,
        limit=limit,
        chunk_rows=chunk_rows,
        rank=rank_of(rank, world_size, os.environ),
        assume_unchanged=assume_unchanged,
    )
    engines = EngineOptions(engine_cache, not no_build, library)
    machine = Machine(device, variant, workers, tolerance, SessionOptions(threads, engines), max_flips)
    with interruptible() as stop:
        opened = Bundle.open(bundle).with_windows(windows, aggregate)
        if estimate:
            summary = predict(job, opened, machine, price_per_hour)
        else:
            summary = score(job, opened, machine, RunLog(metrics), stop)
    options.finish(summary)


def main() -> None:
    """Exit 0 done, 1 failed, 2 misuse."""
    options.run_command(app, "jql-run")
