"""jql-compare: the command line."""

from __future__ import annotations

from typing import Annotated

import typer

from jql_engine.cli import options
from jql_engine.cli.options import INPUT, OUTPUT

app = options.command()


@app.command()
def run(
    first: Annotated[str, typer.Argument(help="Scores that jql-run wrote: a file, folder, glob or URL.")],
    second: Annotated[str, typer.Argument(help="Scores of the same documents, by another graph, bundle or program.")],
    column: Annotated[
        list[str],
        typer.Option(
            "--columns",
            help="Score column of SECOND, where another program wrote it; repeat, in the order of FIRST's heads.",
            rich_help_panel=INPUT,
        ),
    ] = [],  # noqa: B006
    group_column: options.GroupColumn = None,
    min_group: options.MinGroup = 1_000,
    json_file: Annotated[
        str | None, typer.Option("--json", help="File of all figures, or its URL.", rich_help_panel=OUTPUT)
    ] = None,
    html: Annotated[
        str | None,
        typer.Option(
            help="File of a page that shows them, or its URL; needs the extra `report`.", rich_help_panel=OUTPUT
        ),
    ] = None,
    retry_minutes: options.RetryMinutes = 10.0,  # noqa: ARG001
    version: options.Version = False,  # noqa: ARG001
) -> None:
    """How far two sets of scores are apart, and how many documents they decide differently."""
    from jql_engine.decision.compare import compare_files

    options.check_outputs(html=html, json=json_file)
    options.finish(compare_files(first, second, column, group_column, min_group, json_file=json_file, html=html))


def main() -> None:
    """Exit 0 done, 1 failed, 2 misuse."""
    options.run_command(app, "jql-compare")
