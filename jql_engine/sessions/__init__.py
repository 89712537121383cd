"""Ways to execute a graph: one file each. A session owns a loaded graph and says what a batch may hold."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from jql_engine.bundle import Bundle
from jql_engine.data import Batch, BatchOutput, Budget
from jql_engine.engine_files import EngineOptions
from jql_engine.errors import DeviceError

# Text of one chunk, the unit of commit: what a GPU scores in some seconds, two cores in about a minute.
CHUNK_BYTES = {"cpu": 512 << 10, "cuda": 32 << 20}
ON_GPU = ("cuda", "tensorrt")  # providers of GPUs


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """How a graph is loaded."""

    threads: int | None = None  # of the CPU; None: all cores this process may use
    engines: EngineOptions = field(default_factory=EngineOptions)  # of TensorRT


DEFAULTS = SessionOptions()

# On two cores ONNX Runtime is 6 % faster with a document on each than with both on one; but so many documents of the
# greatest length are in memory at once.
MAX_STREAMS = 4


def streams_of(threads: int | None) -> tuple[int, int]:
    """Batches at a time, and threads in all, for `threads` of the CPU (None: every core this process may use)."""
    n_threads = threads or len(os.sched_getaffinity(0))
    return (n_threads if n_threads <= MAX_STREAMS else 1), n_threads


class Session(Protocol):
    """A loaded graph, ready to run."""

    variant: str
    budget: Budget
    n_parallel: int  # threads that should call `run`

    @property
    def n_overflowed(self) -> int:
        """Documents that overflowed fp16 and were recomputed in fp32, so far."""
        ...

    @property
    def fallback(self) -> Fallback | None:
        """What recomputes them; None where no document overflows, or where nothing is more exact."""
        ...

    def run(self, batch: Batch) -> BatchOutput:
        """Compute one batch planned under `budget`; may be called from several threads."""
        ...


@dataclass(frozen=True, slots=True)
class Fallback:
    """The graph for documents that overflow fp16; each call of `open` loads it anew."""

    variant: str
    open: Callable[[], Session]


def check_options(bundle: Bundle, variant: str, options: SessionOptions) -> None:
    """Raise DeviceError for an option that a variant has no use for."""
    if bundle.manifest.variants[variant].provider == "tensorrt":
        return
    if options.engines != EngineOptions():
        raise DeviceError(f"variant {variant} does not run with TensorRT; leave out the options of its engines")


def open_variant(
    bundle: Bundle,
    variant: str,
    device: str = "cpu",
    options: SessionOptions = DEFAULTS,
    report: Callable[[str], None] = lambda _: None,
) -> Session:
    """Load the graph `variant` on `device` (cpu, cuda:N) with the session it was written for.

    `report` is told what takes minutes. Raises DeviceError where device or library are not usable.
    """
    provider, number = bundle.manifest.variants[variant].provider, int(device.partition(":")[2] or 0)
    check_options(bundle, variant, options)
    if provider == "openvino":
        from jql_engine.sessions.openvino import OpenVinoSession

        return OpenVinoSession(bundle, variant, options.threads)
    if provider == "cuda":
        from jql_engine.sessions.cuda import open_cuda

        return open_cuda(bundle, variant, number)
    if provider == "tensorrt":
        from jql_engine.sessions.tensorrt import TensorRTSession

        fallback = _tensorrt_fallback(bundle, number, options, report)
        return TensorRTSession(bundle, variant, number, options.engines, report, fallback)
    from jql_engine.sessions.cpu import CpuSession

    return CpuSession(bundle, variant, options.threads)


def _tensorrt_fallback(
    bundle: Bundle, number: int, options: SessionOptions, report: Callable[[str], None]
) -> Fallback | None:
    """What recomputes documents that overflow in TensorRT: ONNX Runtime's CUDA graph, else that for the CPU.

    `report` is told which one; None where the bundle has neither.
    """
    from jql_engine.sessions.choice import runnable

    def fallback(name: str, kind: str) -> Fallback:
        if kind == "cpu":
            return Fallback(name, lambda: open_variant(bundle, name, options=SessionOptions(threads=options.threads)))
        from jql_engine.sessions.cuda import open_small  # imports ONNX Runtime, which need not be here

        return Fallback(name, lambda: open_small(bundle, name, number))

    variants = bundle.manifest.variants
    for kind, provider in (("cuda", "cuda"), ("cpu", "cpu"), ("cpu", "any")):
        for name in runnable(bundle, kind):
            if (variants[name].provider, variants[name].precision) == (provider, "fp32"):
                where = f"cuda:{number}" if kind == "cuda" else "the CPU"
                report(f"documents that overflow fp16 will be recomputed in fp32 by {name} on {where}")
                return fallback(name, kind)
    return None
