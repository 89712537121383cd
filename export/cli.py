"""jql-export: the command line."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from jql_engine.errors import EngineError

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def export(
    encoder: Annotated[str, typer.Option(help="Checkpoint directory or hub id of the encoder.")],
    head: Annotated[
        list[str], typer.Option(help="NAME=FILE.ckpt, a Lightning checkpoint of a regression head; repeat.")
    ],
    out: Annotated[Path, typer.Option(help="The bundle to write.")],
    pooling: Annotated[str | None, typer.Option(help="cls or mean, where the checkpoint does not say it.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest input, special tokens included.")] = None,
    variant: Annotated[list[str], typer.Option(help="Graph to write: cpu-fp32, standard-fp32; repeat.")] = ["cpu-fp32"],  # noqa: B006
    revision: Annotated[str | None, typer.Option(help="Commit or tag of the hub repository.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bundle at --out.")] = False,
) -> None:
    """Fuse an encoder and all regression heads into one graph and certify it against PyTorch."""
    pairs = [_head_option(value) for value in head]
    warnings.filterwarnings("ignore")  # torch and transformers warn of what this command checks itself
    from transformers.utils import logging as transformers_logging

    from jql_export.export import export_bundle, find_checkpoint
    from jql_export.heads import read_head

    quiet: Any = transformers_logging  # untyped
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    bundle = export_bundle(
        find_checkpoint(encoder, revision),
        [read_head(name, file) for name, file in pairs],
        out, pooling, max_tokens, variant, overwrite,
        report=lambda line: print(line, file=sys.stderr),  # noqa: T201
    )  # fmt: skip
    print(f"{bundle.path}: bundle {bundle.hash[:12]}, heads {', '.join(bundle.heads)}", file=sys.stderr)  # noqa: T201


def _head_option(value: str) -> tuple[str, Path]:
    name, separator, file = value.partition("=")
    if not (name and separator and file):
        raise typer.BadParameter(f"{value!r} is not NAME=FILE.ckpt", param_hint="--head")
    return name, Path(file)


def main() -> None:
    """Exit 0 done, 1 failed, 2 misuse."""
    try:
        app()
    except EngineError as error:
        print(f"jql-export: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(1)
