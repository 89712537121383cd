"""From a checkpoint to a decision: exports the demo's encoder and heads, scores its documents, and cuts them.

    python examples/demo.py [--work .demo]

Runs the installed commands as anybody would, prints the best and the worst documents, and writes a report; see
examples/train_demo.py for the model.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
HEADS = ("education", "prose")
COLUMNS = ("id", "lang", "kind", "text")
N_SHOWN = 3  # documents at either end
BY_LANGUAGE = ("--group-column", "lang", "--min-group", "10")  # by default 1,000, and the demo has 204 documents
TEXT_WIDTH = 70  # terminal cells; a Chinese character takes two


@dataclass(frozen=True, slots=True)
class Scored:
    """A document with its scores."""

    lang: str
    kind: str
    text: str
    scores: tuple[float, ...]  # one per head


def write_documents(file: Path) -> pa.Table:
    """All demo documents as one parquet file, columns id, lang, kind and text."""
    files = sorted((EXAMPLES / "documents").glob("*.jsonl"))
    rows = [json.loads(line) for path in files for line in path.read_text("utf-8").splitlines()]
    table = pa.table({name: [row[name] for row in rows] for name in COLUMNS})
    pq.write_table(table, file)
    return table


def export(bundle: Path) -> None:
    """Fuse encoder and heads into `bundle`."""
    model = EXAMPLES / "demo"
    heads = [part for name in HEADS for part in ("--head", f"{name}={_shown(model / 'heads' / f'{name}.ckpt')}")]
    _run("jql-export", "--encoder", _shown(model / "encoder"), *heads, "--out", _shown(bundle), "--overwrite")


def score(documents: Path, bundle: Path, out: Path, metrics: Path) -> None:
    """Score `documents` with `bundle` into the folder `out`, which gets their languages too."""
    folders = ("--bundle", _shown(bundle), "--out", _shown(out), "--metrics", _shown(metrics))
    metrics.unlink(missing_ok=True)
    _run("jql-run", _shown(documents), *folders, "--group-column", "lang", "--overwrite", "--device", "cpu")


def cut(scores: Path, documents: Path, out: Path) -> None:
    """Keep the documents whose scores are all above the 0.6 quantile of their language, as the JQL paper does."""
    _run("jql-cut", _shown(scores), *BY_LANGUAGE, "--quantile", "0.6", "--corpus", _shown(documents),
         "--out", _shown(out), "--overwrite")  # fmt: skip
    counts = json.loads((out / "thresholds.json").read_text("utf-8"))["counts"]
    print(f"{counts['kept_documents']} of {counts['documents']} documents are kept: {_shown(out)}")


def report(scores: Path, documents: Path, work: Path) -> None:
    """Write the report of the scores."""
    page, sources = work / "report.html", ("--corpus", _shown(documents), "--metrics", _shown(work / "metrics.jsonl"))
    _run("jql-report", _shown(scores), *BY_LANGUAGE, *sources, "--bundle", _shown(work / "bundle"),
         "--html", _shown(page))  # fmt: skip
    print(f"open {_shown(page)} in a browser")


def _run(command: str, *arguments: str) -> None:
    """Show and run a command installed beside this Python, in the repository's root; exit as it exits if it fails."""
    program = Path(sys.executable).with_name(command)
    if not program.exists():
        sys.exit(f"{program} is missing: install this repository beside it with pip install -e '.[cpu,export]'")
    print("$", shlex.join([command, *arguments]), flush=True)
    if code := subprocess.run([program, *arguments], cwd=ROOT).returncode:
        sys.exit(code)


def _shown(path: Path) -> str:
    """The path as somebody in the repository's root would type it."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def join(documents: pa.Table, scores: pa.Table) -> list[Scored]:
    """Documents with their scores; rows stand in the same order, which is checked."""
    assert scores["id"].to_pylist() == documents["id"].to_pylist(), "jql-run returns the rows it was given, in order"
    columns = [scores[f"score_{name}"].to_pylist() for name in HEADS]
    rows = zip(documents.select(COLUMNS[1:]).to_pylist(), zip(*columns, strict=True), strict=True)
    return [Scored(row["lang"], row["kind"], row["text"], values) for row, values in rows]


def table_of(documents: Sequence[Scored], head: int) -> Table:
    """The best and the worst documents by one head."""
    ranked = sorted(documents, key=lambda document: document.scores[head], reverse=True)
    title = f"{HEADS[head]}: the {N_SHOWN} best and the {N_SHOWN} worst of {len(ranked)}"
    table = Table(title=title, title_justify="left")
    for name in HEADS:
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("lang", "kind"):
        table.add_column(name, no_wrap=True)
    table.add_column("text")  # the one that gives way in a narrow terminal
    for i, document in enumerate([*ranked[:N_SHOWN], *ranked[-N_SHOWN:]], start=1):
        scores = [f"{value:.2f}" for value in document.scores]
        text = Text(" ".join(document.text.split()))  # as plain str, "[Log in]" would be read as a style
        text.truncate(TEXT_WIDTH, overflow="ellipsis")
        table.add_row(*scores, document.lang, document.kind, text, end_section=i == N_SHOWN)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / ".demo", help="folder for everything this writes")
    work = parser.parse_args().work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    documents = write_documents(work / "documents.parquet")
    export(work / "bundle")
    score(work / "documents.parquet", work / "bundle", work / "scores", work / "metrics.jsonl")
    scored = join(documents, pq.read_table(work / "scores" / "documents.parquet"))
    console = Console(width=None if sys.stdout.isatty() else 120)  # rich takes 80 for a pipe, too few for the texts
    for head in range(len(HEADS)):
        console.print()
        console.print(table_of(scored, head))
    console.print()
    cut(work / "scores", work / "documents.parquet", work / "kept")
    report(work / "scores", work / "documents.parquet", work)


if __name__ == "__main__":
    main()
