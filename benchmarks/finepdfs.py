"""How far FinePDFs' own windows are from ours: what cutting characters and tokenizing again changes in the scores.

Method. FinePDFs labels the first 10,000 characters of a document, and where it has more than 20,000 the last 10,000
too: each is cut to 2,046 tokens, decoded, trimmed by what stands beyond the outer white space, or by ten characters
where there is none, and tokenized again; the larger score counts. Ours are windows of the document's ids (`--windows
first+last --aggregate max`). Both are scored by the same session, on the documents of a corpus that are longer than a
window. For a bundle that reads other than 2,048 tokens, the characters are fewer or more in proportion.

    python -m benchmarks.finepdfs --bundle BUNDLE --corpus PARQUET --documents 200
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from tokenizers import Tokenizer as Oracle

from jql_engine.bundle import TOKENIZER
from jql_engine.engine import Engine

CHARACTERS, TOKENS = 10_000, 2_048  # of one end of a document, and of a window, special tokens included
LETTERS = 4  # of a token, about: shorter texts are not looked at
WITHOUT_SPACE = 10  # characters that go where there is no white space to trim at


def published_windows(text: str, oracle: Oracle, room: int, characters: int = CHARACTERS) -> list[str]:
    """The texts that FinePDFs' pipeline scores of a document, of which `room` ids are kept."""
    first = oracle.decode(oracle.encode(text[:characters], add_special_tokens=False).ids[:room])
    spaces = [match.start() for match in re.finditer(r"\s", first)]
    windows = [first[: spaces[-1] if spaces else -WITHOUT_SPACE]]
    if len(text) > 2 * characters:
        last = oracle.decode(oracle.encode(text[-characters:], add_special_tokens=False).ids[-room:])
        space = re.search(r"\s", last)
        windows.append(last[space.end() if space else WITHOUT_SPACE :])
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
    characters = CHARACTERS * ours.tokenizer.max_tokens // TOKENS
    windows = [published_windows(long[i], oracle, ours.windows.room, characters) for i in chosen]
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
