"""jql-report: the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from jql_engine.cli import options
from jql_engine.cli.options import INPUT, OUTPUT, RULE

app = options.command()


@app.command()
def run(
    scores: Annotated[
        list[str], typer.Argument(help="Score files that jql-run wrote, of one job: files, folders, globs, URLs.")
    ],
    html: Annotated[
        str | None, typer.Option(help="File of the page, or its URL; needs the extra `report`.", rich_help_panel=OUTPUT)
    ] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", help="File of all figures, or its URL.", rich_help_panel=OUTPUT)
    ] = None,
    group_column: options.GroupColumn = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(help="Score column, to be repeated; by default those that jql-run wrote.", rich_help_panel=INPUT),
    ] = None,
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            help="What was scored, files, folders, globs or URLs, to be repeated: the page shows excerpts.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    text_column: Annotated[str, typer.Option(help="Text column of the corpus.", rich_help_panel=INPUT)] = "text",
    assume_unchanged: options.SameCorpus = False,
    metrics: Annotated[
        Path | None,
        typer.Option(help="What jql-run --metrics wrote: speed and bottleneck over time.", rich_help_panel=INPUT),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(help="The bundle that computed the scores: shows its certificate.", rich_help_panel=INPUT),
    ] = None,
    weight: Annotated[
        Literal["documents", "tokens"], typer.Option(help="What quantiles are counted in.", rich_help_panel=RULE)
    ] = "documents",
    min_group: options.MinGroup = 1_000,
    retry_minutes: options.RetryMinutes = 10.0,  # noqa: ARG001
    version: options.Version = False,  # noqa: ARG001
) -> None:
    """What there is in scores, and what each rule would keep: as a page, and as JSON."""
    from jql_engine.decision.report.report import Sources, report

    if html is None and json_file is None:
        raise typer.BadParameter("give --html, --json or both", param_hint="--html")
    options.check_outputs(html=html, json=json_file)
    sources = Sources(
        inputs=tuple(scores),
        columns=tuple(columns or ()),
        group_column=group_column,
        corpus=tuple(corpus or ()),
        text_column=text_column,
        assume_unchanged=assume_unchanged,
        metrics=metrics,
        bundle=bundle,
    )
    options.finish(report(sources, weight, min_group, html=html, json_file=json_file))


def main() -> None:
    """Exit 0 done, 1 failed, 2 misuse."""
    options.run_command(app, "jql-report")
