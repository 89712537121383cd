"""Sessions of packed and padded graphs, all but the device: batches are divided where they do not fit its memory."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from jql_engine.data import Batch, BatchOutput, Budget, Layout
from jql_engine.errors import DeviceError
from jql_engine.sessions.base import Fallback
from jql_engine.sessions.cuda.layouts import packed_fields, padded_fields, size_of, used_bytes
from jql_engine.sessions.fallback import Overflow, select

# To be measured; more tokens than fill the device only take memory. Below 349,525, where BiasSplitGelu's 32-bit index
# of T * 6,144 values ends.
MAX_BATCH_TOKENS = 65_536
# Values that a token needs at once, in multiples of the hidden size: up and gate 8, their product 4, query, key, value,
# context and residual 5, which is what ONNX Runtime takes; and as much again, since other models split up and gate.
LIVE_WIDTHS = 34
MEMORY_SHARE = 0.6  # the rest is for the fp32 session, and for what else lives on the device
TOKENS_PER_DOCUMENT = 16  # batches of shorter documents are divided, so that buffers for documents stay small
RECTANGLE_FACTOR = 4  # documents differ little in length where a batch was planned; others are divided


class OutOfMemoryError(DeviceError):
    """The device has no room for a batch."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the buffers of an executor hold."""

    layout: Layout
    tokens: int  # padding included
    documents: int
    rectangle: int  # documents times the longest of them

    @classmethod
    def of(cls, budget: int, max_tokens: int, layout: Layout = "packed") -> Capacity:
        """Room for batches of `budget` tokens, and for the longest document."""
        tokens = max(budget, max_tokens)
        factor = RECTANGLE_FACTOR if layout == "packed" else 1
        return cls(layout, tokens, -(-tokens // TOKENS_PER_DOCUMENT), factor * tokens)

    def holds(self, batch: Batch) -> bool:
        """Whether the batch need not be divided."""
        n_docs, longest = len(batch.rows), batch.row_length or int(np.diff(batch.offsets).max())
        return size_of(batch) <= self.tokens and n_docs <= self.documents and n_docs * longest <= self.rectangle

    @property
    def input_bytes(self) -> int:
        """Size of a buffer for the inputs of any batch."""
        if self.layout == "packed":
            return used_bytes(packed_fields(self.tokens, self.documents, -(-self.rectangle // self.documents)))
        return used_bytes(padded_fields(1, self.tokens))


class Executor(Protocol):
    """A graph loaded on a device."""

    capacity: Capacity

    def run(self, batch: Batch) -> BatchOutput:
        """Compute a batch that `capacity` holds; may be called from several threads.

        Raises OutOfMemoryError where the device has no room for it.
        """
        ...


class BufferedSession:
    """Runs batches of any size on an executor; see Session.

    Where the device runs out of memory the budget halves and the batch is computed in halves, down to one document.
    Documents that overflow fp16 are recomputed: see Overflow.
    """

    n_parallel = 2  # one packs and is copied while the other is computed

    def __init__(
        self,
        variant: str,
        executor: Executor,
        budget: int,
        fallback: Fallback | None = None,
        mends: bool = True,
    ) -> None:
        """`budget`: tokens of a batch; `fallback`: see Overflow; without `mends` output may hold NaN."""
        self.variant = variant
        self.budget = Budget(budget, executor.capacity.layout)
        self._executor, self._overflow, self._mends = executor, Overflow(variant, fallback), mends
        self._lock = threading.Lock()

    @property
    def n_overflowed(self) -> int:
        return self._overflow.n_documents

    @property
    def fallback(self) -> Fallback | None:
        return self._overflow.fallback

    def run(self, batch: Batch) -> BatchOutput:
        """Compute one batch; raises OutOfMemoryError where a document alone is too large for the device."""
        output = self._compute(batch)
        return self._overflow.mend(batch, output) if self._mends else output

    def _compute(self, batch: Batch) -> BatchOutput:
        if len(batch.rows) == 1:
            return self._compute_alone(batch)
        if size_of(batch) <= self.budget.tokens and self._executor.capacity.holds(batch):
            try:
                return self._executor.run(batch)
            except OutOfMemoryError:
                self._halve_budget(batch)
        outputs = [self._compute(part) for part in halves(batch)]
        scores = np.concatenate([output.scores for output in outputs])
        return BatchOutput(scores, np.concatenate([output.embeddings for output in outputs]))

    def _compute_alone(self, document: Batch) -> BatchOutput:
        try:
            return self._executor.run(document)
        except OutOfMemoryError as error:
            raise OutOfMemoryError(too_large(self.variant, document.n_tokens, error)) from error

    def _halve_budget(self, batch: Batch) -> None:
        with self._lock:  # once, where several threads meet the same shortage
            self.budget = Budget(min(self.budget.tokens, -(-size_of(batch) // 2)), self.budget.layout)


def token_budget(free_bytes: int, hidden_size: int, itemsize: int, cap: int = MAX_BATCH_TOKENS) -> int:
    """At most `cap` tokens of a batch that fit into `free_bytes` of memory, computed in values of `itemsize` bytes."""
    per_token = LIVE_WIDTHS * hidden_size * itemsize
    return max(1, min(cap, int(free_bytes * MEMORY_SHARE) // per_token))


def largest_batch(capacity: Capacity, max_tokens: int) -> Batch:
    """A batch that takes as much memory as any that `capacity` holds: documents of `max_tokens`."""
    n_docs, rest = divmod(capacity.tokens, max_tokens)
    lengths = [max_tokens] * min(n_docs, capacity.documents)
    if rest and capacity.layout == "packed" and n_docs < capacity.documents:
        lengths.append(rest)
    offsets = np.cumsum([0, *lengths], dtype=np.int32)
    row_length = None if capacity.layout == "packed" else max_tokens
    return Batch(np.arange(len(lengths)), np.zeros(offsets[-1], np.int32), offsets, row_length)


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """A batch of several documents as two of about as many tokens."""
    n_docs = len(batch.rows)
    middle = int(np.searchsorted(batch.offsets, batch.n_tokens / 2))
    left = np.arange(n_docs) < min(max(middle, 1), n_docs - 1)
    return select(batch, left), select(batch, ~left)


def too_large(variant: str, n_tokens: int, error: object) -> str:
    """What to say of a document that does not fit alone."""
    return (
        f"variant {variant}: a document of {n_tokens} tokens does not fit into the device's memory ({error}); "
        "free memory on the device, or use one that has more"
    )
