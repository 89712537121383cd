"""How far FinePDFs' own windows are from ours: what cutting characters and tokenizing again changes in the scores.

Method. FinePDFs labels the first 10,000 characters of a document, and where it has more than 20,000 the last 10,000
too, cut to the model's tokens; these are decoded, trimmed to white space and tokenized again, and the larger score
counts. Ours are windows of the document's ids (`--windows first+last --aggregate max`). Both are scored by the same
session, on the documents of a corpus that are longer than a window.

    python -m benchmarks.finepdfs --bundle BUNDLE --corpus PARQUET --documents 200
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from tokenizers import Tokenizer as Oracle

from jql_engine.bundle import TOKENIZER
from jql_engine.engine import Engine

CHARACTERS = 10_000
LONG = 20_000
LETTERS = 4  # of a token, about: shorter texts are not looked at
SPARE = 2  # tokens that FinePDFs leaves beside the special ones


def published_windows(text: str, oracle: Oracle, room: int) -> list[str]:
    """The texts that FinePDFs' pipeline scores of a document."""
    pieces = [text[:CHARACTERS], *([text[-CHARACTERS:]] if len(text) > LONG else [])]
    windows = []
    for number, piece in enumerate(pieces):
        ids = oracle.encode(piece, add_special_tokens=False).ids
        if len(ids) <= room:
            windows.append(piece)
            continue
        decoded = oracle.decode(ids[:room] if number == 0 else ids[-room:])
        head, _, tail = decoded.rpartition(" ") if number == 0 else decoded.partition(" ")
        windows.append((head if number == 0 else tail) or decoded)
    return windows


def main(
    bundle: Annotated[Path, typer.Option(help="A bundle.")],
    corpus: Annotated[Path, typer.Option(help="Parquet with a column `text`.")],
    documents: Annotated[int, typer.Option(help="Documents longer than a window.")] = 200,
) -> None:
    """Print the differences of the scores as JSON."""
    ours = Engine(bundle, device="cpu", variant="cpu-fp32", windows="first+last", aggregate="max")
    first = Engine(ours.bundle, device="cpu", variant="cpu-fp32", windows="first")
    oracle = Oracle.from_file(str(ours.bundle.path / TOKENIZER))
    texts = pq.read_table(corpus, columns=["text"])["text"].to_pylist()
    long = [text for text in texts if len(text) > LETTERS * ours.windows.room][: 2 * documents]
    found = ours.score(pa.array(long, pa.large_string()))
    assert found.n_windows is not None
    chosen = np.flatnonzero(found.n_windows > 1)[:documents]
    windows = [published_windows(long[i], oracle, ours.windows.room - SPARE) for i in chosen]
    scores = first.score([window for one in windows for window in one]).values
    starts = np.cumsum([0, *(len(one) for one in windows[:-1])])
    difference = np.abs(np.maximum.reduceat(scores, starts) - found.values[chosen])
    spread = found.values[chosen].std(axis=0)
    figures = {
        head: {
            "median": round(float(np.median(difference[:, i])), 4),
            "p99": round(float(np.quantile(difference[:, i], 0.99)), 4),
            "standard_deviation_of_scores": round(float(spread[i]), 4),
        }
        for i, head in enumerate(ours.heads)
    }
    print(json.dumps({"documents": len(chosen), "max_tokens": ours.tokenizer.max_tokens, "difference": figures}))


if __name__ == "__main__":
    typer.run(main)
