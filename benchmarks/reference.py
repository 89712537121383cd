"""What users run today: transformers on padded batches, and on one document at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from jql_engine.batching import plan
from jql_engine.data import Budget, TokenBatch
from jql_export.reference import load_encoder


class TransformersEncoder:
    """The checkpoint's own class with sdpa attention and L2-normalised pooling."""

    def __init__(self, directory: Path, pooling: str, dtype: torch.dtype) -> None:
        """Load in `dtype`."""
        self.model, self.pooling = load_encoder(directory, dtype), pooling

    @torch.inference_mode()
    def embed(self, tokens: TokenBatch, budget_tokens: int) -> np.ndarray:
        """Embeddings [N, D] of documents sorted by length, in padded batches; a budget of 1 takes them one by one."""
        out = np.empty((len(tokens.rows), self.model.config.hidden_size), np.float32)
        for rows, ids, mask in _batches(tokens, budget_tokens):
            hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
            if self.pooling == "cls":
                pooled = hidden[:, 0]
            else:
                weights = torch.ones_like(ids) if mask is None else mask
                pooled = (hidden * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
            out[rows] = nn.functional.normalize(pooled.float(), dim=1).numpy()
        return out


def _batches(tokens: TokenBatch, budget: int) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor | None]]:
    for batch in plan(tokens, Budget(budget, "padded")):
        ids, mask = map(torch.from_numpy, batch.rectangle(pad_id=1))
        yield batch.rows, ids, mask if batch.n_padding else None
