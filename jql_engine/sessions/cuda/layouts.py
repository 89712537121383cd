"""How the inputs and outputs of a graph lie in a buffer; what they are is described in docs/bundle-format.md."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jql_engine.data import Batch

ALIGNMENT = 256  # of an array on the device: what cudaMalloc gives


@dataclass(frozen=True, slots=True)
class Field:
    """One of several arrays in a buffer."""

    name: str
    dtype: type[np.generic]
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Size of the array in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


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
    """The inputs of a padded graph, written into `buffer`: see `carve`."""
    assert np.diff(batch.offsets).min() > 0, "every document has a first token"
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
