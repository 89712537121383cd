"""jql-cut: the command line."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import typer

from jql_engine.cli import options
from jql_engine.cli.options import INPUT, OUTPUT, RULE

AMOUNT = "How much to keep (one of these)"
app = options.command()


@app.command()
def cut(
    scores: Annotated[
        list[str], typer.Argument(help="Score files that jql-run wrote, of one job: files, folders, globs, URLs.")
    ],
    thresholds: Annotated[
        str | None,
        typer.Option(
            help="JSON file to write the thresholds to, or its URL; by default thresholds.json in --out.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    corpus: Annotated[
        list[str],
        typer.Option(
            help="The parquet that was scored, whose kept rows are copied; repeat. Without it, rows of the scores "
            "themselves, if jql-run --output append wrote them.",
            rich_help_panel=INPUT,
        ),
    ] = [],  # noqa: B006
    out: Annotated[
        str | None,
        typer.Option(help="Folder or URL of the kept rows, with all columns, in order.", rich_help_panel=OUTPUT),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Start over: remove the kept rows that are there, and copy them again.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    assume_unchanged: options.SameCorpus = False,
    quantile: Annotated[
        float | None, typer.Option(help="Quantile of each head in its group: 0.6 in the paper.", rich_help_panel=AMOUNT)
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Share to be kept under the rule, 0.4 for one.", rich_help_panel=AMOUNT)
    ] = None,
    keep_tokens: Annotated[
        float | None, typer.Option(help="Tokens to be kept under the rule: 100e9.", rich_help_panel=AMOUNT)
    ] = None,
    rule: Annotated[
        Literal["all", "any", "mean"],
        typer.Option(
            help="all: every head's score reaches its threshold; any: one does; mean: their mean does.",
            rich_help_panel=RULE,
        ),
    ] = "all",
    weight: Annotated[
        Literal["documents", "tokens"],
        typer.Option(help="What quantiles and shares are counted in.", rich_help_panel=RULE),
    ] = "documents",
    group_column: options.GroupColumn = None,
    min_group: options.MinGroup = 1_000,
    columns: Annotated[
        list[str] | None,
        typer.Option(help="Score column, to be repeated; by default those that jql-run wrote.", rich_help_panel=INPUT),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that copy rows; by default one.", rich_help_panel=OUTPUT)
    ] = None,
    metrics: options.Metrics = None,
    retry_minutes: options.RetryMinutes = 10.0,  # noqa: ARG001
    version: options.Version = False,  # noqa: ARG001
) -> None:
    """Turn scores into a decision: thresholds for each head and group, and what they keep."""
    from jql_engine.decision.cut import Copies, Sources
    from jql_engine.decision.cut import cut as compute
    from jql_engine.decision.result import Request
    from jql_engine.job.interrupt import interruptible
    from jql_engine.job.plan import Job
    from jql_engine.job.progress import RunLog

    _check_amount(quantile, keep, keep_tokens)
    if out is None and thresholds is None:
        raise typer.BadParameter("say where to: --thresholds FILE, --out FOLDER for the kept rows, or both")
    unused = {"--corpus": corpus, "--overwrite": overwrite, "--assume-unchanged": assume_unchanged,
              "--workers": workers, "--metrics": metrics}  # fmt: skip
    if out is None and (option := next((name for name, value in unused.items() if value), None)):
        raise typer.BadParameter(f"give the folder that the kept rows go to: {option} is for those", param_hint="--out")
    options.check_outputs(thresholds=thresholds)
    request = Request(rule, weight, quantile, keep, None if keep_tokens is None else int(keep_tokens), min_group)
    sources = Sources(tuple(scores), tuple(columns or ()), group_column)
    target = thresholds or f"{(out or '').rstrip('/')}/thresholds.json"
    with interruptible() as stop:
        copies = None
        if out is not None:
            job = Job(tuple(corpus), out, overwrite=overwrite, assume_unchanged=assume_unchanged)
            copies = Copies(job, workers or 1, RunLog(metrics), stop)
        summary = compute(sources, request, target, copies)
    options.finish(summary)


def _check_amount(quantile: float | None, keep: float | None, keep_tokens: float | None) -> None:
    """Raise BadParameter unless one of them is given, and in its range."""
    if sum(one is not None for one in (quantile, keep, keep_tokens)) != 1:
        raise typer.BadParameter("give one of --quantile, --keep and --keep-tokens", param_hint="--quantile")
    if quantile is not None and not 0 <= quantile <= 1:  # which NaN is not either
        raise typer.BadParameter("it is a number from 0 to 1", param_hint="--quantile")
    if keep is not None and not 0 < keep <= 1:
        raise typer.BadParameter("it is a share, over 0 and up to 1", param_hint="--keep")
    if keep_tokens is not None and not 1 <= keep_tokens < math.inf:
        raise typer.BadParameter("it is a number of tokens, 1 or more", param_hint="--keep-tokens")


def main() -> None:
    """Exit 0 done, 1 failed, 2 misuse."""
    options.run_command(app, "jql-cut")
