"""ONNX Runtime on the CPU: one exact length a batch, or padded batches with a mask."""

from __future__ import annotations

import onnxruntime as ort

from jql_engine.bundle import Bundle
from jql_engine.data import Batch, BatchOutput, Budget
from jql_engine.sessions.base import check_inputs, streams_of

# Small batches keep the activations of a layer in the cache; see docs/benchmarks.md for the sweep.
BATCH_TOKENS = 1024


class CpuSession:
    """Runs one graph of a bundle with ONNX Runtime's CPU provider."""

    def __init__(self, bundle: Bundle, variant: str, threads: int | None = None) -> None:
        """Load the graph, its weights memory-mapped; `threads` None takes every core this process may use."""
        info = bundle.manifest.variants[variant]
        self.variant, self.n_overflowed, self.fallback = variant, 0, None
        self.budget = Budget(BATCH_TOKENS, info.layout)
        self._pad_id = bundle.manifest.tokenizer.pad
        self._takes_mask = info.layout == "padded"
        ort.disable_telemetry_events()  # the text of other people passes through here: nothing is reported to anyone
        options = ort.SessionOptions()
        self.n_parallel, n_threads = streams_of(threads)
        options.intra_op_num_threads = n_threads // self.n_parallel
        # Every length is another shape: memory patterns are never met again, and an arena keeps the largest for good.
        options.enable_mem_pattern = False
        self._session = ort.InferenceSession(str(bundle.graph(variant)), options, providers=["CPUExecutionProvider"])
        inputs = [value.name for value in self._session.get_inputs()]
        check_inputs(bundle, variant, inputs, ("exact", "padded"))

    def run(self, batch: Batch) -> BatchOutput:
        """Compute one batch; see Session."""
        ids, mask = batch.rectangle(self._pad_id)
        feeds = {"input_ids": ids, "attention_mask": mask} if self._takes_mask else {"input_ids": ids}
        scores, embeddings = self._session.run(["scores", "embedding"], feeds)
        return BatchOutput(scores, embeddings)
