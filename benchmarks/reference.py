"""What users run today: transformers on padded batches and on one document at a time; sentence-transformers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from jql_engine.batching import plan_batches
from jql_engine.data import Budget, TokenBatch
from jql_export.reference import load_encoder


class TransformersEncoder:
    """The checkpoint's own class with sdpa attention and L2-normalized pooling."""

    def __init__(self, directory: Path, pooling: str, dtype: torch.dtype, device: str = "cpu") -> None:
        """Load in `dtype` on `device`, as PyTorch calls it."""
        self.model, self.pooling, self.device = load_encoder(directory, dtype).to(device), pooling, device

    @torch.inference_mode()
    def embed(self, tokens: TokenBatch, budget_tokens: int) -> np.ndarray:
        """Embeddings [N, D] of documents sorted by length, in padded batches; a budget of 1 takes them one by one."""
        out = np.empty((len(tokens.rows), self.model.config.hidden_size), np.float32)
        for rows, ids, mask in _batches(tokens, budget_tokens, self.device):
            hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
            if self.pooling == "cls":
                pooled = hidden[:, 0]
            else:
                weights = torch.ones_like(ids) if mask is None else mask
                pooled = (hidden * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
            out[rows] = nn.functional.normalize(pooled.float(), dim=1).cpu().numpy()
        return out


class SentenceEncoder:
    """The checkpoint as sentence-transformers runs it: texts sorted by length, tokenized and padded batch by batch."""

    def __init__(self, directory: Path, pooling: str, max_tokens: int, dtype: torch.dtype, device: str) -> None:
        """Load in `dtype` on `device`; ImportError where the package is missing."""
        from sentence_transformers import SentenceTransformer

        with tempfile.TemporaryDirectory() as folder:
            write_modules(directory, Path(folder), pooling, max_tokens)
            self.model = SentenceTransformer(folder, device=device, model_kwargs={"dtype": dtype})

    def embed(self, texts: list[str], n_docs: int) -> torch.Tensor:
        """Embeddings [N, D] on the device, in batches of `n_docs`."""
        return self.model.encode(
            texts, batch_size=n_docs, normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False
        )


def write_modules(encoder: Path, folder: Path, pooling: str, max_tokens: int) -> None:
    """A folder in the format of sentence-transformers, every version's: links to the checkpoint, and its pooling."""
    for file in encoder.resolve().iterdir():
        if file.is_file() and file.name not in ("modules.json", "sentence_bert_config.json"):
            (folder / file.name).symlink_to(file)
    width = json.loads((encoder / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    modes = {f"pooling_mode_{name}": name.startswith(pooling) for name in ("cls_token", "mean_tokens")}
    for name, content in {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": max_tokens, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": width} | modes,
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


def _batches(
    tokens: TokenBatch, budget: int, device: str
) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor | None]]:
    for batch in plan_batches(tokens, Budget(budget, "padded")):
        ids, mask = (torch.from_numpy(array).to(device) for array in batch.rectangle(pad_id=1))
        yield batch.rows, ids, mask if batch.n_padding else None
