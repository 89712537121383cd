r"""What fp16 and bf16 do to scores: the CUDA graphs on real documents, in the ONNX reference evaluator.

Method. The graphs that export writes run node by node with the NumPy operators of benchmarks.operators: products and
sums in fp32, results rounded to the graph's type where the CUDA kernels do it; the order of their sums is another.
Expected are transformers' embeddings, one document at a time in fp32, and the heads in fp32. Packed batches are ragged
(4,096 tokens, as planned), single (each document alone) and of documents of equal length. Slow: 500 tokens a second.

    python -m benchmarks.precision --encoder DIR --bundle BUNDLE --corpus CORPUS.parquet --name NAME

The last line of stdout is the path of the JSON it wrote, benchmarks/results/NAME.json.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from onnx.reference import ReferenceEvaluator

from benchmarks.cases import Run, compare, scored, stacked_heads, take, time_once
from benchmarks.corpus import sample
from benchmarks.operators import OPERATORS
from benchmarks.profile import feeds_of
from benchmarks.reference import TransformersEncoder
from benchmarks.table import Row, print_rows, write_result
from jql_engine.batching import plan
from jql_engine.bundle import Bundle
from jql_engine.data import Batch, BatchOutput, Budget, ScoreBatch, TokenBatch
from jql_engine.tokenizer import Tokenizer
from jql_export.families.checkpoint import read_encoder
from jql_export.graph.encoder import write_graph
from jql_export.variants import VARIANTS

BATCH_TOKENS = 4096
CASES = (
    ("cuda-fp16", "ragged batches", BATCH_TOKENS),
    ("cuda-fp16", "documents alone", 1),
    ("cuda-fp16", "equal lengths", 0),
    ("cuda-bf16", "padded batches", BATCH_TOKENS),
)


def main(
    encoder: Annotated[Path, typer.Option()],
    bundle: Annotated[Path, typer.Option(help="Of the same encoder; any variant.")],
    corpus: Annotated[Path, typer.Option(help="Parquet with a column `text`.")],
    name: Annotated[str, typer.Option(help="Of the result file.")],
    documents: Annotated[int, typer.Option()] = 100,
    max_tokens: Annotated[int, typer.Option(help="Longest document of the sample.")] = 512,
) -> None:
    """Measure and write benchmarks/results/NAME.json."""
    import torch

    opened = Bundle.open(bundle)
    _, tokens = sample(corpus, documents, Tokenizer.of(opened), max_tokens)
    model = TransformersEncoder(encoder, opened.manifest.pooling, torch.float32)
    expected = scored(opened, model.embed(tokens, 1))
    heads = stacked_heads(opened)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for variant, how, budget in CASES:
            file = Path(folder, f"{variant}.onnx")
            if not file.exists():
                write_graph(file, read_encoder(encoder), heads, opened.manifest.pooling, VARIANTS[variant].dialect())
            row = Row("evaluator", how, variant, documents, len(tokens.ids))
            run = _run(opened, ReferenceEvaluator(str(file), new_ops=OPERATORS), variant, budget)
            compare(row, time_once(row, run, tokens, take(tokens, np.arange(1))), expected, opened.heads)
            row.finish()
            rows.append(row)
    print_rows(rows)
    print(write_result(name, rows, {"corpus": corpus.name, "documents": documents, "max_tokens": max_tokens}))


def _run(bundle: Bundle, graph: ReferenceEvaluator, variant: str, budget: int) -> Run:
    def run(tokens: TokenBatch) -> np.ndarray:
        scores = ScoreBatch.empty(tokens, len(bundle.heads))
        pad_id = bundle.manifest.tokenizer.pad if VARIANTS[variant].layout == "padded" else None
        for batch in _batches(tokens, variant, budget):
            scores.put(batch.rows, BatchOutput(*graph.run(["scores", "embedding"], feeds_of(batch, pad_id))))
        return scores.values

    return run


def _batches(tokens: TokenBatch, variant: str, budget: int) -> Iterator[Batch]:
    """Planned under `budget` tokens; 0: packed batches of documents of one length."""
    if budget:
        yield from plan(tokens, Budget(budget, VARIANTS[variant].layout))
        return
    for batch in plan(tokens, Budget(BATCH_TOKENS, "exact")):
        yield Batch(batch.rows, batch.ids, batch.offsets, None)


if __name__ == "__main__":
    typer.run(main)
