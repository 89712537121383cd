"""The NVIDIA GPUs of this machine: those that the driver shows, and those that the kernel sees without it."""

from __future__ import annotations

import ctypes
import os
import re
from contextlib import suppress
from pathlib import Path

from jql_engine.errors import DeviceError

DRIVER = "libcuda.so.1"
ROOT = Path("/")
NVIDIA = "0x10de"  # the vendor of a PCI device
DISPLAY = (
    "0x03"  # how the class of a PCI device begins: VGA and 3D controllers, not the audio or the switch beside them
)


def every_gpu(device: str) -> tuple[str, ...]:
    """The GPUs that CUDA shows this process, CUDA_VISIBLE_DEVICES respected; asked of the driver itself."""
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL(DRIVER)
        status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    except OSError as error:
        raise DeviceError(f"device {device} was requested; the NVIDIA driver cannot be loaded ({error})") from error
    if status or not count.value:
        raise DeviceError(
            f"device {device} was requested; the NVIDIA driver shows no GPU (error {status}, {count.value} devices)"
        )
    return tuple(f"cuda:{number}" for number in range(count.value))


def gpu_without_driver() -> Path | None:
    """Where the kernel lists an NVIDIA GPU that this process may use; what is broken elsewhere does not hide it.

    None where there is no such GPU, or where CUDA_VISIBLE_DEVICES hides all of them.
    """
    if _hidden(os.environ.get("CUDA_VISIBLE_DEVICES")):
        return None
    listed = [*ROOT.glob("proc/driver/nvidia/gpus/*"), *ROOT.glob("dev/nvidia[0-9]*")]
    return next(iter(listed or filter(_is_gpu, ROOT.glob("sys/bus/pci/devices/*"))), None)


def _hidden(visible: str | None) -> bool:
    """Whether a value of CUDA_VISIBLE_DEVICES shows no GPU: CUDA stops at the first entry that names none."""
    return visible is not None and not re.match(r"\s*(\d|GPU-|MIG-)", visible)


def _is_gpu(device: Path) -> bool:
    with suppress(OSError):
        return (device / "vendor").read_text().strip() == NVIDIA and (device / "class").read_text().startswith(DISPLAY)
    return False
