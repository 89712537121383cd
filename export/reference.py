"""The plain PyTorch model: the oracle that every graph is measured against.

The encoder is the class that transformers itself has for the checkpoint, an implementation independent of ours, in
fp32, one document at a time and therefore without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import AutoModel

from jql_engine.data import TokenBatch
from jql_engine.errors import CheckpointError
from jql_export.checkpoint import Array
from jql_export.graph import Pooling
from jql_export.heads import HeadWeights


@dataclass(frozen=True, slots=True)
class Expected:
    """What the oracle computes."""

    embeddings: Array  # [N, D]
    scores: Array  # [N, H]


class Reference:
    """Encoder, pooling and heads in eager PyTorch."""

    def __init__(self, directory: Path, heads: Sequence[HeadWeights], pooling: Pooling) -> None:
        """Load the checkpoint; raises CheckpointError where transformers would leave a layer random."""
        self.encoder = load_encoder(directory)
        self.heads = [_head(head) for head in heads]
        self.pooling = pooling

    @torch.inference_mode()
    def run(self, tokens: TokenBatch) -> Expected:
        """Embed and score every document of `tokens`."""
        embeddings = [self._embed(ids) for ids in np.split(tokens.ids, tokens.offsets[1:-1])]
        stacked = torch.cat(embeddings)
        scores = torch.cat([head(stacked) for head in self.heads], dim=1)
        return Expected(stacked.numpy(), scores.numpy())

    def _embed(self, ids: NDArray[np.int32]) -> torch.Tensor:
        hidden = self.encoder(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).last_hidden_state
        pooled = hidden[:, 0] if self.pooling == "cls" else hidden.mean(1)
        return nn.functional.normalize(pooled, dim=1)


def load_encoder(directory: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The checkpoint's own transformers class, without remote code; raises CheckpointError for a random layer."""
    model, report = AutoModel.from_pretrained(
        directory, dtype=dtype, attn_implementation="sdpa", output_loading_info=True, local_files_only=True
    )
    # The pooler of BERT feeds no output that is used here.
    random = [key for key in report["missing_keys"] if not key.startswith("pooler.")]
    if random or report["mismatched_keys"]:
        raise CheckpointError(
            f"{directory}: transformers finds no weights for {random or report['mismatched_keys']}; "
            "the oracle would be random there"
        )
    encoder: nn.Module = model.eval()
    return encoder


def _head(weights: HeadWeights) -> nn.Sequential:
    layers = []
    for linear in (weights.hidden, weights.output):
        module = nn.Linear(linear.weight.shape[1], linear.weight.shape[0])
        module.weight.data = torch.from_numpy(linear.weight)
        module.bias.data = torch.from_numpy(linear.bias)
        layers.append(module)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1])
