"""ONNX Runtime's CUDA provider, as it is published, without a GPU: on stub CUDA libraries, which compute nothing.

What a provider decides on the host it decides here as on a GPU: which nodes it takes, which kernels it launches in
which types, what it copies, what it allocates and how it fails. What they compute is not to be had: device memory keeps
the byte that it was filled with. See runtime.cpp for what can be set.

`make build/recorder/.installed` brings the packages; `Recorder.build` compiles the libraries, and every process that is
started in the environment `Recorder.environment` sees a GPU.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PACKAGES = ROOT / "build" / "recorder" / "site"
PROVIDER = PACKAGES / "onnxruntime" / "capi" / "libonnxruntime_providers_cuda.so"
TOOLS = ("g++", "nm", "readelf")
IS_RECORDED = "RECORDER_RUNTIME" in os.environ  # this process sees the recorder's GPUs
SOURCES = {"libcudart": "runtime", "libcublas": "blas", "libcuda.": "driver"}


@dataclass(frozen=True)
class Recorder:
    """The compiled libraries."""

    folder: Path

    @classmethod
    def build(cls, folder: Path) -> Recorder:
        """Compile one library for each of CUDA's that the provider names, with every function that it imports."""
        includes = next(PACKAGES.glob("nvidia/cu*/include"))
        objects = {name: folder / f"{name}.o" for name in SOURCES.values()}
        for name, file in objects.items():
            compile_(HERE / f"{name}.cpp", "-c", "-O1", "-Wall", "-Werror", f"-I{includes}", "-o", file)
        libraries = sorted(needed(), key=lambda name: "cudart" not in name)  # the others call the recorder in it
        runtime = folder / libraries[0]
        for library in libraries:
            source = next((objects[SOURCES[part]] for part in SOURCES if part in library), None)
            stubs, versions = folder / f"{library}.cpp", folder / f"{library}.map"
            stubs.write_text(unexpected(imported(library) - (exported(source) if source else set())))
            versions.write_text(f"{library} {{ global: *; }};\n")
            parts = [*([source] if source else []), *([] if library == runtime.name else [runtime])]
            options = (f"-Wl,-soname,{library}", f"-Wl,--version-script,{versions}", "-Wl,-rpath,$ORIGIN")
            compile_(stubs, *parts, "-shared", *options, "-o", folder / library)
        return cls(folder)

    def environment(self, **settings: object) -> dict[str, str]:
        """The environment of a process that sees a GPU."""
        paths = (HERE / "site", PACKAGES, ROOT)
        return os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(self.folder), os.environ.get("LD_LIBRARY_PATH")])),
            "RECORDER_RUNTIME": str(next(self.folder.glob("libcudart.so*[0-9]"))),
            **{f"RECORDER_{name.upper()}": str(value) for name, value in settings.items()},
        }


class Record:
    """The record of this process, which was started in a recorder's environment."""

    def __init__(self) -> None:
        self._runtime = ctypes.CDLL(os.environ["RECORDER_RUNTIME"])
        self._runtime.recorder_take.restype = ctypes.c_char_p
        self._runtime.recorder_used.restype = self._runtime.recorder_n_kept.restype = ctypes.c_size_t
        self._runtime.recorder_kept.restype = ctypes.POINTER(ctypes.c_char)

    def take(self) -> list[str]:
        """The lines since the last call."""
        return self._runtime.recorder_take().decode().splitlines()

    def used(self, device: int = 0) -> int:
        """Bytes that are allocated on a GPU."""
        return self._runtime.recorder_used(device)

    def kept(self) -> list[bytes]:
        """What was copied to GPUs on streams, where RECORDER_KEEP is set."""
        size = ctypes.c_size_t()
        found = []
        for i in range(self._runtime.recorder_n_kept()):
            content = self._runtime.recorder_kept(ctypes.c_size_t(i), ctypes.byref(size))
            found.append(content[: size.value])
        return found


def missing() -> str:
    """What a recorder needs and is not here; empty where all is."""
    if not PROVIDER.is_file():
        return "make build/recorder/.installed brings ONNX Runtime for CUDA"
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"{', '.join(absent)} not found: install gcc and binutils" if absent else ""


def provider_version() -> str:
    """Of onnxruntime-gpu."""
    return next(iter(distributions(name="onnxruntime-gpu", path=[str(PACKAGES)]))).version


def needed() -> list[str]:
    """The libraries of CUDA that the provider names."""
    lines = tool("readelf", "--dynamic", "--wide", PROVIDER).splitlines()
    names = [line.split("[")[1].rstrip("]") for line in lines if "(NEEDED)" in line]
    return [name for name in names if name.startswith("libcu")]


def imported(library: str) -> set[str]:
    """The functions that the provider takes from a library; the driver's carry no version that would say it."""
    symbols = [line.split()[-1] for line in tool("nm", "--dynamic", "--undefined-only", PROVIDER).splitlines()]
    if library.startswith("libcuda.so"):
        return {symbol for symbol in symbols if symbol.startswith("cu") and "@" not in symbol}
    return {symbol.partition("@")[0] for symbol in symbols if symbol.endswith(f"@{library}")}


def exported(file: Path) -> set[str]:
    """The functions that an object file defines."""
    return {line.split()[-1] for line in tool("nm", "--extern-only", "--defined-only", file).splitlines()}


def unexpected(functions: set[str]) -> str:
    """Source of functions that say that they were called, and that they are not supported."""
    bodies = (f'int {name}() {{ recorder_add("unexpected {name}"); return 801; }}' for name in sorted(functions))
    return 'extern "C" {\nvoid recorder_add(const char*, ...);\n' + "\n".join(bodies) + "\n}\n"


def compile_(*arguments: object) -> None:
    """With g++."""
    tool("g++", "-std=c++17", "-fPIC", *arguments)


def tool(*command: object) -> str:
    """What a program prints; it must not fail."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command[0]} failed: {done.stderr}"
    return done.stdout


MISSING = missing()
