"""JQL's own loop on a GPU: batches of a fixed number of documents in the order they arrive, whatever their lengths.

That pipeline scores 1,000 documents at a time in bf16. The encoder here is the class that transformers itself has for
the checkpoint: once with padding removed (`varlen`: torch.nn.attention.varlen, whose kernel is FlashAttention 2), once
padded to the longest document of the batch (`padded`: scaled_dot_product_attention with a mask).
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface

from benchmarks.cases import heads_of
from jql_engine.bundle import Bundle
from jql_engine.data import Batch, TokenBatch
from jql_export.reference import head_module, load_encoder

ATTENTION = "jql_varlen"
# After these errors nothing runs on the GPU any more, in this process.
ENDS_CUDA = (
    "illegal memory access",
    "misaligned address",
    "illegal instruction",
    "launch failure",
    "device-side assert",
)
Layout = Literal["varlen", "padded"]


class JqlPipeline:
    """Encoder, pooling and heads in one dtype on one device."""

    def __init__(self, directory: Path, bundle: Bundle, dtype: torch.dtype, device: str, layout: Layout) -> None:
        """Load the checkpoint's own class and the bundle's heads."""
        self.layout, self._device = layout, device
        self._pooling, self._pad_id = bundle.manifest.pooling, bundle.manifest.tokenizer.pad
        self._model: Any = load_encoder(directory, dtype).to(device)
        self._heads = Heads(bundle, dtype, device)
        if layout == "varlen":
            AttentionInterface.register(ATTENTION, varlen_attention)
            self._model.set_attn_implementation(ATTENTION)

    @torch.inference_mode()
    def scores(self, tokens: TokenBatch, n_docs: int) -> np.ndarray:
        """Scores [N, H] of all documents, `n_docs` at a time."""
        parts = [self._scores(batch) for batch in arrivals(tokens, n_docs)]
        return torch.cat(parts).float().cpu().numpy()

    def _scores(self, batch: Batch) -> torch.Tensor:
        pooled = self._varlen(batch) if self.layout == "varlen" else self._padded(batch)
        return self._heads(nn.functional.normalize(pooled, dim=1))

    def _varlen(self, batch: Batch) -> torch.Tensor:
        lengths = np.diff(batch.offsets)
        first = self._pad_id + 1 if self._model.config.model_type == "xlm-roberta" else 0
        positions = np.arange(batch.n_tokens) - np.repeat(batch.offsets[:-1], lengths) + first
        offsets = torch.from_numpy(batch.offsets).to(self._device)
        longest = int(lengths.max())
        hidden = self._model(
            input_ids=torch.from_numpy(batch.ids.astype(np.int64))[None].to(self._device),
            position_ids=torch.from_numpy(positions)[None].to(self._device),
            cu_seq_lens_q=offsets,
            max_length_q=longest,
        ).last_hidden_state[0]
        if self._pooling == "cls":
            return hidden[offsets[:-1].long()]
        sums = hidden.new_zeros(len(lengths), hidden.shape[1], dtype=torch.float32)
        document = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(self._device)
        means = sums.index_add_(0, document, hidden.float()) / offsets.diff()[:, None]
        return means.to(hidden.dtype)

    def _padded(self, batch: Batch) -> torch.Tensor:
        ids, mask = (torch.from_numpy(array).to(self._device) for array in batch.rectangle(self._pad_id))
        hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
        if self._pooling == "cls":
            return hidden[:, 0]
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class Heads:
    """The heads of a bundle, one after the other."""

    def __init__(self, bundle: Bundle, dtype: torch.dtype, device: str) -> None:
        """Load in `dtype` on `device`."""
        self._heads = [head_module(head).to(device, dtype) for head in heads_of(bundle)]

    @torch.inference_mode()
    def __call__(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Scores [N, H] of embeddings [N, D]."""
        embeddings = embeddings.to(next(self._heads[0].parameters()))
        return torch.cat([head(embeddings) for head in self._heads], dim=1)


def varlen_attention(
    module: nn.Module,  # noqa: ARG001  # the interface of transformers
    query: torch.Tensor,  # [1, heads, T, head size], as are the next two
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    **kwargs: Any,  # noqa: ARG001  # dropout, 0 here, and the like
) -> tuple[torch.Tensor, None]:
    """Attention among the tokens of each document, [1, T, heads, head size]."""
    assert attention_mask is None and len(query) == 1
    assert scaling is None or math.isclose(scaling, query.shape[-1] ** -0.5)
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    attend = _flash if query.is_cuda else _each
    return attend(q, k, v, cu_seq_lens_q, max_length_q)[None], None


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor, longest: int) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn  # since torch 2.10

    return varlen_attn(q, k, v, offsets, offsets, longest, longest)


def _each(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor, _: int) -> torch.Tensor:
    """The same, document by document: the CPU has no kernel for all at once."""
    sizes = offsets.diff().tolist()
    documents = zip(*(part.transpose(0, 1).split(sizes, dim=1) for part in (q, k, v)), strict=True)
    return torch.cat([nn.functional.scaled_dot_product_attention(*qkv) for qkv in documents], dim=1).transpose(0, 1)


def arrivals(tokens: TokenBatch, n_docs: int) -> list[Batch]:
    """`n_docs` documents at a time in the order of `tokens`, padded to the longest of them."""
    batches = []
    for start in range(0, len(tokens.rows), n_docs):
        offsets = tokens.offsets[start : start + n_docs + 1]
        ids = tokens.ids[offsets[0] : offsets[-1]]
        rows = tokens.rows[start : start + n_docs]
        batches.append(Batch(rows, ids, (offsets - offsets[0]).astype(np.int32), int(np.diff(offsets).max())))
    return batches


def largest_that_fits(attempt: Callable[[int], object], n_docs: int) -> tuple[int, list[tuple[int, str]]]:
    """The first of n_docs, n_docs / 2, ... whose `attempt` succeeds, and what each larger one failed with.

    Besides running out of memory, kernels refuse tensors of more than 2^31 values: to users both say "smaller batch".
    """
    failures: list[tuple[int, str]] = []
    while True:
        try:
            attempt(n_docs)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if n_docs == 1 or any(phrase in str(error) for phrase in ENDS_CUDA):
                raise
            failures.append((n_docs, reason(error)))
        else:
            return n_docs, failures
        free_memory()
        n_docs //= 2


def reason(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def free_memory() -> None:
    """Give back what PyTorch holds and no longer uses, for ONNX Runtime and for larger blocks."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
