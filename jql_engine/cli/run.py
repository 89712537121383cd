"""jql-run: the command line."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from jql_engine.errors import EngineError
from jql_engine.printing import redact

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

RESCORE_TAKES = {
    "rescore", "bundle", "out", "overwrite", "assume_unchanged", "rank", "world_size", "workers", "metrics",
    "retry_minutes",
}  # fmt: skip


@app.command()
def run(
    context: typer.Context,
    bundle: Annotated[Path, typer.Option(help="The bundle that jql-export wrote.")],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Parquet or JSON Lines: files, folders, globs, URLs (s3://, hf://, ...).", show_default=False
        ),
    ] = None,
    out: Annotated[str | None, typer.Option(help="Folder or URL of the score files, one for each input file.")] = None,
    text_column: Annotated[str, typer.Option(help="Column with the documents.")] = "text",
    id_column: Annotated[str | None, typer.Option(help="Column to copy; by default `id` where there is one.")] = None,
    output: Annotated[
        Literal["sidecar", "append"], typer.Option(help="Scores alone, or beside all columns of the source.")
    ] = "sidecar",
    embeddings: Annotated[
        Literal["fp16", "fp32"] | None, typer.Option(help="Keep the vectors too, in a column `embedding`.")
    ] = None,
    rescore: Annotated[
        str | None, typer.Option(help="Folder of outputs with embeddings: apply this bundle's heads to those.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda (every GPU), cuda:N or cuda:N,cuda:M.")] = "auto",
    variant: Annotated[
        str | None, typer.Option(help="Graph of the bundle; else the fastest within --tolerance.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, help="Most that a graph's scores may differ by from the fp32 reference; 0.02 by default."),
    ] = None,
    no_build: Annotated[bool, typer.Option("--no-build", help="TensorRT engines must be there already.")] = False,
    engine_cache: Annotated[
        Path | None,
        typer.Option(help="Folder of TensorRT engines that are built here; by default ~/.cache/jql-engine/engines."),
    ] = None,
    library: Annotated[
        Literal["tensorrt", "tensorrt-rtx"] | None, typer.Option(help="By default the first that is installed.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes on the CPU; a GPU has one each.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of a worker; by default its cores.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of this machine; by default from SLURM or torchrun.")] = None,
    world_size: Annotated[int | None, typer.Option(help="Machines on this job.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Score the first documents only.")] = None,
    chunk_rows: Annotated[int, typer.Option(min=1, help="Most rows that are committed together.")] = 20_000,
    metrics: Annotated[Path | None, typer.Option(help="Append a line of JSON for each chunk to this file.")] = None,
    retry_minutes: Annotated[
        float, typer.Option(min=0, help="How long a remote file system that fails is asked again.")
    ] = 10.0,
    plan: Annotated[bool, typer.Option("--plan", help="Say how long it will take and what it will cost.")] = False,
    price_per_hour: Annotated[float | None, typer.Option(min=0, help="Of this machine, for --plan.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start over: remove the scores that are there, and compute them again.")
    ] = False,
    assume_unchanged: Annotated[
        bool, typer.Option("--assume-unchanged", help="Go on with files whose server does not tell if they changed.")
    ] = False,
) -> None:
    """Score the documents of files: one row out for each row in, in the same order."""
    from jql_engine.bundle import Bundle
    from jql_engine.files.storage import RetryPolicy, set_retries
    from jql_engine.job.interrupt import interruptible
    from jql_engine.job.launch import Machine, estimate, score
    from jql_engine.job.launch import rescore as apply_heads
    from jql_engine.job.plan import Job
    from jql_engine.job.progress import RunLog
    from jql_engine.job.ranks import rank_of
    from jql_engine.sessions.base import SessionOptions
    from jql_engine.sessions.tensorrt.cache import EngineOptions

    _check_usage(context)
    set_retries(RetryPolicy(retry_minutes))
    sources = tuple(inputs or [rescore or ""])
    job = Job(
        sources, out or "", text_column, id_column, overwrite, output, embeddings, limit, chunk_rows,
        rank_of(rank, world_size, os.environ), assume_unchanged,
    )  # fmt: skip
    engines = EngineOptions(engine_cache, not no_build, library)
    machine = Machine(device, variant, workers, tolerance, SessionOptions(threads, engines))
    with interruptible() as stop:
        opened = Bundle.open(bundle)
        if plan:
            summary = estimate(job, opened, machine, price_per_hour)
        elif rescore is not None:
            summary = apply_heads(job, opened, workers or 1, RunLog(metrics), stop)
        else:
            summary = score(job, opened, machine, RunLog(metrics), stop)
    print(redact(json.dumps(summary, ensure_ascii=False)), flush=True)  # noqa: T201
    raise typer.Exit(1 if summary.get("unfinished") else 0)


def _check_usage(context: typer.Context) -> None:
    given = context.params
    if given["rescore"] is None and not given["inputs"]:
        raise typer.BadParameter("give the files to score", param_hint="inputs")
    if given["out"] is None and not given["plan"]:
        raise typer.BadParameter("give the folder of the score files", param_hint="--out")
    if (given["rank"] is None) != (given["world_size"] is None):
        raise typer.BadParameter("and --world-size go together", param_hint="--rank")
    if given["rank"] is not None and not 0 <= given["rank"] < given["world_size"]:
        raise typer.BadParameter("counts from 0 and is less than --world-size", param_hint="--rank")
    if given["price_per_hour"] is not None and not given["plan"]:
        raise typer.BadParameter("has a use with --plan alone", param_hint="--price-per-hour")
    if given["rescore"] is None:
        return
    for name in given.keys() - RESCORE_TAKES:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = "inputs" if name == "inputs" else f"--{name.replace('_', '-')}"
            raise typer.BadParameter(f"has no use for {option}: it only applies heads", param_hint="--rescore")


def main() -> None:
    """Exit 0 done, 1 failed, 2 misuse."""
    from jql_engine.job.interrupt import StopError

    try:
        app()
    except StopError as error:
        print(redact(f"\njql-run: {error}"), file=sys.stderr, flush=True)  # noqa: T201
        os._exit(1)  # a thread may be in the middle of an execution that nobody waits for
    except EngineError as error:
        print(redact(f"jql-run: {error}"), file=sys.stderr, flush=True)  # noqa: T201
        sys.exit(1)
