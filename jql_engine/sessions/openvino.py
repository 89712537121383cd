"""OpenVINO on the CPU: bf16 where the CPU has it, fp32; one exact length a batch and no mask."""

from __future__ import annotations

import functools
import importlib.util
import os
import threading

import numpy as np
from numpy.typing import NDArray

from jql_engine.bundle import Bundle
from jql_engine.data import Batch, BatchOutput, Budget
from jql_engine.errors import DeviceError
from jql_engine.sessions.base import check_inputs

# From 512 to 4,096 the speed is the same within 2 %; see docs/benchmarks.md.
BATCH_TOKENS = 1024
# What a variant's precision means to OpenVINO.
HINTS = {"fp32": "f32", "bf16": "bf16"}


def unavailable_reason(precision: str) -> str | None:
    """Why a graph of `precision` cannot run with OpenVINO here, and what to do; None where it can."""
    if importlib.util.find_spec("openvino") is None:
        return "the package openvino is not installed; pip install 'jql-engine[openvino]'"
    if precision == "bf16" and "BF16" not in (found := _capabilities()):
        return f"this CPU has no bf16 instructions (OpenVINO finds {', '.join(found)})"
    return None


@functools.cache
def _capabilities() -> tuple[str, ...]:
    import openvino

    return tuple(openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


class OpenVinoSession:
    """Runs one graph of a bundle with OpenVINO's CPU plugin."""

    def __init__(self, bundle: Bundle, variant: str, threads: int | None = None) -> None:
        """Compile the graph; `threads` None takes every core this process may use.

        Raises DeviceError: openvino is not installed, or the CPU lacks the precision of the variant.
        """
        info = bundle.manifest.variants[variant]
        if reason := unavailable_reason(info.precision):
            raise DeviceError(f"variant {variant}: {reason}; or take a variant in fp32")
        import openvino

        self.variant, self.n_overflowed, self.fallback = variant, 0, None
        self.budget = Budget(BATCH_TOKENS, info.layout)
        self._pad_id = bundle.manifest.tokenizer.pad
        # Two streams were 7 % faster on two cores; once, in about a hundred sessions, one gave wrong scores (2026.4).
        self.n_parallel = 1
        n_threads = threads or len(os.sched_getaffinity(0))
        settings = {
            "INFERENCE_PRECISION_HINT": HINTS[info.precision],
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": n_threads,
            # Each worker of several would pin its threads to the same first cores.
            "ENABLE_CPU_PINNING": n_threads == len(os.sched_getaffinity(0)),
        }
        self._compiled = openvino.Core().compile_model(str(bundle.graph(variant)), "CPU", settings)
        check_inputs(bundle, variant, [value.get_any_name() for value in self._compiled.inputs], ("exact",))
        self._request = self._compiled.create_infer_request()
        self._running = threading.Lock()  # a request holds its tensors
        self._failed = False  # then its graph is in no known state: it may give wrong scores without an error

    def run(self, batch: Batch) -> BatchOutput:
        """Compute one batch; see Session."""
        ids, _ = batch.rectangle(self._pad_id)
        with self._running:
            if self._failed:
                raise DeviceError(
                    f"variant {self.variant}: OpenVINO has failed on an earlier batch, and its graph is in no known "
                    "state; open the engine again"
                )
            self._infer(ids)
            scores, embeddings = (self._request.get_tensor(name).data.copy() for name in ("scores", "embedding"))
        return BatchOutput(scores, embeddings)

    def _infer(self, ids: NDArray[np.int64]) -> None:
        # Not infer(): with one thread it swallows every exception, and the outputs are those of the call before
        # (2026.4).
        self._failed = True
        try:
            self._request.start_async({"input_ids": ids})
            self._request.wait()
        except KeyboardInterrupt:
            self._request.wait()  # what was begun goes on
            self._failed = False
            raise
        self._failed = False
