"""Does the host keep a GPU busy? jql-run's pipeline in front of a GPU that takes as long as one would.

Method. The published onnxruntime-gpu runs on the recorder (benchmarks.recorder): its clock gives every matrix product
the time that it takes at a given rate, one after another, and nothing else takes any. All that the host does is real:
reading, tokenizing, planning, packing, some 180 launches a batch, copies, parquet. Scores are not to be had, and no
figure here says how fast a GPU is: `engine` is what the chosen rate amounts to, `end_to_end` is how much of that the
host lets through. The documents are the first of the corpus.

    python -m benchmarks.host --bundle BUNDLE --corpus CORPUS.parquet --name NAME

starts itself once for each rate, in the recorder's environment. The last line of stdout is the path of the JSON it
wrote, benchmarks/results/NAME.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import pyarrow.parquet as pq
import typer

from benchmarks.recorder import IS_RECORDED, MISSING, ROOT, Recorder, provider_version
from benchmarks.table import GpuRow, print_rows, write_result
from jql_engine.bundle import Bundle
from jql_engine.data import DocumentBatch
from jql_engine.engine import as_texts
from jql_engine.tokenizer import Tokenizer

TFLOPS = (317, 423, 528)  # with Snowflake's shape about 1.5, 2.0 and 2.5 million tokens a second
VARIANT, BUDGET = "cuda-fp16", 65_536


def main(
    bundle: Annotated[Path, typer.Option()],
    corpus: Annotated[Path, typer.Option(help="Parquet with a column `text`.")],
    name: Annotated[str, typer.Option(help="Of the result file.")],
    documents: Annotated[int, typer.Option()] = 12_000,
    rounds: Annotated[int, typer.Option()] = 3,
    tflops: Annotated[list[int] | None, typer.Option(help="Rate of matrix products, 10^12 FLOP/s; repeat.")] = None,
) -> None:
    """Measure and write benchmarks/results/NAME.json."""
    if IS_RECORDED:
        print(json.dumps([asdict(row) for row in measure(bundle, corpus, documents, rounds)]))
        return
    if MISSING:
        raise typer.BadParameter(MISSING)
    rows: list[GpuRow] = []
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder.build(Path(folder))
        for rate in tflops or TFLOPS:
            options = [f"--bundle={bundle.resolve()}", f"--corpus={corpus.resolve()}", f"--name={name}"]
            options += [f"--documents={documents}", f"--rounds={rounds}"]
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.host", *options],
                cwd=ROOT, env=recorder.environment(tflops=rate), stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            found = [GpuRow(**fields) for fields in json.loads(done.stdout.splitlines()[-1])]
            for row in found:
                if row.note:
                    raise SystemExit(f"{row.what}: {row.note}")
                row.note = f"products at {rate} TFLOP/s"
            print_rows(found)
            rows += found
    settings = {"corpus": corpus.name, "documents": documents, "rounds": rounds}
    print(write_result(name, rows, settings, versions={"onnxruntime-gpu": provider_version()}))


def measure(bundle: Path, corpus: Path, n_docs: int, rounds: int) -> list[GpuRow]:
    """The rows engine and end_to_end in front of this process's GPU."""
    from benchmarks.gpu import Sample, engines, time_case

    opened = Bundle.open(bundle)
    texts = [text for text in pq.read_table(corpus, columns=["text"])["text"].to_pylist() if text][:n_docs]
    tokens = Tokenizer.of(opened).encode(DocumentBatch.of(as_texts(texts)))
    _, case = engines(Sample(bundle, opened, texts, tokens, "cuda:0"), [BUDGET], [VARIANT])
    for _ in range(rounds):
        time_case(case, tokens)
    for row in case.rows:
        row.finish()
    return case.rows


if __name__ == "__main__":
    typer.run(main)
