"""Sessions of packed and padded graphs, all but the device.

Batches are laid out in buffers, divided where they do not fit, and mended in fp32. The inputs of a graph are described
in jql_engine.bundle.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from jql_engine.data import Batch, BatchOutput, Budget, Layout
from jql_engine.errors import DeviceError
from jql_engine.sessions import Session

ALIGNMENT = 256  # of an array on the device: what cudaMalloc gives
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
class Field:
    """One of several arrays in a buffer."""

    name: str
    dtype: type[np.generic]
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


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
    Documents whose values leave fp16 come out as NaN; they are computed again in fp32 and counted.
    """

    n_parallel = 2  # one packs and is copied while the other is computed

    def __init__(
        self, variant: str, executor: Executor, budget: int, open_fp32: Callable[[], Session] | None = None
    ) -> None:
        """`budget`: tokens of a batch; `open_fp32` opens the session for what overflows, None: there is no better."""
        self.variant = variant
        self.budget = Budget(budget, executor.capacity.layout)
        self.n_overflowed = 0  # documents that were computed again
        self._executor, self._open_fp32 = executor, open_fp32
        self._fp32: Session | None = None
        self._lock = threading.Lock()

    def reserve(self, max_tokens: int) -> None:
        """Compute the largest batch, so that its memory is taken once; the budget shrinks to what fits.

        ONNX Runtime keeps every block that it ever took: where batches grow little by little, each new largest one
        takes its blocks anew. Raises DeviceError where a document of `max_tokens` does not fit.
        """
        n_docs, rest = divmod(max(self.budget.tokens, max_tokens), max_tokens)
        lengths = [max_tokens] * n_docs
        if rest and self.budget.layout == "packed":
            lengths.append(rest)
        offsets = np.cumsum([0, *lengths], dtype=np.int32)
        row_length = None if self.budget.layout == "packed" else max_tokens
        self._compute(Batch(np.arange(len(lengths)), np.zeros(offsets[-1], np.int32), offsets, row_length))

    def run(self, batch: Batch) -> BatchOutput:
        """Compute one batch; raises DeviceError where a document alone is too large for the device."""
        output = self._compute(batch)
        # Scores may hide an overflow: a ReLU on the way to them turns NaN into 0.
        broken = ~np.isfinite(np.concatenate([output.scores, output.embeddings], axis=1)).all(axis=1)
        if self._open_fp32 is None or not broken.any():
            return output
        return self._mend(batch, output, broken, self._open_fp32)

    def _compute(self, batch: Batch) -> BatchOutput:
        if len(batch.rows) == 1:
            return self._compute_alone(batch)
        if size_of(batch) <= self.budget.tokens and self._executor.capacity.holds(batch):
            try:
                return self._executor.run(batch)
            except OutOfMemoryError:
                self._lower_budget(max(size_of(part) for part in halves(batch)))
        outputs = [self._compute(part) for part in halves(batch)]
        scores = np.concatenate([output.scores for output in outputs])
        return BatchOutput(scores, np.concatenate([output.embeddings for output in outputs]))

    def _compute_alone(self, document: Batch) -> BatchOutput:
        try:
            return self._executor.run(document)
        except OutOfMemoryError as error:
            raise DeviceError(
                f"variant {self.variant}: a document of {document.n_tokens} tokens does not fit into the device's "
                f"memory ({error}); free memory on the device, or use one that has more"
            ) from error

    def _lower_budget(self, tokens: int) -> None:
        with self._lock:  # once, where several threads meet the same shortage
            self.budget = Budget(min(self.budget.tokens, tokens), self.budget.layout)

    def _mend(
        self, batch: Batch, output: BatchOutput, broken: NDArray[np.bool_], open_fp32: Callable[[], Session]
    ) -> BatchOutput:
        with self._lock:
            self.n_overflowed += int(broken.sum())
            if self._fp32 is None:
                self._fp32 = open_fp32()
        mended = self._fp32.run(select(batch, broken))
        scores, embeddings = output.scores.copy(), output.embeddings.copy()
        scores[broken], embeddings[broken] = mended.scores, mended.embeddings
        return BatchOutput(scores, embeddings)


def token_budget(free_bytes: int, hidden_size: int, itemsize: int) -> int:
    """Tokens of a batch that fit into `free_bytes` of a device's memory, computed in values of `itemsize` bytes."""
    per_token = LIVE_WIDTHS * hidden_size * itemsize
    return max(1, min(MAX_BATCH_TOKENS, int(free_bytes * MEMORY_SHARE) // per_token))


def pack(batch: Batch, buffer: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """The inputs of a packed graph, written side by side into `buffer`: see `carve`."""
    starts, lengths = batch.offsets[:-1], np.diff(batch.offsets)
    assert lengths.min() > 0, "every document has a first token"
    arrays = carve(buffer, fields_of(batch))
    arrays["input_ids"][:] = batch.ids
    arrays["cu_seqlens"][:] = batch.offsets
    arrays["cls_index"][:] = starts
    np.subtract(np.arange(batch.n_tokens), np.repeat(starts, lengths), out=arrays["position_ids"][0])
    is_token = np.arange(lengths.max()) < lengths[:, None]
    offset = arrays["token_offset"].reshape(-1)
    offset[: batch.n_tokens] = np.flatnonzero(is_token)
    offset[batch.n_tokens :] = np.flatnonzero(~is_token)
    return arrays


def pad(batch: Batch, buffer: NDArray[np.uint8], pad_id: int) -> dict[str, NDArray[Any]]:
    """The inputs of a padded graph, written into `buffer`."""
    arrays = carve(buffer, fields_of(batch))
    arrays["input_ids"][:], arrays["attention_mask"][:] = batch.rectangle(pad_id)
    return arrays


def size_of(batch: Batch) -> int:
    """What counts against a budget: tokens, padding included."""
    return batch.n_tokens + batch.n_padding


def fields_of(batch: Batch) -> tuple[Field, ...]:
    """The inputs of a graph for a batch."""
    if batch.row_length is None:
        return packed_fields(batch.n_tokens, len(batch.rows), int(np.diff(batch.offsets).max()))
    return padded_fields(len(batch.rows), batch.row_length)


def padded_fields(n_docs: int, row_length: int) -> tuple[Field, ...]:
    """The inputs of a padded graph for a rectangle."""
    return tuple(Field(name, np.int64, (n_docs, row_length)) for name in ("input_ids", "attention_mask"))


def packed_fields(n_tokens: int, n_docs: int, longest: int) -> tuple[Field, ...]:
    """The inputs of a packed graph for so many tokens and documents, the longest of `longest` tokens."""
    return (
        Field("input_ids", np.int64, (n_tokens,)),
        Field("position_ids", np.int64, (1, n_tokens)),
        Field("cu_seqlens", np.int32, (n_docs + 1,)),
        Field("token_offset", np.int32, (n_docs, longest)),
        Field("cls_index", np.int64, (n_docs,)),
    )


def output_fields(n_docs: int, n_heads: int, hidden_size: int) -> tuple[Field, ...]:
    """The outputs of every graph."""
    return Field("scores", np.float32, (n_docs, n_heads)), Field("embedding", np.float32, (n_docs, hidden_size))


def carve(buffer: NDArray[np.uint8], fields: Sequence[Field]) -> dict[str, NDArray[Any]]:
    """The arrays of `fields` as views of `buffer`, one after another, so that one copy moves them all."""
    return {
        field.name: buffer[start : start + field.n_bytes].view(field.dtype).reshape(field.shape)
        for field, start in places(fields)
    }


def places(fields: Sequence[Field]) -> Iterator[tuple[Field, int]]:
    """Each field and where it starts in a buffer: at a multiple of ALIGNMENT."""
    start = 0
    for field in fields:
        yield field, start
        start += -(-field.n_bytes // ALIGNMENT) * ALIGNMENT


def used_bytes(fields: Sequence[Field]) -> int:
    """What the fields take of a buffer."""
    return max(start + field.n_bytes for field, start in places(fields))


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """A batch of several documents as two of about as many tokens."""
    n_docs = len(batch.rows)
    middle = int(np.searchsorted(batch.offsets, batch.n_tokens / 2))
    left = np.arange(n_docs) < min(max(middle, 1), n_docs - 1)
    return select(batch, left), select(batch, ~left)


def select(batch: Batch, chosen: NDArray[np.bool_]) -> Batch:
    """Some documents of a batch, in rows as long as the longest of them."""
    lengths = np.diff(batch.offsets)
    offsets = np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths[chosen], dtype=np.int32)])
    row_length = None if batch.row_length is None else int(lengths[chosen].max())
    return Batch(batch.rows[chosen], batch.ids[np.repeat(chosen, lengths)], offsets, row_length)
