"""A bundle for whoever names an encoder instead: exported once, into a cache that all processes of a user share."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

from jql_engine.bundle import MANIFEST, sha256_of
from jql_engine.cache import cache_folder, locked, private_folder
from jql_engine.errors import BundleError, HeadError
from jql_engine.printing import say

EXPORT = "from jql_export.cli import main; main()"


def exported(encoder: str, heads: Mapping[str, str | Path] | None = None, embed_only: bool = False) -> Path:
    """The bundle of an encoder (directory or hub id) and `heads` (name -> checkpoint; None: the default heads).

    The first caller runs jql-export in a process of its own, which needs jql-engine[export]; others wait for it, and
    stderr is told so. `embed_only` exports no heads.

    Raises BundleError with what jql-export said, HeadError for a checkpoint that cannot be read, and CacheError for a
    cache folder that cannot be written or that others can write in.
    """
    out = cache_folder("bundles") / _key(encoder, heads, embed_only)
    private_folder(out.parent)
    if (out / MANIFEST).is_file():  # also where no lock can be written
        return out
    with locked(out.with_suffix(".lock"), lambda: say(f"jql: another process is exporting {encoder}; waiting for it")):
        if not (out / MANIFEST).is_file():
            say(f"jql: exporting {encoder} to {out}, once; this takes minutes")
            _export(encoder, heads, embed_only, out)
    return out


def _export(encoder: str, heads: Mapping[str, str | Path] | None, embed_only: bool, out: Path) -> None:
    options = [f"--head={name}={file}" for name, file in (heads or {}).items()]
    options += ["--no-heads"] if embed_only else []
    options += [f"--variant={name}" for name in _variants()]
    command = [sys.executable, "-c", EXPORT, "--encoder", encoder, "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing"]
        raise BundleError(f"jql-export of {encoder} failed with exit code {done.returncode}; it said: {said[-1]}")


def _variants() -> tuple[str, ...]:
    """For the CPU, and for the GPU where this ONNX Runtime is built for one."""
    import onnxruntime

    on_gpu = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    return ("cpu-fp32", "cuda-fp16", "cuda-fp32") if on_gpu else ("cpu-fp32",)


def _key(encoder: str, heads: Mapping[str, str | Path] | None, embed_only: bool) -> str:
    """Changes with everything that the bundle is made of."""
    folder = Path(encoder)
    source = [(name, status.st_size, status.st_mtime_ns) for name, status in _files(folder)]
    checkpoints = {name: _hash(name, Path(file)) for name, file in (heads or {}).items()}
    parts = [
        str(folder.resolve()) if source else encoder,
        source,
        checkpoints,
        embed_only,
        version("jql-engine"),
        _variants(),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _hash(name: str, file: Path) -> str:
    try:
        return sha256_of(file)
    except OSError as error:
        raise HeadError(
            f"head {name}: {file} cannot be read ({error.strerror}); give the file of its weights"
        ) from error


def _files(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Every file below `folder`, which is all that jql-export may read, in the folders of modules as well."""
    # rglob enters no folder that is a link.
    for file in sorted({*folder.rglob("*"), *folder.glob("*/*")}):
        name = file.relative_to(folder)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix(), file.stat()
