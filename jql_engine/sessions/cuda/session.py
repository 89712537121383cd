"""ONNX Runtime on one NVIDIA GPU, packed and padded batches.

Two batches are under way at a time where two threads call: one is packed into its own pinned buffer, and its copy
queued on the stream, while the GPU still computes the other. Everything runs on one stream, in the order of the calls.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import onnxruntime as ort

from jql_engine.bundle import Bundle
from jql_engine.data import Batch, BatchOutput
from jql_engine.errors import BundleError, DeviceError
from jql_engine.sessions.base import Fallback
from jql_engine.sessions.cuda.capacity import (
    BufferedSession,
    Capacity,
    OutOfMemoryError,
    largest_batch,
    token_budget,
    too_large,
)
from jql_engine.sessions.cuda.layouts import Field, carve, fields_of, output_fields, pack, pad, places, used_bytes
from jql_engine.sessions.cuda.provider import check_built, is_shortage, load, one_line
from jql_engine.sessions.gpu import Buffer, Gpu

ITEM_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
BF16_SINCE = 8.0  # compute capability
N_SLOTS = 2
FATAL = 4  # of ONNX Runtime's log: a shortage is met, and any other error raised


def open_cuda(bundle: Bundle, variant: str, device: int = 0, budget: int | None = None) -> BufferedSession:
    """Load a graph on GPU number `device`; `budget`, tokens of a batch, follows from free memory if None.

    ONNX Runtime keeps every block that it ever took: where batches grow little by little, each new largest one takes
    its blocks anew. So the largest comes first; where it does not fit, all is given back, and half the budget tried.

    Raises DeviceError: the CUDA provider is not active, a node would run on the CPU, or the longest document does not
    fit into memory; BundleError: the graph computes in fp16, and the bundle has none in fp32 for what overflows.
    """
    twin, max_tokens = fp32_twin(bundle, variant), bundle.manifest.max_tokens
    while True:
        executor = CudaExecutor(bundle, variant, device, budget)
        shortage = _shortage(executor, max_tokens)
        if shortage is None:
            fallback = None if twin is None else Fallback(twin, lambda: open_small(bundle, twin, device))
            return BufferedSession(variant, executor, executor.budget, fallback)
        executor.close()
        if executor.budget <= max_tokens:
            raise DeviceError(too_large(variant, max_tokens, shortage))
        budget = max(executor.budget // 2, max_tokens)


def _shortage(executor: CudaExecutor, max_tokens: int) -> str | None:
    """Why the largest batch does not fit; the exception itself would keep the session alive."""
    try:
        executor.run(largest_batch(executor.capacity, max_tokens))
    except OutOfMemoryError as error:
        return str(error)
    return None


def open_small(bundle: Bundle, variant: str, device: int) -> BufferedSession:
    """The graph for what overflows, beside another session, with what memory that leaves.

    It takes a document at a time where there is no room for more, and passes on what it computes as it is. Raises
    BundleError where the bundle is no longer the one that was opened, hours ago, and whose graph was certified then.
    """
    bundle.check_still_there()
    executor = CudaExecutor(bundle, variant, device, bundle.manifest.max_tokens)
    return BufferedSession(variant, executor, executor.budget, mends=False)


def fp32_twin(bundle: Bundle, variant: str) -> str | None:
    """The variant that computes what overflows in `variant`; None where nothing does: bf16 ends where fp32 does."""
    variants = bundle.manifest.variants
    if variants[variant].precision != "fp16":
        return None
    for name, other in variants.items():
        if (other.provider, other.layout, other.precision) == ("cuda", "packed", "fp32"):
            return name
    raise BundleError(
        f"{bundle.path} has no packed fp32 graph for documents that overflow {variant}; it has "
        f"{', '.join(variants)}: export again with --variant {variant} --variant cuda-fp32"
    )


@dataclass(frozen=True, slots=True)
class _Slot:
    """Room for one batch on both sides of the bus."""

    inputs: Buffer
    outputs: Buffer
    binding: Any
    computed: Any  # event: the outputs are on the host


class _Loaded:
    """A graph on its GPU, and the slots that are free."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.session: Any = None
        self.slots: SimpleQueue[_Slot] = SimpleQueue()

    def add_slot(self, n_inputs: int, n_outputs: int) -> None:
        """Allocate another slot for so many bytes."""
        inputs, outputs = self.gpu.buffer(n_inputs), self.gpu.buffer(n_outputs)
        self.slots.put(_Slot(inputs, outputs, self.session.io_binding(), self.gpu.event()))

    def close(self) -> None:
        """Give all memory back, the graph's before the stream that it uses."""
        with self.gpu.kept():
            self.slots = SimpleQueue()
            self.session = None
            self.gpu.close()


class CudaExecutor:
    """Owns a loaded graph, its stream, and buffers that are allocated once; see Executor."""

    def __init__(self, bundle: Bundle, variant: str, device: int, budget: int | None = None) -> None:
        """Load the graph; `budget`, the tokens of a batch, follows from the memory that is left if it is None."""
        check_built(ort.get_available_providers(), device)
        info, encoder = bundle.manifest.variants[variant], bundle.manifest.encoder
        self._gpu = Gpu(device)
        self._loaded = _Loaded(self._gpu)
        self.close = weakref.finalize(self, self._loaded.close)  # gives all memory back, once, at the latest with self
        self.close.atexit = False  # at exit the driver does it
        check_capability(info.precision, self._gpu)
        self._loaded.session = load(bundle.graph(variant), device, self._gpu.stream)
        self._n_heads, self._hidden_size = len(bundle.heads), encoder.hidden_size
        self.budget = budget or token_budget(self._gpu.free_bytes(), encoder.hidden_size, ITEM_BYTES[info.precision])
        self.capacity = Capacity.of(self.budget, bundle.manifest.max_tokens, info.layout)
        self._pad_id = bundle.manifest.tokenizer.pad
        self._options = ort.RunOptions()
        # The caller waits outside of the queue, so that the next batch is queued meanwhile.
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._options.log_severity_level = FATAL
        self._queue = threading.Lock()
        n_outputs = used_bytes(output_fields(self.capacity.documents, self._n_heads, self._hidden_size))
        for _ in range(N_SLOTS):
            self._loaded.add_slot(self.capacity.input_bytes, n_outputs)

    def run(self, batch: Batch) -> BatchOutput:
        """Compute one batch; see Executor."""
        assert self.capacity.holds(batch)
        self._gpu.activate()
        inputs = fields_of(batch)
        outputs = output_fields(len(batch.rows), self._n_heads, self._hidden_size)
        slot = self._loaded.slots.get()
        try:
            if batch.row_length is None:
                pack(batch, slot.inputs.host)
            else:
                pad(batch, slot.inputs.host, self._pad_id)
            with self._queue:
                self._enqueue(slot, inputs, outputs)
            self._gpu.wait(slot.computed)
            arrays = carve(slot.outputs.host, outputs)
            return BatchOutput(arrays["scores"].copy(), arrays["embedding"].copy())
        finally:
            self._loaded.slots.put(slot)

    def _enqueue(self, slot: _Slot, inputs: tuple[Field, ...], outputs: tuple[Field, ...]) -> None:
        """Queue the copy to the GPU, the graph, and the copy back."""
        self._gpu.upload(slot.inputs, used_bytes(inputs))
        for field, offset in places(inputs):
            where = ("cuda", self._gpu.number, field.dtype, field.shape, slot.inputs.device + offset)
            slot.binding.bind_input(field.name, *where)
        for field, offset in places(outputs):
            if field.n_bytes:  # a bundle without heads has no scores
                where = ("cuda", self._gpu.number, field.dtype, field.shape, slot.outputs.device + offset)
                slot.binding.bind_output(field.name, *where)
        self._execute(slot)
        self._gpu.download(slot.outputs, used_bytes(outputs))
        self._gpu.record(slot.computed)

    def _execute(self, slot: _Slot) -> None:
        try:
            self._loaded.session.run_with_iobinding(slot.binding, self._options)
        except Exception as error:  # RuntimeError from a binding, and ONNX Runtime's own exceptions have no other base
            self._gpu.synchronize()  # the slot is written anew, and its copy may be under way
            if is_shortage(message := one_line(error)):
                raise OutOfMemoryError(message) from error
            raise DeviceError(f"device cuda:{self._gpu.number}: {message}") from error


def check_capability(precision: str, gpu: Gpu) -> None:
    """Raise DeviceError where a GPU cannot compute in `precision`."""
    if precision == "bf16" and float(gpu.compute_capability) < BF16_SINCE:
        raise DeviceError(
            f"device cuda:{gpu.number}: {gpu.name} has compute capability {gpu.compute_capability}, bf16 needs "
            f"{BF16_SINCE}; use --variant cuda-fp32, or cuda-fp16"
        )
