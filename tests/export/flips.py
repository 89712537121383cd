"""Flips of the packed CUDA graph against PyTorch, its operators computed by NumPy: no GPU is needed.

    python -m tests.export.flips --bundle BUNDLE --encoder DIRECTORY --head NAME=FILE --corpus CORPUS [--documents 200]

The counterpart of `jql-export --certify` for graphs that cannot run here; a minute or more for a hundred documents of a
small encoder. Prints a line of JSON: of each precision the largest difference and the shares that change sides.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from jql_engine.bundle import Bundle
from jql_engine.certificate import CUT
from jql_engine.decision.comparison import Paired, compare, flips_at
from jql_export.certificate import draw
from jql_export.families.read import read_encoder
from jql_export.graph.cuda_packed import CudaDialect
from jql_export.graph.encoder import write_graph
from jql_export.readouts.head_file import read_head
from jql_export.reference import Reference
from tests.export.test_cuda_packed import Written

BUDGET = 2_048  # tokens of a batch


def main(
    bundle: Annotated[Path, typer.Option(help="A bundle of the encoder and heads: its tokenizer, pooling, length.")],
    encoder: Annotated[Path, typer.Option(help="The encoder's checkpoint.")],
    head: Annotated[list[str], typer.Option(help="NAME=FILE; repeat.")],
    corpus: Annotated[str, typer.Option(help="Documents, of which some are drawn.")],
    documents: Annotated[int, typer.Option(help="How many of them.")] = 200,
    text_column: Annotated[str, typer.Option(help="Column with the documents.")] = "text",
) -> None:
    opened = Bundle.open(bundle)
    pooling = opened.manifest.pooling
    heads = [read_head(name, Path(file)) for name, _, file in (one.partition("=") for one in head)]
    tokens = draw(opened, corpus, text_column, documents).tokens
    expected = Reference(encoder, heads, pooling).run(tokens)
    found = {"documents": len(tokens.rows), "tokens": int(tokens.lengths.sum())}
    nobody = np.zeros(len(tokens.rows), np.int64)
    for precision, dtype in (("fp32", np.float32), ("fp16", np.float16)):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "packed.onnx"
            write_graph(file, read_encoder(encoder), heads, pooling, CudaDialect(dtype))
            _, scores = Written(file, tokens, expected).run(BUDGET)
        whole = compare(Paired(opened.heads, expected.scores.T, scores.T, tokens.lengths, nobody, (None,))).whole
        found[f"cuda-{precision}"] = {
            "greatest_difference": float(max(one.greatest for one in whole.differences)),
            "flips": {one.what: [one.share, *one.interval] for one in flips_at(whole, CUT)},
        }
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    typer.run(main)
