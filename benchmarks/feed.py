"""Does the host ever limit a GPU? The whole pipeline with a session that returns zeros, on awkward inputs.

Method. Each case is built from the real corpus (no text twice, so no tokenizer's cache helps), then run in a process of
its own, whose peak resident memory the operating system reports. Read, tokenize, plan, write and finish are what
jql-run does with one worker; only the graph is missing.

    corpus        the corpus as it is: one file, documents as long as the web's
    small_files   1,000 files of 10 rows
    short_100k    one file of 100,000 rows of about 15 tokens
    short_2m      one file of 2,000,000 rows of about 15 tokens
    huge_document one document of 50 MB between a thousand ordinary ones
    huge_spaceless the same without a single blank: Chinese, Japanese
    large_group   one row group of 1 GB

    python -m benchmarks.feed --bundle BUNDLE --corpus CORPUS.parquet --name NAME

The last line of stdout is the path of the JSON it wrote, benchmarks/results/NAME.json.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer

from benchmarks.table import Row, peak_memory_mib, print_rows, write_result
from benchmarks.throughput import ZeroSession, run_job
from jql_engine.bundle import Bundle
from jql_engine.job.plan import Job
from jql_engine.tokenizer import Tokenizer

SHORT_CHARACTERS = 62  # about 15 tokens of this corpus
HUGE_BYTES = 50_000_000
GROUP_BYTES = 1_000_000_000


def main(
    bundle: Annotated[Path, typer.Option()],
    corpus: Annotated[Path, typer.Option(help="Parquet with columns `text` and `lang`.")],
    name: Annotated[str, typer.Option(help="Of the result file.")],
    case: Annotated[list[str] | None, typer.Option(help="Only these; repeat.")] = None,
    rounds: Annotated[int, typer.Option()] = 3,
) -> None:
    """Measure and write benchmarks/results/NAME.json."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for label in case or CASES:
            source = Path(folder, label)
            source.mkdir()
            CASES[label](corpus, source)
            rows.append(_measure(label, bundle, source, rounds))
            print_rows(rows[-1:])
    print(write_result(name, rows, {"corpus": corpus.name, "rounds": rounds, "bundle_max_tokens": _max_tokens(bundle)}))


def _measure(label: str, bundle: Path, source: Path, rounds: int) -> Row:
    context, row = multiprocessing.get_context("spawn"), None
    for _ in range(rounds):
        ours, theirs = context.Pipe()
        process = context.Process(target=_job, args=(theirs, bundle, source))
        process.start()
        documents, tokens, seconds, peak, stages = ours.recv()
        process.join()
        row = row or Row("feed", label, "zero", documents, tokens)
        row.seconds.append(round(seconds, 3))
        row.peak_memory_mib = max(row.peak_memory_mib, peak)
        row.stages = stages
    assert row is not None
    row.finish()
    return row


def _job(result: multiprocessing.connection.Connection, bundle: Path, source: Path) -> None:
    opened = Bundle.open(bundle)
    with tempfile.TemporaryDirectory() as folder:
        job = Job((str(source),), Path(folder, "scores"))
        meter = run_job(job, opened, ZeroSession(opened), Tokenizer.of(opened), "cuda")
    result.send((meter.documents, meter.tokens, meter.seconds, peak_memory_mib(), meter.shares()))


def _max_tokens(bundle: Path) -> int:
    found = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))["max_tokens"]
    return int(found)


def _texts(corpus: Path) -> list[str]:
    return [text for text in pq.read_table(corpus, columns=["text"])["text"].to_pylist() if text]


def _write(file: Path, texts: list[str], row_group_size: int = 100_000) -> None:
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), file, row_group_size=row_group_size)


def _corpus(corpus: Path, folder: Path) -> None:
    (folder / "corpus.parquet").symlink_to(corpus.resolve())


def _small_files(corpus: Path, folder: Path) -> None:
    texts = _texts(corpus)
    for i in range(1000):
        _write(folder / f"{i:04}.parquet", texts[10 * i : 10 * i + 10])


def _short(corpus: Path, folder: Path, n_rows: int) -> None:
    whole = " ".join(_texts(corpus))
    per_pass = len(whole) // SHORT_CHARACTERS
    shifts = -(-n_rows // per_pass)
    starts = (
        i * SHORT_CHARACTERS + SHORT_CHARACTERS * shift // shifts for shift in range(shifts) for i in range(per_pass)
    )
    _write(folder / "short.parquet", [whole[start : start + SHORT_CHARACTERS] for start in islice(starts, n_rows)])


def _huge(corpus: Path, folder: Path, spaceless: bool) -> None:
    table = pq.read_table(corpus, columns=["text", "lang"]).to_pylist()
    wanted = [r["text"] for r in table if r["text"] and (r["lang"] in ("zh", "ja")) == spaceless]
    parts, size = [], 0
    for text in _shuffled(wanted):
        parts.append("".join(text.split()) if spaceless else text)
        size += len(parts[-1].encode())
        if size > HUGE_BYTES:
            break
    ordinary = _texts(corpus)[:1000]
    _write(folder / "huge.parquet", [*ordinary[:500], ("" if spaceless else "\n").join(parts), *ordinary[500:]])


def _shuffled(texts: list[str]) -> Iterator[str]:
    """The texts again and again, in another order each time."""
    rng = np.random.default_rng(0)
    while True:
        yield from (texts[i] for i in rng.permutation(len(texts)))


def _large_group(corpus: Path, folder: Path) -> None:
    lengthened, size = [], 0
    source = _shuffled(_texts(corpus))
    while size < GROUP_BYTES:
        lengthened.append("\n".join(islice(source, 25)))
        size += len(lengthened[-1].encode())
    _write(folder / "group.parquet", lengthened, row_group_size=len(lengthened))


CASES: dict[str, Callable[[Path, Path], None]] = {
    "corpus": _corpus,
    "small_files": _small_files,
    "short_100k": lambda corpus, folder: _short(corpus, folder, 100_000),
    "short_2m": lambda corpus, folder: _short(corpus, folder, 2_000_000),
    "huge_document": lambda corpus, folder: _huge(corpus, folder, spaceless=False),
    "huge_spaceless": lambda corpus, folder: _huge(corpus, folder, spaceless=True),
    "large_group": _large_group,
}

if __name__ == "__main__":
    typer.run(main)
