"""One NVIDIA GPU through cuda-python: what it is, memory on both sides of the bus, and a stream between them."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jql_engine.errors import DeviceError


@dataclass(frozen=True, slots=True)
class Buffer:
    """The same room on the host, pinned (page-locked) so that copies run beside the GPU's work, and on the GPU."""

    host: NDArray[np.uint8]  # [bytes]
    device: int  # address


class Gpu:
    """A GPU, one stream on it and the memory that was asked for; `close` gives all back."""

    def __init__(self, number: int) -> None:
        """Take GPU `number` as CUDA counts them; raises DeviceError where cuda-python or the GPU is missing."""
        self._cuda = _runtime()
        self.number = number
        n_gpus = self._call("cudaGetDeviceCount")
        if not 0 <= number < n_gpus:
            raise DeviceError(f"device cuda:{number} was requested, CUDA shows {n_gpus} GPU(s), numbered from 0")
        self.activate()
        properties = self._call("cudaGetDeviceProperties", number)
        self.name = bytes(properties.name).split(b"\0")[0].decode()
        self.compute_capability = f"{properties.major}.{properties.minor}"
        self._stream = self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)
        self._host: list[int] = []
        self._device: list[int] = []
        self._events: list[Any] = []

    @property
    def stream(self) -> int:
        """The handle of the stream."""
        return int(self._stream)

    def activate(self) -> None:
        """Make this the GPU of the calling thread: CUDA keeps the choice per thread."""
        self._call("cudaSetDevice", self.number)

    def free_bytes(self) -> int:
        """Free memory of the GPU; the thread's own is this one."""
        return int(self._call("cudaMemGetInfo"))

    def allocate(self, n_bytes: int) -> int:
        """Memory on the GPU; its address, a multiple of 256."""
        self._device.append(int(self._call("cudaMalloc", max(1, n_bytes))))
        return self._device[-1]

    def buffer(self, n_bytes: int) -> Buffer:
        """Pinned memory on the host with memory of the same size on the GPU."""
        size = max(1, n_bytes)
        address = int(self._call("cudaHostAlloc", size, self._cuda.cudaHostAllocDefault))
        self._host.append(address)
        return Buffer(np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)), self.allocate(size))

    def upload(self, buffer: Buffer, n_bytes: int) -> None:
        """Queue the copy of the first bytes to the GPU."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", buffer.device, buffer.host.ctypes.data, n_bytes, kind, self._stream)

    def download(self, buffer: Buffer, n_bytes: int) -> None:
        """Queue the copy of the first bytes from the GPU."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", buffer.host.ctypes.data, buffer.device, n_bytes, kind, self._stream)

    def event(self) -> Any:
        """A mark to put into the stream; who waits for it sleeps, for the cores have other work."""
        flags = self._cuda.cudaEventBlockingSync | self._cuda.cudaEventDisableTiming
        self._events.append(self._call("cudaEventCreateWithFlags", flags))
        return self._events[-1]

    def record(self, event: Any) -> None:
        """Put the mark behind what was queued."""
        self._call("cudaEventRecord", event, self._stream)

    def wait(self, event: Any) -> None:
        """Wait until the GPU comes to the mark."""
        self._call("cudaEventSynchronize", event)

    def synchronize(self) -> None:
        """Wait for all that was queued."""
        self._call("cudaStreamSynchronize", self._stream)

    def close(self) -> None:
        """Free the stream, its events and all memory; nothing that uses them may run afterwards."""
        with self.kept():
            self.activate()
            self._free()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """The calling thread has the same GPU afterwards: what gives memory back may be called by any of them."""
        current = self._call("cudaGetDevice")
        try:
            yield
        finally:
            if current != self.number:
                self._call("cudaSetDevice", current)

    def _free(self) -> None:
        for address in self._device:
            self._call("cudaFree", address)
        for address in self._host:
            self._call("cudaFreeHost", address)
        for event in self._events:
            self._call("cudaEventDestroy", event)
        self._call("cudaStreamDestroy", self._stream)
        self._device, self._host, self._events = [], [], []

    def _call(self, function: str, *arguments: Any) -> Any:
        """Call a function of the CUDA runtime; what it returns beside its status, or DeviceError."""
        status, *values = getattr(self._cuda, function)(*arguments)
        if int(status):
            problem = self._cuda.cudaGetErrorString(status)[1].decode()
            raise DeviceError(
                f"device cuda:{self.number}: {function} failed: {problem} (CUDA error {int(status)}); nvidia-smi must "
                "show the GPU and a driver for this CUDA, and memory must be free"
            )
        return values[0] if values else None


def check_runtime() -> None:
    """Raise DeviceError where cuda-python is missing, or is for a newer CUDA than the NVIDIA driver; takes no GPU."""
    runtime = _runtime()
    status, _ = runtime.cudaGetDeviceCount()
    if int(status):
        needed, given = (version[1] for version in (runtime.cudaRuntimeGetVersion(), runtime.cudaDriverGetVersion()))
        raise DeviceError(
            f"cuda-python is for CUDA {_release(needed)}, the NVIDIA driver for CUDA {_release(given)}: "
            f"{runtime.cudaGetErrorString(status)[1].decode()} (CUDA error {int(status)}); install a newer driver"
        )


def _release(version: int) -> str:
    """13.4 for CUDA's 13040; 0.0 where there is none."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _runtime() -> Any:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise DeviceError(
            f"a GPU needs cuda-python, which cannot be imported ({error}); pip install 'cuda-python>=13'"
        ) from error
