"""What the commands share: options, their checks, and how a command ends."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from jql_engine.errors import EngineError
from jql_engine.job.interrupt import StopError
from jql_engine.printing import redact, say

# Packages of a runtime or of jql-export that an installation may lack, and the extra that brings each.
EXTRAS = dict.fromkeys(("huggingface_hub", "ml_dtypes", "onnx", "torch", "transformers"), "export") | {
    "onnxruntime": "cpu"
}


def _print_version(wanted: bool) -> None:
    if wanted:
        print(version("jql-engine"))  # noqa: T201
        raise typer.Exit


def _set_retries(minutes: float) -> float:
    from jql_engine.files.retries import RetryPolicy, set_retries

    set_retries(RetryPolicy(minutes))
    return minutes


INPUT, OUTPUT, DEVICE = "Input", "Output", "Device"
TENSORRT, MACHINES, JOB, RULE = "TensorRT", "Several machines", "Job", "Rule"

Bundle = Annotated[Path, typer.Option(help="The bundle that jql-export wrote.", rich_help_panel=INPUT)]
OUT = typer.Option(help="Folder or URL of the score files, one for each input file.", rich_help_panel=OUTPUT)
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Start over: remove the scores that are there, and compute them again.",
        rich_help_panel=OUTPUT,
    ),
]
AssumeUnchanged = Annotated[
    bool,
    typer.Option(
        "--assume-unchanged",
        help="Resume files whose server does not tell whether they have changed.",
        rich_help_panel=INPUT,
    ),
]
SameCorpus = Annotated[
    bool,
    typer.Option(
        "--assume-unchanged",
        help="The corpus was copied since it was scored, and its rows are the same.",
        rich_help_panel=INPUT,
    ),
]
RetryMinutes = Annotated[
    float,
    typer.Option(
        min=0,
        callback=_set_retries,
        help="How long a remote file system that fails is asked again.",
        rich_help_panel=INPUT,
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(help="Rank of this machine, from 0; by default from SLURM or torchrun.", rich_help_panel=MACHINES),
]
WorldSize = Annotated[int | None, typer.Option(help="Number of machines on this job.", rich_help_panel=MACHINES)]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Worker processes on the CPU, by default one; a GPU has always one of its own.",
        rich_help_panel=DEVICE,
    ),
]
GroupColumn = Annotated[
    str | None,
    typer.Option(
        help="Column whose values have thresholds of their own, a language for one; see jql-run --group-column.",
        rich_help_panel=INPUT,
    ),
]
MinGroup = Annotated[
    int,
    typer.Option(
        min=1, help="Groups with fewer documents take the thresholds of all groups together.", rich_help_panel=RULE
    ),
]
Version = Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")]
Metrics = Annotated[
    Path | None, typer.Option(help="Append a line of JSON for each chunk to this file.", rich_help_panel=JOB)
]


def command() -> typer.Typer:
    """An application for one command."""
    return typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


def check_rank(rank: int | None, world_size: int | None) -> None:
    """Raise BadParameter for one option without the other, and for a rank that does not exist."""
    if (rank is None) != (world_size is None):
        raise typer.BadParameter("give --rank and --world-size together", param_hint="--rank")
    if rank is not None and world_size is not None and not 0 <= rank < world_size:
        raise typer.BadParameter("it counts from 0 and is less than --world-size", param_hint="--rank")


def check_outputs(**given: str | None) -> None:
    """Raise BadParameter where two of the options name one file, or one names what may be scores or documents."""
    from jql_engine.files.inputs import SUFFIXES, identity
    from jql_engine.files.location import locate

    places: dict[str, str] = {}
    for name, file in given.items():
        if file is None:
            continue
        hint = f"--{name}"
        if file.lower().endswith(tuple(SUFFIXES)):
            raise typer.BadParameter(f"{file} has the name of a data file; choose another", param_hint=hint)
        if (other := places.setdefault(identity(locate(file)), hint)) != hint:
            raise typer.BadParameter(f"{file} is that of {other} too; give each a file of its own", param_hint=hint)


def finish(summary: Mapping[str, Any]) -> NoReturn:
    """Print the summary, and exit: 0 where all files are finished, else 1."""
    try:
        print(redact(json.dumps(summary, ensure_ascii=False)), flush=True)  # noqa: T201
    except OSError as error:
        say(f"jql: all is done but to print the summary: {error.strerror}")
        os._exit(1)  # what is left to print would fail again
    raise typer.Exit(1 if summary.get("unfinished") else 0)


def check_arguments(name: str) -> None:
    """Exit 2 where an argument is empty, which most options would take for the current folder."""
    for before, given in pairwise(sys.argv):
        if re.fullmatch(r"(--[a-z0-9-]+=)?", given):
            what = given[:-1] or (before if before.startswith("-") else "an argument")
            print(f"{name}: {what} is empty; is a variable of the shell not set?", file=sys.stderr)  # noqa: T201
            sys.exit(2)


def run_command(app: typer.Typer, name: str) -> None:
    """Exit 0 done, 1 failed, 2 misuse."""
    check_arguments(name)
    try:
        app()
    except StopError as error:
        print(redact(f"\n{name}: {error}"), file=sys.stderr, flush=True)  # noqa: T201
        os._exit(1)  # a thread may be in the middle of an execution that nobody waits for
    except EngineError as error:
        print(redact(f"{name}: {error}"), file=sys.stderr, flush=True)  # noqa: T201
        sys.exit(1)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        what = f"the package {package} is not installed; pip install 'jql-engine[{EXTRAS[package]}]'"
        print(f"{name}: {what}", file=sys.stderr)  # noqa: T201
        sys.exit(1)
