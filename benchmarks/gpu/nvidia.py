"""One NVIDIA GPU: what it is, which libraries it runs with, and what it can give at most."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import distributions

import onnxruntime as ort
import torch

from benchmarks.table import GpuRow

LARGE = 8_192  # side of the matrices whose product is the ceiling
UP = (65_536, 768, 6_144)  # rows, in, out of a base encoder's widest layer
COPIED = 2 << 30  # bytes
QUERY = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.memory")


def gpu_ceilings(device: str, large: int = LARGE, up: tuple[int, int, int] = UP, copied: int = COPIED) -> list[GpuRow]:
    """The large fp16 product first, which MFU is measured with; then bf16, a layer's shape, and a copy."""
    square = (large, large, large)
    return [
        _product(device, square, torch.float16),
        _product(device, square, torch.bfloat16),
        _product(device, up, torch.float16),
        _copy(device, copied),
    ]


def _product(device: str, shape: tuple[int, int, int], dtype: torch.dtype) -> GpuRow:
    rows, inner, columns = shape
    a = torch.randn(rows, inner, device=device, dtype=dtype)
    b = torch.randn(inner, columns, device=device, dtype=dtype)
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    name = f"matrix product, torch, {rows:,} x {inner:,} x {columns:,}"
    row = GpuRow("ceiling", name, str(dtype).removeprefix("torch."), 0, 0)
    row.seconds = seconds_of(lambda: torch.mm(a, b, out=out), device)
    row.gflops = round(2 * rows * inner * columns / statistics.median(row.seconds) / 1e9, 1)
    return row


def _copy(device: str, n_bytes: int) -> GpuRow:
    source = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    row = GpuRow("ceiling", f"copy on the device, {n_bytes >> 20:,} MiB, read and written", "torch", 0, 0)
    row.seconds = seconds_of(lambda: target.copy_(source), device)
    row.gigabytes_per_second = round(2 * n_bytes / statistics.median(row.seconds) / 1e9, 1)
    return row


def seconds_of(work: Callable[[], object], device: str, n_calls: int = 20, rounds: int = 9) -> list[float]:
    """Seconds of one call, once a round of `n_calls`, by CUDA events where `device` is a GPU."""
    on_gpu = device.startswith("cuda")
    seconds = []
    for _ in range(rounds + 1):
        if on_gpu:
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
        start = time.perf_counter()
        for _ in range(n_calls):
            work()
        took = time.perf_counter() - start
        if on_gpu:
            ended.record()
            ended.synchronize()
            took = begun.elapsed_time(ended) / 1e3
        seconds.append(took / n_calls)
    return [float(f"{s:.4g}") for s in seconds[1:]]  # the first round warms up


def gpu_machine(device: str) -> dict[str, object]:
    """Name, memory, driver and libraries, for the field `gpu` of a result's machine."""
    known = torch.cuda.get_device_properties(device)
    which = f"GPU-{known.uuid}"  # CUDA_VISIBLE_DEVICES renumbers the GPUs for PyTorch, not for nvidia-smi
    command = ["nvidia-smi", "-i", which, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        line = ", ".join([f"unknown: {type(error).__name__}"] * len(QUERY))
    return {
        "name": known.name,
        "compute_capability": f"{known.major}.{known.minor}",
        "memory_gib": round(known.total_memory / 2**30, 1),
        "multiprocessors": known.multi_processor_count,
        **parse_query(line),
        "cuda_of_torch": torch.version.cuda,
        "cudnn_of_torch": torch.backends.cudnn.version(),
        "onnxruntime_build": ort.get_build_info(),
    }


def parse_query(line: str) -> dict[str, str]:
    """A line of nvidia-smi's comma-separated values for QUERY."""
    return dict(zip(QUERY, (value.strip() for value in line.strip().split(",")), strict=True))


def gpu_versions() -> dict[str, str]:
    """Versions of the installed packages that hold NVIDIA's libraries, and of what else runs on a GPU."""
    wanted = ("nvidia-", "cuda-", "tensorrt", "sentence-transformers", "triton")
    found: dict[str, str] = {}
    for package in distributions():
        found.setdefault((package.metadata["Name"] or "").lower(), package.version)  # the first hides the others
    # That of the CPU and that of the GPU install a module of one name: what was imported is said.
    return {name: found[name] for name in sorted(found) if name.startswith(wanted)} | {"onnxruntime": ort.__version__}
