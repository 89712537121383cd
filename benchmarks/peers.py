"""Tokens per second beside what people would use on a CPU: sentence-transformers with each of its backends.

Method. The same documents, texts to vectors there and texts to scores here, tokenizing included. Every model is loaded
once and stays loaded, the peers' in a process of their own; a round times each in turn, so that a slow minute of a
shared machine hits every row, and the median of the rounds is reported. `encode` sorts by length and pads to the
longest of a batch: batches of 32, its default, and one document at a time, which pads nothing. The two shortest
documents warm up each.

    python -m venv peers
    peers/bin/pip install 'sentence-transformers>=5.7' 'optimum-intel[openvino]' 'optimum-onnx[onnxruntime]'
    python -m benchmarks.peers --python peers/bin/python --encoder DIR --bundle BUNDLE --corpus PARQUET --name NAME

The environment is its own because optimum-onnx pins transformers below 4.58. Its OpenVINO backend computes in bf16
unasked where the CPU has it. Scores are compared with those of the torch backend, one document at a time.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.cases import compare, scored
from benchmarks.corpus import sample
from benchmarks.table import Row, print_rows, write_result
from jql_engine.bundle import Bundle
from jql_engine.engine import Engine
from jql_engine.sessions.select import runnable
from jql_engine.tokenizer import Tokenizer

BACKENDS = ("torch", "onnx", "openvino")
PACKAGES = ("sentence-transformers", "transformers", "optimum-intel", "optimum-onnx", "openvino", "onnxruntime")
WORKER = Path(__file__).with_name("peers_worker.py")
Timed = Callable[[list[str]], tuple[float, np.ndarray]]  # seconds, and scores [N, H]


class Peer:
    """A process with one backend of sentence-transformers."""

    def __init__(self, python: Path, encoder: Path, backend: str, bundle: Bundle, max_tokens: int) -> None:
        self._bundle = bundle
        arguments = [python, WORKER, encoder.resolve(), backend, bundle.manifest.pooling, max_tokens]
        self._process = subprocess.Popen(
            list(map(str, arguments)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def encode(self, texts: list[str], batch_size: int) -> tuple[float, np.ndarray]:
        """Seconds, and the scores that the bundle's heads give to the vectors."""
        assert self._process.stdin is not None
        with tempfile.NamedTemporaryFile(suffix=".npy") as out:
            self._process.stdin.write(json.dumps({"texts": texts, "batch_size": batch_size, "out": out.name}) + "\n")
            self._process.stdin.flush()
            return float(self._answer()), scored(self._bundle, np.load(out.name))

    def _answer(self) -> str:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return line
        raise SystemExit(f"{self._process.args} ended with {self._process.wait()}; see its error above")


def main(
    encoder: Annotated[Path, typer.Option(help="Checkpoint directory.")],
    bundle: Annotated[Path, typer.Option(help="Bundle of that checkpoint, with heads.")],
    corpus: Annotated[Path, typer.Option(help="Parquet with a column `text`.")],
    name: Annotated[str, typer.Option(help="Name of the result file.")],
    python: Annotated[Path, typer.Option(help="Python of the environment with sentence-transformers.")],
    documents: Annotated[int, typer.Option(help="Documents in the sample.")] = 100,
    rounds: Annotated[int, typer.Option(help="Times that each row is measured.")] = 3,
) -> None:
    """Measure and write benchmarks/results/NAME.json."""
    opened = Bundle.open(bundle)
    longest = opened.manifest.max_tokens
    texts, tokens = sample(corpus, documents, Tokenizer.of(opened), longest)
    n_tokens = len(tokens.ids)
    cases: list[tuple[Row, Timed]] = []
    for backend in BACKENDS:
        peer = Peer(python, encoder, backend, opened, longest)
        for batch_size, how in ((1, "one at a time"), (32, "batches of 32")):
            row = Row("peer", f"sentence-transformers, {how}", backend, documents, n_tokens)
            cases.append((row, lambda texts, peer=peer, size=batch_size: peer.encode(texts, size)))
    for variant in runnable(opened, "cpu"):
        engine = Engine(opened, "cpu", variant)
        row = Row("engine", "jql-engine, texts to scores", variant, documents, n_tokens)
        cases.append((row, lambda texts, engine=engine: _score(engine, texts)))
    shortest = sorted(texts, key=len)[:2]
    expected: np.ndarray | None = None
    for _ in range(rounds):
        for row, run in cases:
            run(shortest)
            seconds, found = run(texts)
            row.seconds.append(round(seconds, 3))
            expected = found if expected is None else expected
            compare(row, found, expected, opened.heads)
            print(f"{row.name} {row.variant}: {n_tokens / seconds:,.0f} tokens/s", flush=True)
    for row, _ in cases:
        row.finish()
    print_rows([row for row, _ in cases])
    settings = {"corpus": corpus.name, "documents": documents, "max_tokens": longest, "rounds": rounds}
    print(write_result(name, [row for row, _ in cases], settings | {"peers": package_versions(python, PACKAGES)}))


def _score(engine: Engine, texts: list[str]) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    values = engine.score(texts).values
    return time.perf_counter() - start, values


def package_versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """Versions of `packages` in the environment of `python`."""
    code = f"import json, importlib.metadata as m; print(json.dumps({{p: m.version(p) for p in {tuple(packages)}}}))"
    return dict(json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout))


if __name__ == "__main__":
    typer.run(main)
