"""ONNX Runtime on one NVIDIA GPU, packed batches.

Two batches are under way at a time where two threads call: one is packed into its own page-locked buffer, and its copy
queued on the stream, while the GPU still computes the other. Everything runs on one stream, in the order of the calls.
"""

from __future__ import annotations

import importlib
import threading
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import EPFail, Fail, RuntimeException

from jql_engine.bundle import Bundle
from jql_engine.data import Batch, BatchOutput
from jql_engine.errors import BundleError, DeviceError
from jql_engine.gpu import Buffer, Gpu
from jql_engine.sessions.packed import (
    Capacity,
    Field,
    OutOfMemoryError,
    PackedSession,
    carve,
    fields_of,
    output_fields,
    pack,
    places,
    token_budget,
    used_bytes,
)

PROVIDER = "CUDAExecutionProvider"
ITEM_BYTES = {"fp16": 2, "fp32": 4}
N_SLOTS = 2
# How ONNX Runtime's allocators, CUDA and cuBLAS say it; their exceptions have no type of their own for it.
SHORTAGES = ("Failed to allocate memory", "is smaller than requested bytes", "out of memory", "ALLOC_FAILED")


def open_cuda(bundle: Bundle, variant: str, device: int = 0) -> PackedSession:
    """Load a packed graph on GPU number `device`.

    Raises DeviceError: the CUDA provider is not active, or a node would run on the CPU; BundleError: the graph computes
    in fp16, and the bundle has none in fp32 for documents that overflow.
    """
    twin = fp32_twin(bundle, variant)
    executor = CudaExecutor(bundle, variant, device)
    open_fp32 = None if twin is None else lambda: open_cuda(bundle, twin, device)
    return PackedSession(variant, executor, executor.budget, open_fp32)


def fp32_twin(bundle: Bundle, variant: str) -> str | None:
    """The variant that computes what overflows in `variant`; None where that one is fp32 itself."""
    variants = bundle.manifest.variants
    if variants[variant].precision == "fp32":
        return None
    for name, other in variants.items():
        if (other.provider, other.layout, other.precision) == ("cuda", "packed", "fp32"):
            return name
    raise BundleError(
        f"{bundle.path} has no packed fp32 graph for documents whose values leave the range of {variant}; it has "
        f"{', '.join(variants)}: export again with --variant {variant} --variant cuda-fp32"
    )


@dataclass(frozen=True, slots=True)
class _Slot:
    """Room for one batch on both sides of the bus."""

    inputs: Buffer
    outputs: Buffer
    binding: Any


class CudaExecutor:
    """Owns a loaded graph, its stream, and buffers that are allocated once; see Executor."""

    def __init__(self, bundle: Bundle, variant: str, device: int) -> None:
        """Load the graph; `budget`, the tokens of a batch, follows from the memory that is left."""
        check_built(ort.get_available_providers(), device)
        info, encoder = bundle.manifest.variants[variant], bundle.manifest.encoder
        self._gpu = Gpu(device)
        self._session = load(bundle.graph(variant), device, self._gpu.stream)
        self._n_heads, self._hidden_size = len(bundle.heads), encoder.hidden_size
        self.budget = token_budget(free_bytes(device), encoder.hidden_size, ITEM_BYTES[info.precision])
        self.capacity = Capacity.of(self.budget, bundle.manifest.max_tokens)
        self._options = ort.RunOptions()
        # The caller waits outside of the queue, so that the next batch is queued meanwhile.
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._queue = threading.Lock()
        self._slots: SimpleQueue[_Slot] = SimpleQueue()
        n_outputs = used_bytes(output_fields(self.capacity.documents, self._n_heads, self._hidden_size))
        for _ in range(N_SLOTS):
            inputs, outputs = self._gpu.buffer(self.capacity.input_bytes), self._gpu.buffer(n_outputs)
            self._slots.put(_Slot(inputs, outputs, self._session.io_binding()))

    def run(self, batch: Batch) -> BatchOutput:
        """Compute one batch; see Executor."""
        assert self.capacity.holds(batch)
        self._gpu.activate()
        inputs = fields_of(batch)
        outputs = output_fields(len(batch.rows), self._n_heads, self._hidden_size)
        slot = self._slots.get()
        try:
            pack(batch, slot.inputs.host)
            with self._queue:
                self._enqueue(slot, inputs, outputs)
            # Waits for what is queued by now: work that another thread queues later is not among it.
            self._gpu.synchronize()
            arrays = carve(slot.outputs.host, outputs)
            return BatchOutput(arrays["scores"].copy(), arrays["embedding"].copy())
        finally:
            self._slots.put(slot)

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

    def _execute(self, slot: _Slot) -> None:
        try:
            self._session.run_with_iobinding(slot.binding, self._options)
        except (EPFail, Fail, RuntimeException) as error:
            self._gpu.synchronize()  # the slot is written anew, and its copy may be under way
            if is_shortage(str(error)):
                raise OutOfMemoryError(str(error)) from error
            raise DeviceError(f"device cuda:{self._gpu.number}: {error}") from error


def load(file: Path, device: int, stream: int) -> Any:
    """The graph as a session on `stream` of GPU number `device`, and nowhere else; raises DeviceError otherwise."""
    ort.disable_telemetry_events()  # the text of other people passes through here: nothing is reported to anyone
    ort.preload_dlls()  # CUDA's libraries, where they were installed as Python packages
    options = ort.SessionOptions()
    # Every batch has another shape: memory patterns are never met again.
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    settings = {
        "device_id": str(device),
        "user_compute_stream": str(stream),
        "arena_extend_strategy": "kSameAsRequested",  # the default doubles, and takes what a retry would need
        "use_tf32": "0",  # the heads are fp32
    }
    try:
        session = ort.InferenceSession(str(file), options, providers=[(PROVIDER, settings)], enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions share no other base
        raise DeviceError(f"device cuda:{device}: {file.name} cannot be loaded on the GPU alone: {error}") from error
    check_active(session.get_providers(), device)
    return session


def check_built(available: list[str], device: int) -> None:
    """Raise DeviceError where this ONNX Runtime knows no GPU."""
    if PROVIDER not in available:
        raise DeviceError(
            f"device cuda:{device}: ONNX Runtime {ort.__version__} is built for {', '.join(available)}, expected "
            f"{PROVIDER}; install jql-engine[gpu], and not [cpu] beside it"
        )


def check_active(providers: list[str], device: int) -> None:
    """Raise DeviceError where ONNX Runtime went without its CUDA provider, as it does when a library is missing."""
    if providers[:1] != [PROVIDER]:
        raise DeviceError(
            f"device cuda:{device}: ONNX Runtime activated {', '.join(providers)}, expected {PROVIDER} first; a "
            "library of CUDA or cuDNN is missing or does not fit: see onnxruntime.print_debug_info()"
        )


def is_shortage(message: str) -> bool:
    """Whether an error of ONNX Runtime says that the device's memory is used up."""
    return any(phrase in message for phrase in SHORTAGES)


def free_bytes(device: int) -> int:
    """Free memory of the calling thread's GPU, number `device`."""
    status, free, _ = importlib.import_module("cuda.bindings.runtime").cudaMemGetInfo()
    if int(status):
        raise DeviceError(f"device cuda:{device}: cudaMemGetInfo failed with CUDA error {int(status)}")
    return int(free)
