"""Ways to execute a graph: one file each. A session owns a loaded graph and says what a batch may hold."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from jql_engine.bundle import Bundle, Variant
from jql_engine.data import Batch, BatchOutput, Budget
from jql_engine.engines import EngineOptions
from jql_engine.errors import BundleError, DeviceError
from jql_engine.tensorrt import load_library

DEVICE = re.compile(r"auto|cpu|cuda|cuda:\d+(,cuda:\d+)*")
# Text of one chunk, the unit of commit: what a GPU scores in some seconds, two cores in about a minute.
CHUNK_BYTES = {"cpu": 512 << 10, "cuda": 32 << 20}
# Providers and precisions that a kind of device runs, the fastest first (benchmarks/README.md); in fp32 OpenVINO and
# ONNX Runtime are about equal.
SPEED = {
    "cpu": (
        ("openvino", "int8"),
        ("openvino", "bf16"),
        ("openvino", "fp32"),
        ("cpu", "fp32"),
        ("any", "fp32"),
    ),
    # Expected: packing saves the padding, and bf16 has no fused GeGLU.
    "cuda": (("cuda", "fp16"), ("tensorrt", "fp16"), ("cuda", "bf16"), ("cuda", "fp32")),
}
ON_GPU = ("cuda", "tensorrt")  # providers of GPUs
# What a score may differ by from the fp32 reference where nobody asks for more or less: bf16 passes, int8 does not. On
# multilingual e5's probe documents transformers itself is 0.024 away in bf16, OpenVINO 0.016.
TOLERANCE = 2e-2
# What is further away, or may be, by provider: on a GPU it is known only once a graph is open.
ASKED_FOR = {"openvino": ("int8",), "cuda": ("bf16",)}
# The same of an embedding, in a bundle without heads; as certified of bf16.
EMBEDDING_TOLERANCE = 5e-3


@dataclass(frozen=True, slots=True)
class Choice:
    """What a job runs on."""

    devices: tuple[str, ...]  # cpu, or cuda:N of each GPU
    variant: str
    tolerance: float | None = None  # what was asked for of the scores, if anything

    @property
    def chunk_bytes(self) -> int:
        """Text of one chunk."""
        return CHUNK_BYTES[self.devices[0].partition(":")[0]]


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """How a graph is loaded."""

    threads: int | None = None  # of the CPU; None: all cores this process may use
    via: str | None = None  # onnxruntime: TensorRT through ONNX Runtime's provider
    engines: EngineOptions = field(default_factory=EngineOptions)  # of TensorRT

    def __post_init__(self) -> None:
        if self.via not in (None, "onnxruntime"):
            raise DeviceError(f"via {self.via!r} is unknown; known is onnxruntime, for TensorRT")


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
        """Documents whose values left fp16 and that were computed again in fp32, so far."""
        ...

    def run(self, batch: Batch) -> BatchOutput:
        """Compute one batch planned under `budget`; may be called from several threads."""
        ...


def choose(bundle: Bundle, device: str, variant: str | None = None, tolerance: float | None = None) -> Choice:
    """The devices and the graph that `device` stands for: cpu, cuda (every GPU), cuda:0,cuda:2, or auto.

    `auto` is the GPU where one can be used and the bundle has a graph for it. `variant` None takes the fastest graph
    that is installed and whose scores were found within `tolerance` (None: TOLERANCE, and no int8) of the fp32
    reference. Raises DeviceError where a device is not active, BundleError where the bundle has no such graph; never
    another device than asked.
    """
    if not DEVICE.fullmatch(device):
        raise DeviceError(f"device {device!r} is unknown; known are auto, cpu, cuda, cuda:N and cuda:N,cuda:M")
    if device == "auto":
        device = _best_kind(bundle, variant)
    kind = device.partition(":")[0]
    gpus = _every_gpu(device) if kind == "cuda" else ()  # before anything of the bundle: the GPU was asked for
    name = _named(bundle, kind, variant, tolerance) if variant else _fastest(bundle, kind, tolerance)
    if device != "cuda":
        if len(set(named := device.split(","))) < len(named):
            raise DeviceError(f"device {device} names a GPU twice; a GPU has one worker")
        if missing := sorted(set(named) - {"cpu", *gpus}):
            raise DeviceError(f"device {missing[0]} was requested; the NVIDIA driver shows {', '.join(gpus)}")
        gpus = tuple(named)
    return Choice(gpus, name, tolerance)


def check_options(bundle: Bundle, variant: str, options: SessionOptions) -> None:
    """Raise DeviceError for an option that a variant has no use for."""
    if bundle.manifest.variants[variant].provider == "tensorrt":
        return
    if options.via:
        raise DeviceError(f"variant {variant} does not run with TensorRT; leave out --via {options.via}")
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
    if provider == "tensorrt" and options.via:
        from jql_engine.sessions.onnxruntime_tensorrt import OnnxRuntimeTensorRTSession

        open_fp32 = _opens_fp32(bundle, number)
        return OnnxRuntimeTensorRTSession(bundle, variant, number, options.engines, report, open_fp32)
    if provider == "tensorrt":
        from jql_engine.sessions.tensorrt import TensorRTSession

        return TensorRTSession(bundle, variant, number, options.engines, report, _opens_fp32(bundle, number))
    from jql_engine.sessions.cpu import CpuSession

    return CpuSession(bundle, variant, options.threads)


def _opens_fp32(bundle: Bundle, number: int) -> Callable[[], Session] | None:
    """Opens what computes documents that overflow on GPU `number`: there, or on the CPU; None where nothing does."""
    for device in (f"cuda:{number}", "cpu"):
        for name in runnable(bundle, device.partition(":")[0]):
            if bundle.manifest.variants[name].precision == "fp32":
                return lambda: open_variant(bundle, name, device)
    return None


def runnable(bundle: Bundle, kind: str) -> list[str]:
    """The variants that run on a kind of device here, the fastest first."""
    variants = bundle.manifest.variants.items()
    found = [name for how in SPEED[kind] for name, v in variants if (v.provider, v.precision) == how]
    return [name for name in found if _obstacle(bundle.manifest.variants[name]) is None]


def _fastest(bundle: Bundle, kind: str, tolerance: float | None) -> str:
    variants, reasons = bundle.manifest.variants, {}
    for how in SPEED[kind]:
        for name, variant in variants.items():
            if (variant.provider, variant.precision) == how:
                if not (reason := _obstacle(variant) or _too_far(variant, tolerance)):
                    return name
                reasons[name] = reason
    others = {name: f"written for {v.provider}, {v.precision}" for name, v in variants.items() if name not in reasons}
    why = "; ".join(f"{name}: {reason}" for name, reason in (reasons | others).items())
    raise BundleError(
        f"{bundle.path} has no variant that runs on {kind} ({why}): mend that, or export again with another --variant"
    )


def _named(bundle: Bundle, kind: str, name: str, tolerance: float | None) -> str:
    variants = bundle.manifest.variants
    if name not in variants or (variants[name].provider, variants[name].precision) not in SPEED[kind]:
        have = ", ".join(f"{have} ({v.provider})" for have, v in variants.items())
        raise BundleError(
            f"{bundle.path} has no variant {name} for {kind}; it has {have}: export again with the --variant you need"
        )
    if tolerance is not None and (reason := _too_far(variants[name], tolerance)):
        raise BundleError(f"variant {name}: {reason}; ask for another variant or allow more with --tolerance")
    return name


def _obstacle(variant: Variant) -> str | None:
    """Why a graph cannot run on this machine, and what to do; None where it can."""
    if variant.provider == "openvino":
        from jql_engine.sessions.openvino import obstacle

        return obstacle(variant.precision)
    if variant.provider != "tensorrt" and importlib.util.find_spec("onnxruntime") is None:
        extra = "gpu" if variant.provider in ON_GPU else "cpu"
        return f"the package onnxruntime is not installed; pip install 'jql-engine[{extra}]'"
    try:
        if variant.provider == "cuda":
            import onnxruntime

            from jql_engine.sessions.cuda import check_built

            check_built(onnxruntime.get_available_providers(), 0)
        elif variant.provider == "tensorrt":
            load_library()
    except DeviceError as error:
        return str(error)
    return None


def _best_kind(bundle: Bundle, variant: str | None) -> str:
    """What a named variant is for; else cuda where a GPU is there and a graph for it can run, else cpu."""
    if variant is not None:
        info = bundle.manifest.variants.get(variant)
        return "cuda" if info and info.provider in ON_GPU else "cpu"
    if runnable(bundle, "cuda"):
        with suppress(DeviceError):
            _every_gpu("auto")
            return "cuda"
    return "cpu"


def _too_far(variant: Variant, tolerance: float | None) -> str | None:
    """Why a graph is not as close to the fp32 reference as asked; a GPU's is measured when it is opened."""
    if tolerance is None and variant.precision in ASKED_FOR.get(variant.provider, ()):
        return f"{variant.precision} is taken only where --tolerance or --variant asks for it"
    if variant.provider in ON_GPU:
        return None
    parity = variant.parity
    if not parity:
        return "how far it is from the fp32 reference is not known"
    worst, what, limit = parity.get("max_abs_score"), "scores", TOLERANCE
    if worst is None:
        worst = max(v for key, v in parity.items() if key.startswith("max_abs_embedding"))
        what, limit = "embeddings", EMBEDDING_TOLERANCE
    limit = limit if tolerance is None else tolerance
    if worst <= limit:
        return None
    return f"its {what} differ by up to {worst:.3g} from the fp32 reference, allowed is {limit:.3g}"


def _every_gpu(device: str) -> tuple[str, ...]:
    """The GPUs that CUDA shows this process, CUDA_VISIBLE_DEVICES respected; asked of the driver itself."""
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    except OSError as error:
        raise DeviceError(f"device {device} was requested; the NVIDIA driver cannot be loaded ({error})") from error
    if status or not count.value:
        raise DeviceError(
            f"device {device} was requested; the NVIDIA driver shows no GPU (error {status}, {count.value} devices)"
        )
    return tuple(f"cuda:{number}" for number in range(count.value))
