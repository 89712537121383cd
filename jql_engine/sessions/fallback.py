"""Documents that overflow fp16 come out as NaN: they are recomputed in fp32."""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from jql_engine.data import Batch, BatchOutput, TokenBatch
from jql_engine.errors import DeviceError
from jql_engine.sessions.base import Fallback, Session, run_in_order

NO_BETTER = (
    "no more exact variant of this bundle runs here. Of an fp16 graph: export one in fp32 beside it. Else: check the "
    "weights of encoder and heads"
)


class Overflow:
    """Mends the output of a session, and counts what it recomputed; may be called from several threads."""

    def __init__(self, variant: str, fallback: Fallback | None) -> None:
        """`fallback`: what recomputes documents that overflow in `variant`, opened at the first; None: nothing can."""
        self.n_documents, self.fallback = 0, fallback
        self._variant = variant
        self._fp32: Session | None = None
        self._lock = threading.Lock()

    def mend(self, batch: Batch, output: BatchOutput) -> BatchOutput:
        """The output, with finite values for every document; raises DeviceError where fp32 gives none either."""
        # Scores may hide an overflow: a ReLU on the way to them turns NaN into 0.
        if not (broken := ~_finite(output)).any():
            return output
        with self._lock:
            if self.fallback is None:
                raise self._error(broken, NO_BETTER)
            self._fp32 = self._fp32 or self.fallback.open()
        mended = _compute(self._fp32, select(batch, broken))
        if not _finite(mended).all():
            raise self._error(broken, "in fp32 as well; check the weights of encoder and heads")
        with self._lock:
            self.n_documents += int(broken.sum())
        scores, embeddings = output.scores.copy(), output.embeddings.copy()
        scores[broken], embeddings[broken] = mended.scores, mended.embeddings
        return BatchOutput(scores, embeddings)

    def _error(self, broken: NDArray[np.bool_], why: str) -> DeviceError:
        found = f"{broken.sum()} of the {len(broken)} documents of a batch have values that are not finite"
        return DeviceError(f"variant {self._variant}: {found}, expected numbers: {why}")


def select(batch: Batch, chosen: NDArray[np.bool_]) -> Batch:
    """Some documents of a batch, in rows as long as the longest of them."""
    lengths = np.diff(batch.offsets)
    offsets = np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths[chosen], dtype=np.int32)])
    row_length = None if batch.row_length is None else int(lengths[chosen].max())
    return Batch(batch.rows[chosen], batch.ids[np.repeat(chosen, lengths)], offsets, row_length)


def _compute(session: Session, batch: Batch) -> BatchOutput:
    """A batch that was planned for another session, whose layout may be another."""
    n_docs = len(batch.rows)
    offsets = batch.offsets.astype(np.int64)
    return run_in_order(session, TokenBatch(np.arange(n_docs), batch.ids, offsets, np.zeros(n_docs, np.bool_)))


def _finite(output: BatchOutput) -> NDArray[np.bool_]:
    """Whether all values of a document are, [B]."""
    finite: NDArray[np.bool_] = np.isfinite(np.concatenate([output.scores, output.embeddings], axis=1)).all(axis=1)
    return finite
