"""jql-cut: the command line."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import typer

from jql_engine.cli import options
from jql_engine.cli.options import INPUT, OUTPUT

RULE, AMOUNT = "Rule", "How much to keep (one of these)"
app = options.command()


@app.command()
def cut(
    scores: Annotated[
        list[str], typer.Argument(help="Score files that jql-run wrote, of one job: files, folders, globs, URLs.")
    ],
    thresholds: Annotated[
        str, typer.Option(help="JSON file to write the thresholds to, or its URL.", rich_help_panel=OUTPUT)
    ],
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
    group_column: Annotated[
        str | None,
        typer.Option(
            help="Column whose values have thresholds of their own, as languages; see jql-run --group-column.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    min_group: Annotated[
        int,
        typer.Option(
            min=1,
            help="Groups with fewer documents take the thresholds of all groups together.",
            rich_help_panel=RULE,
        ),
    ] = 1_000,
    columns: Annotated[
        list[str] | None,
        typer.Option(help="Score column, to be repeated; by default those that jql-run wrote.", rich_help_panel=INPUT),
    ] = None,
    retry_minutes: options.RetryMinutes = 10.0,
    version: options.Version = False,  # noqa: ARG001
) -> None:
    """Turn scores into a decision: thresholds for each head and group, and what they keep."""
    from jql_engine.decision.cut import Sources
    from jql_engine.decision.cut import cut as compute
    from jql_engine.decision.result import Request
    from jql_engine.files.retries import RetryPolicy, set_retries

    _check_amount(quantile, keep, keep_tokens)
    set_retries(RetryPolicy(retry_minutes))
    request = Request(rule, weight, quantile, keep, None if keep_tokens is None else int(keep_tokens), min_group)
    options.finish(compute(Sources(tuple(scores), tuple(columns or ()), group_column), request, thresholds))


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
