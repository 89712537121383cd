"""The graph alone: batches that lie on the device beforehand, and nothing of a session around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnxruntime as ort

from benchmarks.gpu.profile import feeds_of
from jql_engine.batching import plan_batches
from jql_engine.data import Batch, Budget, Layout, TokenBatch
from jql_engine.sessions.cuda.capacity import Capacity, halves


class Resident:
    """A graph with every batch on the device beforehand: what is timed is the graph, and the copy of its scores."""

    def __init__(
        self,
        session: Any,
        batches: list[Batch],
        device: str,
        number: int = 0,
        synchronize: Callable[[], None] = lambda: None,
        pad_id: int | None = None,
    ) -> None:
        """Copy the inputs to the device, cpu or cuda; there `synchronize` waits for what is under way.

        `pad_id`: of a padded graph.
        """
        self._session, self._options, self._synchronize = session, ort.RunOptions(), synchronize
        if device == "cuda":
            self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._rows = [batch.rows for batch in batches]
        self._inputs: list[Any] = []  # on the CPU a value is a view of its array, and lives as long as the value
        self._bindings = [self._bound(feeds_of(batch, pad_id), device, number) for batch in batches]

    def _bound(self, feeds: dict[str, Any], device: str, number: int) -> Any:
        binding = self._session.io_binding()
        for name, array in feeds.items():
            self._inputs.append(ort.OrtValue.ortvalue_from_numpy(array, device, number))
            binding.bind_ortvalue_input(name, self._inputs[-1])
        for name in ("scores", "embedding"):
            binding.bind_output(name, device, number)
        return binding

    def run(self) -> np.ndarray:
        """Compute all batches; scores [N, H] in the order of the documents."""
        for binding in self._bindings:
            self._session.run_with_iobinding(binding, self._options)
        self._synchronize()
        scores = np.concatenate([binding.get_outputs()[0].numpy() for binding in self._bindings])
        return scores[np.argsort(np.concatenate(self._rows))]


def batches_of(tokens: TokenBatch, budget: int, max_tokens: int, layout: Layout = "packed") -> list[Batch]:
    """What a session of `budget` tokens computes of the documents, from the longest on."""
    capacity = Capacity.of(budget, max_tokens, layout)
    return [part for batch in plan_batches(tokens, Budget(budget, layout)) for part in divided(batch, capacity)]


def divided(batch: Batch, capacity: Capacity) -> Iterator[Batch]:
    """A batch as BufferedSession divides it."""
    if len(batch.rows) == 1 or capacity.holds(batch):
        yield batch
        return
    for part in halves(batch):
        yield from divided(part, capacity)


def spread(batches: list[Batch], n: int) -> list[Batch]:
    """At most `n` of the batches at even distances: they are sorted by length."""
    index = np.unique(np.linspace(0, len(batches) - 1, min(n, len(batches))).round().astype(int))
    return [batches[i] for i in index]
