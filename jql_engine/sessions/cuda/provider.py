"""ONNX Runtime's CUDA provider: a graph on one GPU and nowhere else, and what its errors mean."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path
from typing import Any

import onnxruntime as ort

from jql_engine.errors import DeviceError

PROVIDER = "CUDAExecutionProvider"
# Before it, SkipLayerNormalization summed in half: where values were large it gave its bias, finite and wrong.
SINCE = (1, 31)
# What ONNX Runtime reads from the environment alone.
ENVIRONMENT = {
    # A product that cuBLAS divides among several blocks is summed in fp32 to its end, not in half.
    "ORT_CUDA_GEMM_OPTIONS": "2",
    # In fp32 the fused attention at every length: the other takes a square of memory for each batch of short documents.
    "ORT_MIN_SEQ_LEN_EFFICIENT_ATTENTION_FP32": "0",
}
# It would make BiasGelu of a sum and Gelu again, which export has written apart on purpose.
DISABLED = ["BiasGeluFusion"]
# How ONNX Runtime's allocators, CUDA and cuBLAS say it; their exceptions have no type of their own for it. cuBLAS is
# not initialized where there is no room for its handle.
SHORTAGES = (
    "Failed to allocate memory", "is smaller than requested bytes", "out of memory", "ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
)  # fmt: skip


def load(file: Path, device: int, stream: int, profile: Path | None = None) -> Any:
    """The graph as a session on `stream` of GPU number `device`, and nowhere else; raises DeviceError otherwise.

    `profile`: what the name of ONNX Runtime's profile begins with, where one is wanted.
    """
    ort.disable_telemetry_events()  # the text of other people passes through here: nothing is reported to anyone
    os.environ.update(ENVIRONMENT)
    ort.preload_dlls(cudnn=False)  # CUDA's libraries, where they were installed as Python packages
    options = ort.SessionOptions()
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
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
        session = ort.InferenceSession(
            str(file), options, providers=[(PROVIDER, settings)], disabled_optimizers=DISABLED, enable_fallback=0
        )
    except Exception as error:  # ONNX Runtime's exceptions share no other base
        if is_shortage(message := one_line(error)):
            why = f"{file.name} does not fit into the GPU's memory ({message}); free memory there, or use another GPU"
        else:
            why = missing_library() or (
                f"{file.name} cannot be loaded on the GPU alone: {message}; export the bundle again with this version, "
                "or use a newer onnxruntime-gpu"
            )
        raise DeviceError(f"device cuda:{device}: {why}") from error
    check_active(session.get_providers(), device)
    return session


def missing_library() -> str | None:
    """Why the CUDA provider itself cannot be loaded, if it cannot: ONNX Runtime says it to its log alone."""
    folder = Path(ort.__file__).parent / "capi"
    try:
        for name in ("shared", "cuda"):  # in this order: the provider takes symbols from the first
            ctypes.CDLL(str(folder / f"libonnxruntime_providers_{name}.so"), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return f"ONNX Runtime's CUDA provider cannot be loaded: {error}; pip install 'jql-engine[gpu]' brings CUDA"
    return None


def check_built(available: list[str], device: int) -> None:
    """Raise DeviceError where this ONNX Runtime knows no GPU, or is too old."""
    if PROVIDER not in available:
        raise DeviceError(
            f"device cuda:{device}: ONNX Runtime {ort.__version__} is built for {', '.join(available)}, expected "
            f"{PROVIDER}; install jql-engine[gpu], and not [cpu] beside it"
        )
    if tuple(map(int, re.findall(r"\d+", ort.__version__)[:2])) < SINCE:
        raise DeviceError(
            f"device cuda:{device}: ONNX Runtime {ort.__version__} is too old: its norms in fp16 are wrong where "
            f"values are large; expected {SINCE[0]}.{SINCE[1]} or newer: pip install 'jql-engine[gpu]'"
        )


def check_active(providers: list[str], device: int) -> None:
    """Raise DeviceError where ONNX Runtime went without its CUDA provider, as it does when a library is missing."""
    if providers[:1] != [PROVIDER]:
        raise DeviceError(
            f"device cuda:{device}: ONNX Runtime activated {', '.join(providers)}, expected {PROVIDER} first; a "
            "library of CUDA is missing or does not fit: see onnxruntime.print_debug_info()"
        )


def one_line(error: Exception) -> str:
    """What ONNX Runtime says, which ends with empty lines."""
    return " ".join(str(error).split())


def is_shortage(message: str) -> bool:
    """Whether an error of ONNX Runtime says that the device's memory is used up."""
    return any(phrase in message for phrase in SHORTAGES)
