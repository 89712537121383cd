"""jql-run: the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from jql_engine.errors import EngineError

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def run(
    inputs: Annotated[list[str], typer.Argument(help="Parquet files, folders or globs.", show_default=False)],
    bundle: Annotated[Path, typer.Option(help="The bundle that jql-export wrote.")],
    out: Annotated[Path, typer.Option(help="Folder of the score files, one for each input file.")],
    text_column: Annotated[str, typer.Option(help="Column with the documents.")] = "text",
    id_column: Annotated[str | None, typer.Option(help="Column to copy; by default `id` where there is one.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    variant: Annotated[str | None, typer.Option(help="Graph of the bundle; by default the device's first.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default every core.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Compute files again that are there.")] = False,
) -> None:
    """Score the documents of parquet files: one row out for each row in, in the same order."""
    from jql_engine.bundle import Bundle
    from jql_engine.run import Job, prepare
    from jql_engine.run import run as run_job
    from jql_engine.sessions import open_session
    from jql_engine.tokens import Tokenizer

    job = Job(tuple(inputs), out, text_column, id_column, overwrite)
    try:
        opened = Bundle.open(bundle)
        session = open_session(opened, device, variant, threads)
        work = prepare(job, opened, session.variant)
        n_docs = sum(file.n_rows for file in work.files)
        finished = f", {work.n_finished} files are finished already" if work.n_finished else ""
        with_what = f"variant {session.variant}, heads {', '.join(opened.heads)}"
        _say(f"{n_docs:,} documents in {len(work.files):,} files{finished}; {with_what}")
        summary = run_job(job, opened, session, Tokenizer.of(opened), work)
    except KeyboardInterrupt:
        raise EngineError("interrupted; start the same command again to continue") from None
    print(json.dumps(summary.to_dict()), flush=True)  # noqa: T201


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201


def main() -> None:
    """Exit 0 done, 1 failed, 2 misuse."""
    try:
        app()
    except EngineError as error:
        _say(f"jql-run: {error}")
        sys.exit(1)
