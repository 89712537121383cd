"""Are a classifier's logits those of transformers in the full published shape, and how fast are they computed?

Method. A checkpoint of the family's published shape is written with random weights (classifier_models.py), exported
with `jql-export --classifier`, and run in processes of their own (classifiers_worker.py), so that each has its own peak
memory:

    reference   transformers' own class, fp32: one document at a time, and longest first in padded batches of 8
    engine      the bundle's graphs, texts to logits
    peer        sentence-transformers' CrossEncoder with its OpenVINO backend, in the same two ways; it computes in bf16
                unasked where the CPU has it. Only with --python, and where optimum-intel can export the family

Correctness, on `--documents` real texts, joined or cut to lengths of 1 to the most tokens, four of each length so that
batches hold several: ids equal to AutoTokenizer's, largest difference of the logits to transformers one at a time, and
in fp32 that of a document alone to the same in batches. Up to `--usual` tokens lengths are spaced geometrically, and
2 % of the documents are longer, the last one longer than the model reads. Where the model reads no more than `--usual`,
lengths are spaced evenly.

Speed, on `--timed` of them, evenly chosen of those up to `--usual`, tokenizing included: each round times every row in
turn, so that a slow minute of a shared machine hits all, and the median of the rounds is reported. Last, speed and peak
memory of each for the longest document alone.

    python -m benchmarks.classifiers --family modernbert-base --corpus PARQUET --work FOLDER --python peers/bin/python

`--vocabulary` is the folder of a tokenizer, for the families with XLM-R's: such a one cannot be trained on a small
corpus. The environment of `--python` is that of peers.py. The last line of stdout is the path of the JSON it wrote,
benchmarks/results/classifiers-FAMILY.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer

from benchmarks.cases import compare
from benchmarks.classifier_models import SHAPES, write_classifier
from benchmarks.corpus import of_lengths
from benchmarks.peers import package_versions
from benchmarks.table import Row, print_rows, write_result
from jql_engine.bundle import Bundle
from jql_engine.data import DocumentBatch
from jql_engine.sessions.select import runnable
from jql_engine.tokenizer import Tokenizer

WORKER = Path(__file__).with_name("classifiers_worker.py")
VARIANTS = ("cpu-fp32", "openvino-bf16")
SAME_LENGTH = 4  # documents
LONG = 50  # of so many documents, one is longer than the usual ones
PADDED = 8  # documents in a batch


@dataclass(slots=True)
class Sample:
    """Texts, and how many tokens the model reads of each."""

    texts: list[str]
    tokens: np.ndarray  # int64 [N]

    def only(self, index: Sequence[int]) -> Sample:
        """Some of them."""
        return Sample([self.texts[i] for i in index], self.tokens[list(index)])


class Process:
    """A classifier in a process of its own; see classifiers_worker.py."""

    def __init__(self, python: Path, how: str, model: Path, max_tokens: int) -> None:
        arguments = [python, WORKER, how, model.resolve(), max_tokens]
        self._process = subprocess.Popen(
            list(map(str, arguments)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def run(self, texts: list[str], batch_size: int) -> tuple[np.ndarray, float, int]:
        """Logits [N, outputs], seconds, and the peak of the memory in MiB."""
        assert self._process.stdin is not None
        with tempfile.NamedTemporaryFile(suffix=".npy") as out:
            self._process.stdin.write(json.dumps({"texts": texts, "batch_size": batch_size, "out": out.name}) + "\n")
            self._process.stdin.flush()
            seconds, peak = self._answer().split()
            return np.load(out.name), float(seconds), int(peak)

    def close(self) -> None:
        """End it."""
        self._process.communicate()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return line
        raise SystemExit(f"{self._process.args} ended with {self._process.wait()}; see its error above")


@dataclass(slots=True)
class Case:
    """A row, the process that computes it, and how many documents it takes at a time; 0: as it likes."""

    row: Row
    process: Process
    batch_size: int


def main(
    family: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")],
    corpus: Annotated[Path, typer.Option(help="Parquet with a column `text`.")],
    work: Annotated[Path, typer.Option(help="Folder for checkpoint, bundle and logits; what is there is used again.")],
    python: Annotated[Path | None, typer.Option(help="Python of the environment with sentence-transformers.")] = None,
    vocabulary: Annotated[Path | None, typer.Option(help="Folder of a tokenizer to use.")] = None,
    documents: Annotated[int, typer.Option(help="To check.")] = 200,
    usual: Annotated[int, typer.Option(help="Most tokens of all documents but 2 %.")] = 1_500,
    timed: Annotated[int, typer.Option(help="Documents to time.")] = 24,
    rounds: Annotated[int, typer.Option(help="Times that each row is measured.")] = 3,
) -> None:
    """Check, measure and write benchmarks/results/classifiers-FAMILY.json."""
    model, bundle, export_seconds = _prepare(family, corpus, work / family, vocabulary)
    max_tokens = bundle.manifest.max_tokens
    wanted = lengths(documents, max_tokens, usual)
    sample = _sample(bundle, of_lengths(corpus, wanted, model / "tokenizer.json"))
    settings: dict[str, object] = {
        "corpus": corpus.name, "max_tokens": max_tokens, "rounds": rounds, "export_seconds": export_seconds,
        "ids_equal": _equal_ids(bundle, model, sample.texts),
    }  # fmt: skip
    few = sample.only(np.flatnonzero(sample.tokens <= usual)[:: max(1, documents // timed)][:timed].tolist())
    cases = _cases(model, bundle, python, few)
    settings["checked"] = _check(cases, sample, bundle.heads, work / family / f"logits-{documents}-{usual}")
    for _ in range(rounds):
        for case in cases:
            _, seconds, case.row.peak_memory_mib = case.process.run(few.texts, case.batch_size)
            case.row.seconds.append(round(seconds, 3))
            print(f"{case.row.name} {case.row.variant}: {case.row.tokens / seconds:,.0f} tokens/s", flush=True)
    settings["longest"] = _longest(cases, sample)
    rows = [case.row for case in cases]
    for row in rows:
        row.finish()
    print_rows(rows)
    packages = ("sentence-transformers", "transformers", "optimum-intel", "openvino")
    peers = package_versions(python, packages) if python else {}
    print(write_result(f"classifiers-{family}", rows, settings | {"peers": peers}))


def lengths(n: int, max_tokens: int, usual: int) -> list[int]:
    """Of `n` documents in tokens, special ones not counted, shortest first; see the method above."""
    if max_tokens <= usual:
        spaced = np.linspace(1, 1.2 * max_tokens, -(-n // SAME_LENGTH))
        return np.repeat(spaced.astype(int), SAME_LENGTH)[:n].tolist()
    n_long = max(1, n // LONG)
    spaced = np.geomspace(1, usual - 2, -(-(n - n_long) // SAME_LENGTH))
    longer = np.geomspace(1.2 * max_tokens, 2 * usual, n_long)[::-1]
    return [*np.repeat(spaced.astype(int), SAME_LENGTH)[: n - n_long].tolist(), *longer.astype(int).tolist()]


def _prepare(family: str, corpus: Path, folder: Path, vocabulary: Path | None) -> tuple[Path, Bundle, float]:
    """Checkpoint, bundle, and the seconds of its export; what is there already took none."""
    model, out = folder / "model", folder / "bundle"
    texts = [text for text in pq.read_table(corpus, columns=["text"])["text"].to_pylist() if text]
    if not model.exists():
        write_classifier(model, SHAPES[family], texts, vocabulary=vocabulary)
    start = time.perf_counter()
    if not out.exists():
        command = [sys.executable, "-m", "jql_export.cli", "--classifier", f"{family}={model}", "--out", str(out)]
        subprocess.run([*command, *(part for one in VARIANTS for part in ("--variant", one))], check=True)
    return model, Bundle.open(out), round(time.perf_counter() - start, 1)


def _sample(bundle: Bundle, texts: list[str]) -> Sample:
    tokens = Tokenizer.of(bundle).encode(DocumentBatch.of(pa.array(texts, pa.large_string())))
    return Sample(texts, tokens.lengths)


def _equal_ids(bundle: Bundle, model: Path, texts: list[str]) -> str:
    """On how many texts ids and truncation are those of transformers' AutoTokenizer."""
    import transformers

    tokens = Tokenizer.of(bundle).encode(DocumentBatch.of(pa.array(texts, pa.large_string())))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    expected = tokenizer(texts, truncation=True, max_length=bundle.manifest.max_tokens)["input_ids"]
    found = np.split(tokens.ids, tokens.offsets[1:-1])
    return f"{sum(a.tolist() == b for a, b in zip(found, expected, strict=True))} of {len(texts)}"


def _cases(model: Path, bundle: Bundle, python: Path | None, few: Sample) -> list[Case]:
    n_docs, n_tokens, longest = len(few.texts), int(few.tokens.sum()), bundle.manifest.max_tokens
    here = Path(sys.executable)
    loaded = Process(here, "transformers", model, longest)
    ways = ((1, "one at a time"), (PADDED, f"batches of {PADDED}, padded"))
    cases = [
        Case(Row("reference", f"transformers, {way}", "fp32", n_docs, n_tokens), loaded, size) for size, way in ways
    ]
    for variant in (name for name in VARIANTS if name in runnable(bundle, "cpu")):
        row = Row("engine", "jql-engine, texts to logits", variant, n_docs, n_tokens)
        cases.append(Case(row, Process(here, variant, bundle.path, longest), 0))
    if python is not None and _exported(python, model):
        loaded = Process(python, "openvino", model, longest)
        for size, way in ways:
            row = Row("peer", f"sentence-transformers, {way}", "openvino", n_docs, n_tokens)
            cases.append(Case(row, loaded, size))
    return cases


def _exported(python: Path, model: Path) -> bool:
    """Whether optimum-intel can export this model."""
    out = model / "openvino"
    if not out.exists():
        command = [python, WORKER, "openvino-export", model, out]
        done = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True)
        if done.returncode:
            print(f"no peer: {done.stderr.strip().splitlines()[-1]}")
    return out.exists()


def _check(cases: list[Case], sample: Sample, heads: tuple[str, ...], kept: Path) -> dict[str, object]:
    """What the logits of all documents differ by; rows get theirs as well. Logits are kept in a folder."""
    expected = _logits(cases[0], sample, 1, kept)
    found: dict[str, object] = {
        "documents": len(sample.texts), "tokens": int(sample.tokens.sum()), "shortest": int(sample.tokens.min()),
        "longest": int(sample.tokens.max()), "standard_deviation": round(float(expected.std(0).mean()), 3),
    }  # fmt: skip
    for case in (case for case in cases if case.row.what == "engine"):
        logits = _logits(case, sample, 0, kept)
        compare(case.row, logits, expected, heads)
        figures = {"largest_difference": case.row.score_difference}
        if case.row.variant.endswith("fp32"):
            difference = np.abs(_logits(case, sample, 1, kept) - logits).max()
            figures["alone_to_batches"] = float(f"{difference:.2e}")
        found[case.row.variant] = figures
        print(f"{case.row.variant}: {figures}", flush=True)
    for case in (case for case in cases if case.row.what == "peer"):
        few = sample.only(range(0, len(sample.texts), 10))
        compare(case.row, _logits(case, few, case.batch_size, kept), expected[::10], heads)
    return found


def _logits(case: Case, sample: Sample, batch_size: int, kept: Path) -> np.ndarray:
    """Of the sample, from an earlier run where there was one."""
    file = kept / f"{case.row.what}-{case.row.variant}-{batch_size}.npy"
    if not file.exists():
        kept.mkdir(exist_ok=True)
        logits, seconds, _ = case.process.run(sample.texts, batch_size)
        print(f"{file.stem}: {sample.tokens.sum():,} tokens in {seconds:.0f} s", flush=True)
        np.save(file, logits)
    found: np.ndarray = np.load(file)
    return found


def _longest(cases: list[Case], sample: Sample) -> dict[str, object]:
    """Speed and peak memory for the longest document alone, once, by row; padding has no part in it."""
    one = sample.only([int(sample.tokens.argmax())])
    n_tokens = int(one.tokens[0])
    found: dict[str, object] = {"tokens": n_tokens}
    for case in cases:
        if case.batch_size != PADDED:
            _, seconds, peak = case.process.run(one.texts, 1)
            speed = round(n_tokens / seconds, 1)
            found[f"{case.row.what} {case.row.variant}"] = {"tokens_per_second": speed, "peak_memory_mib": peak}
    return found


if __name__ == "__main__":
    typer.run(main)
