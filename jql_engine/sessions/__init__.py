"""Ways to execute a graph: one file each. A session owns a loaded graph and says what a batch may hold."""

from __future__ import annotations

import re
from typing import Protocol

from jql_engine.bundle import Bundle
from jql_engine.data import Batch, BatchOutput, Budget
from jql_engine.errors import BundleError, DeviceError

DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


class Session(Protocol):
    """A loaded graph, ready to run."""

    variant: str
    budget: Budget

    def run(self, batch: Batch) -> BatchOutput:
        """Compute one batch planned under `budget`; may be called from several threads."""
        ...


def open_session(bundle: Bundle, device: str, variant: str | None = None, threads: int | None = None) -> Session:
    """Load the graph that runs on `device`: "cpu", "cuda", "cuda:N", or "auto" for the GPU where one can be used.

    `variant` names a graph of the bundle, None takes the first that runs on the device; `threads` (None: all cores
    this process may use) counts for the CPU. Raises DeviceError where the device is not active, BundleError where the
    bundle has no graph for it; never runs elsewhere than asked.
    """
    if not DEVICE.fullmatch(device):
        raise DeviceError(f"device {device!r} is unknown; known are auto, cpu, cuda and cuda:N")
    if device != "auto":
        return _open(bundle, device, variant, threads)
    wanted = variant or next(iter(bundle.manifest.variants))
    has_gpu_graph = any(v.provider == "cuda" for v in bundle.manifest.variants.values())
    on_gpu = _cuda_is_available() and (_provider_of(bundle, wanted) == "cuda" if variant else has_gpu_graph)
    return _open(bundle, "cuda" if on_gpu else "cpu", variant, threads)


def _open(bundle: Bundle, device: str, variant: str | None, threads: int | None) -> Session:
    from jql_engine.sessions.cpu import CpuSession

    provider = device.partition(":")[0]
    if provider == "cuda" and not _cuda_is_available():
        import onnxruntime

        found = ", ".join(onnxruntime.get_available_providers())
        raise DeviceError(
            f"device {device} was requested, but this onnxruntime {onnxruntime.__version__} offers only {found}; "
            "install jql-engine[gpu] in place of jql-engine[cpu], or ask for --device cpu"
        )
    name = _pick(bundle, provider, variant)
    if provider == "cuda":
        raise DeviceError(f"device {device}: this version of jql-engine has no CUDA session; ask for --device cpu")
    return CpuSession(bundle, name, threads)


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
