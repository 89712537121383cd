"""Ways to execute a graph: one file each. A session owns a loaded graph and says what a batch may hold."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from typing import Protocol

from jql_engine.bundle import Bundle
from jql_engine.data import Batch, BatchOutput, Budget
from jql_engine.errors import BundleError, DeviceError

DEVICE = re.compile(r"auto|cpu|cuda|cuda:\d+(,cuda:\d+)*")
# Text of one chunk, the unit of commit: what a GPU scores in some seconds, two cores in about a minute.
CHUNK_BYTES = {"cpu": 512 << 10, "cuda": 32 << 20}


@dataclass(frozen=True, slots=True)
class Choice:
    """What a job runs on."""

    devices: tuple[str, ...]  # cpu, or cuda:N of each GPU
    variant: str

    @property
    def chunk_bytes(self) -> int:
        """Text of one chunk."""
        return CHUNK_BYTES[self.devices[0].partition(":")[0]]


class Session(Protocol):
    """A loaded graph, ready to run."""

    variant: str
    budget: Budget

    def run(self, batch: Batch) -> BatchOutput:
        """Compute one batch planned under `budget`; may be called from several threads."""
        ...


def choose(bundle: Bundle, device: str, variant: str | None = None) -> Choice:
    """The devices and the graph that `device` stands for: cpu, cuda (every GPU), cuda:0,cuda:2, or auto.

    `auto` is the GPU where one can be used and the bundle has a graph for it; `variant` None takes the first graph
    that runs on the device. Raises DeviceError where a device is not active, BundleError where the bundle has no graph
    for it; never another device than asked.
    """
    if not DEVICE.fullmatch(device):
        raise DeviceError(f"device {device!r} is unknown; known are auto, cpu, cuda, cuda:N and cuda:N,cuda:M")
    if device.startswith("cuda"):
        raise DeviceError(
            f"device {device} was requested, but this version of jql-engine has no CUDA session yet; ask for "
            "--device cpu"
        )
    if device == "auto":
        wanted = variant or next(iter(bundle.manifest.variants))
        has_gpu_graph = any(v.provider == "cuda" for v in bundle.manifest.variants.values())
        on_gpu = _cuda_is_available() and (_provider_of(bundle, wanted) == "cuda" if variant else has_gpu_graph)
        device = "cuda" if on_gpu else "cpu"
    provider = device.partition(":")[0]
    name = _pick(bundle, provider, variant)
    if provider == "cuda":
        raise DeviceError(f"device {device}: this version of jql-engine has no CUDA session; ask for --device cpu")
    return Choice(_every_gpu() if device == "cuda" else tuple(device.split(",")), name)


def open_session(bundle: Bundle, device: str, variant: str | None = None, threads: int | None = None) -> Session:
    """Load the graph that runs on `device`; see `choose` for both.

    `threads` (None: all cores this process may use) counts for the CPU.
    """
    from jql_engine.sessions.cpu import CpuSession

    return CpuSession(bundle, choose(bundle, device, variant).variant, threads)


def _every_gpu() -> tuple[str, ...]:
    """The GPUs that CUDA shows this process, CUDA_VISIBLE_DEVICES respected; asked of the driver itself."""
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    except OSError as error:
        raise DeviceError(f"device cuda: the NVIDIA driver cannot be loaded ({error})") from error
    if status or not count.value:
        raise DeviceError(f"device cuda: the NVIDIA driver shows no GPU (CUDA error {status}, {count.value} devices)")
    return tuple(f"cuda:{number}" for number in range(count.value))


def _pick(bundle: Bundle, provider: str, variant: str | None) -> str:
    fitting = [name for name, v in bundle.manifest.variants.items() if v.provider in (provider, "any")]
    if variant is None and fitting:
        return fitting[0]
    if variant in fitting:
        return str(variant)
    have = ", ".join(f"{name} ({v.provider})" for name, v in bundle.manifest.variants.items())
    wanted = f"variant {variant} for {provider}" if variant else f"variant for {provider}"
    raise BundleError(f"{bundle.path} has no {wanted}; it has {have}: export again with the --variant you need")


def _provider_of(bundle: Bundle, variant: str) -> str | None:
    found = bundle.manifest.variants.get(variant)
    return found.provider if found else None


def _cuda_is_available() -> bool:
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()
