"""Are the scores that jql-run wrote the scores of the original? Against transformers and the Lightning heads, fp32.

Nothing of this project computes the expected side: AutoTokenizer with truncation, AutoModel one document at a time,
pooling, L2 norm, and each checkpoint's own two layers. Compared are every id, token id, count and score.

    jql-run CORPUS.parquet --bundle BUNDLE --out SCORES --device cpu
    python -m benchmarks.fidelity --corpus CORPUS.parquet --scores SCORES/CORPUS.parquet --bundle BUNDLE \
        --encoder DIR --head NAME=FILE.ckpt --head ...

The last line of stdout is one JSON object; exit 1 where a figure is out of tolerance.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow.parquet as pq
import torch
import typer
from scipy.stats import spearmanr
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from jql_engine.bundle import Bundle
from jql_engine.data import DocumentBatch, score_column
from jql_engine.engine import as_texts
from jql_engine.tokenizer import Tokenizer
from jql_export.reference import load_encoder
from jql_export.tolerances import TOLERANCES


def main(
    corpus: Annotated[Path, typer.Option()],
    scores: Annotated[Path, typer.Option(help="What jql-run wrote for the corpus.")],
    bundle: Annotated[Path, typer.Option()],
    encoder: Annotated[Path, typer.Option()],
    head: Annotated[list[str], typer.Option(help="NAME=FILE.ckpt")],
) -> None:
    """Compare and report."""
    opened = Bundle.open(bundle)
    source, found = pq.read_table(corpus), pq.read_table(scores)
    texts = source["text"].to_pylist()
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    ids = [_encode(tokenizer, text, opened.manifest.max_tokens) for text in texts]
    ours = Tokenizer.of(opened).encode(DocumentBatch.of(as_texts(texts)))
    expected = _scores(encoder, opened.manifest.pooling, [value.partition("=")[2] for value in head], ids)
    names = [value.partition("=")[0] for value in head]
    values = np.stack([found[score_column(name)].to_numpy() for name in names], axis=1)
    pairs = zip(np.split(ours.ids, ours.offsets[1:-1]), ids, strict=True)
    result = {
        "documents": len(texts),
        "tokens": sum(map(len, ids)),
        "shortest": min(map(len, ids)),
        "longest": max(map(len, ids)),
        "truncated": int(sum(found["truncated"].to_pylist())),
        "same_ids_in_order": found["id"].to_pylist() == source["id"].to_pylist(),
        "same_token_ids": all(np.array_equal(a, b) for a, b in pairs),
        "same_n_tokens": found["n_tokens"].to_pylist() == list(map(len, ids)),
        "max_abs_score": float(np.abs(values - expected).max()),
        "score_range": [float(expected.min()), float(expected.max())],
        "spearman": {name: round(float(spearmanr(values[:, i], expected[:, i])[0]), 7) for i, name in enumerate(names)},
    }
    print(json.dumps(result))
    same = result["same_ids_in_order"] and result["same_token_ids"] and result["same_n_tokens"]
    raise typer.Exit(0 if same and result["max_abs_score"] <= TOLERANCES["fp32"].score else 1)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int) -> np.ndarray:
    return np.array(tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"])


@torch.inference_mode()
def _scores(encoder: Path, pooling: str, heads: list[str], ids: list[np.ndarray]) -> np.ndarray:
    model, layers = load_encoder(encoder), [_head(file) for file in heads]
    out = []
    for document in ids:
        hidden = model(input_ids=torch.from_numpy(document)[None]).last_hidden_state
        embedding = nn.functional.normalize(hidden[:, 0] if pooling == "cls" else hidden.mean(1), dim=1)
        out.append(torch.cat([layer(embedding) for layer in layers], dim=1).numpy()[0])
    return np.stack(out)


def _head(file: str) -> nn.Sequential:
    state = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    hidden, width = state["layer1.weight"].shape
    head = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 1))
    head.load_state_dict(
        {f"{i}.{part}": state[f"layer{n}.{part}"] for i, n in ((0, 1), (2, 2)) for part in ("weight", "bias")}
    )
    return head


if __name__ == "__main__":
    typer.run(main)
