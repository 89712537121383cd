"""TensorRT's engine files: where one that may be used lies, and how one is built once and by one process.

    BUNDLE/engines/<name>.engine    made ahead by jql-export, and listed in bundle.json with its key and its SHA-256
    CACHE/<name>.engine             built here; CACHE is the user's own, and nobody else may write in it
    CACHE/<name>.json               {key: every field of EngineKey, sha256 of the engine, fused, seconds}

The last is written after the engine, so that one which was written by half is none. Nothing is ever written into a
bundle that is complete, and of its engines none is read that the manifest does not list.
"""

from __future__ import annotations

import hashlib
import json
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jql_engine.bundle import Bundle, EngineKey
from jql_engine.cache import locked, read_private, write_private
from jql_engine.data import Budget
from jql_engine.errors import BundleError, DeviceError
from jql_engine.sessions.base import BATCH_TOKENS, EngineOptions
from jql_engine.sessions.gpu import Gpu
from jql_engine.sessions.tensorrt.build import RTX, TENSORRT, Built, Library, build, load_library
from jql_engine.sessions.tensorrt.profiles import budget_for, profiles_of

REPORT_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class EngineFile:
    """A serialized engine that may be loaded."""

    path: Path  # where it lies, for messages
    content: Any  # buffer; the very bytes whose hash was compared
    sha256: str


def key_of(
    bundle: Bundle, variant: str, budget: Budget, library: Library, compute_capability: str, gpu: str | None
) -> EngineKey:
    """The key of the engine of a variant for `compute_capability`; `gpu`: the name of the GPU at hand, if any."""
    info = bundle.manifest.variants[variant]
    files = sorted(name for name in bundle.manifest.files if name in (info.graph, f"{info.graph}.data"))
    hashes = "".join(bundle.manifest.files[name]["sha256"] for name in files)
    return EngineKey(
        variant,
        hashlib.sha256(hashes.encode()).hexdigest(),
        library.name,
        library.version,
        # An engine of TensorRT for RTX holds no kernels chosen on one GPU: it runs on all of its compute capability.
        gpu if library.name == TENSORRT else None,
        compute_capability,
        info.precision,
        [[profile.row_length, profile.max_docs] for profile in profiles_of(budget)],
    )


def name_of(key: EngineKey) -> str:
    """A file name without suffix that people can read; its end is a hash of every field."""
    digest = hashlib.sha256(json.dumps(asdict(key), sort_keys=True).encode()).hexdigest()[:10]
    parts = [key.variant, f"sm{key.compute_capability}", key.gpu or "any", f"{key.library}-{key.version}", digest]
    return "_".join(map(_slug, parts))


def engine_for(
    bundle: Bundle,
    variant: str,
    compute_capability: str,
    gpu: str | None,
    options: EngineOptions,
    report: Callable[[str], None],
) -> tuple[Library, Budget, EngineFile]:
    """The engine of a variant: the bundle's, else the cache's, else built now; its library, and the batches it takes.

    Raises BundleError where there is none and none may be built, CacheError where others can write in the cache.
    """
    library = load_library(options.library)
    budget = budget_for(bundle, options.batch_tokens)
    key = key_of(bundle, variant, budget, library, compute_capability, gpu)
    if (engine := from_bundle(bundle, key)) is not None:
        return library, budget, engine
    if options.build:
        make = partial(_build_with_timings, options.cache, bundle, key, library, budget, report)
        return library, budget, provide(options.cache, key, make, report)
    if (engine := from_cache(options.cache, key, report)) is None:
        raise BundleError(why_none(bundle.manifest.engines, options.cache, key))
    return library, budget, engine


def _build_with_timings(
    folder: Path, bundle: Bundle, key: EngineKey, library: Library, budget: Budget, report: Callable[[str], None]
) -> Built:
    """Build the engine of `key` with the timings of kernels that earlier builds left in a private folder."""
    timings = folder / f"{key.library}-{key.version}_{_slug(key.gpu or 'any')}.timings"
    built = _build(bundle, key, library, budget, read_private(timings) or b"", report)
    if built.timings is not None:
        write_private(timings, built.timings)
    return built


def _build(
    bundle: Bundle, key: EngineKey, library: Library, budget: Budget, timings: bytes, report: Callable[[str], None]
) -> Built:
    graph = bundle.graph(key.variant)
    return _interruptible(lambda: build(library, graph, budget, key.compute_capability, timings, report), report)


def _interruptible(make: Callable[[], Built], report: Callable[[str], None] = lambda _: None) -> Built:
    """What `make` returns or raises, computed in a thread: a signal reaches the caller while a library is at work."""
    ended: queue.SimpleQueue[Built | BaseException] = queue.SimpleQueue()

    def work() -> None:
        try:
            ended.put(make())
        except BaseException as error:
            ended.put(error)

    threading.Thread(target=work, name="build", daemon=True).start()
    began, found = time.monotonic(), None
    while found is None:
        try:
            found = ended.get(timeout=REPORT_SECONDS)
        except queue.Empty:
            report(f"still building, {time.monotonic() - began:.0f} s so far")
    if isinstance(found, BaseException):
        raise found
    return found


def build_ahead(
    bundle: Bundle,
    variant: str,
    compute_capability: str,
    library: str,
    report: Callable[[str], None],
    batch_tokens: int = BATCH_TOKENS,
) -> tuple[str, EngineKey]:
    """Build the engine of a variant into a bundle that is being written; returns its entry of the manifest's `engines`.

    TensorRT for RTX builds for a GPU that need not be here, TensorRT for the GPU at hand only. Raises DeviceError where
    that is another, or none.
    """
    loaded = load_library(library)
    gpu = _this_gpu(compute_capability) if loaded.name == TENSORRT else None
    budget = budget_for(bundle, batch_tokens)
    key = key_of(bundle, variant, budget, loaded, compute_capability, gpu)
    start = time.monotonic()
    built = _build(bundle, key, loaded, budget, b"", report)
    name = f"engines/{name_of(key)}.engine"
    (bundle.path / "engines").mkdir(exist_ok=True)
    (bundle.path / name).write_bytes(built.engine)
    _report_built(bundle.path / name, built, start, report)
    return name, key


def _this_gpu(compute_capability: str) -> str:
    """The name of GPU 0, which must have `compute_capability`."""
    try:
        device = Gpu(0)
    except DeviceError as error:
        raise DeviceError(
            f"{error}; TensorRT builds on the GPU itself: to build for a GPU elsewhere use --library {RTX}"
        ) from error
    device.close()
    if device.compute_capability != compute_capability:
        raise DeviceError(
            f"compute capability {compute_capability}: TensorRT builds on the GPU itself, and this is a {device.name} "
            f"of {device.compute_capability}; build there, or use --library {RTX}"
        )
    return device.name


def from_bundle(bundle: Bundle, key: EngineKey) -> EngineFile | None:
    """The engine of `key` that the bundle lists, if any; raises BundleError where the file is not what it lists."""
    for name, listed in bundle.manifest.engines.items():
        if listed == key:
            return EngineFile(bundle.path / name, bundle.read(name), bundle.manifest.files[name]["sha256"])
    return None


def from_cache(folder: Path, key: EngineKey, report: Callable[[str], None]) -> EngineFile | None:
    """The engine of `key` in the private folder `folder`, None where there is none or a damaged one.

    Raises CacheError where others can have written it.
    """
    file = folder / f"{name_of(key)}.engine"
    about = _read_about(file.with_suffix(".json"))
    if about is None or about[0] != key or (content := read_private(file)) is None:
        return None
    if (digest := hashlib.sha256(content).hexdigest()) == about[1]:
        return EngineFile(file, content, digest)
    report(f"{file} is damaged: its SHA-256 is not the one beside it")
    return None


def provide(folder: Path, key: EngineKey, make: Callable[[], Built], report: Callable[[str], None]) -> EngineFile:
    """The engine of `key` in the private folder `folder`; `make` builds it, under a lock, once for all processes.

    Raises CacheError where the folder cannot be written, or others can write in it.
    """
    if (engine := from_cache(folder, key, report)) is not None:
        return engine
    lock = folder / f".{name_of(key)}.lock"
    with locked(lock, lambda: report(f"another process is building this engine (lock {lock}); waiting for it")):
        return from_cache(folder, key, report) or _write(folder / f"{name_of(key)}.engine", key, make, report)


def _write(file: Path, key: EngineKey, make: Callable[[], Built], report: Callable[[str], None]) -> EngineFile:
    start = time.monotonic()
    built = make()
    seconds = round(time.monotonic() - start, 1)
    content = memoryview(built.engine)
    digest = hashlib.sha256(content).hexdigest()
    file.with_suffix(".json").unlink(missing_ok=True)
    write_private(file, content)
    about = {"key": asdict(key), "sha256": digest, "fused": built.fused, "seconds": seconds}
    write_private(file.with_suffix(".json"), (json.dumps(about, indent=1) + "\n").encode())
    _report_built(file, built, start, report)
    return EngineFile(file, content, digest)


def _report_built(file: Path, built: Built, start: float, report: Callable[[str], None]) -> None:
    megabytes = memoryview(built.engine).nbytes / 1e6
    report(f"built {file.name}: {megabytes:,.0f} MB in {time.monotonic() - start:.1f} s")


def _read_about(file: Path) -> tuple[EngineKey, str] | None:
    """Key and SHA-256 of an engine in a private folder, from the file beside it; None where that is none of ours."""
    try:
        about = json.loads(read_private(file) or b"")
        return EngineKey(**about["key"]), about["sha256"]
    except (ValueError, KeyError, TypeError):
        return None


def why_none(listed: Mapping[str, EngineKey], folder: Path, key: EngineKey) -> str:
    """What there is instead in a bundle and the cache: the engine that differs in the fewest fields, and in which."""
    found = {Path(name).stem: other for name, other in listed.items()}
    for file in sorted(folder.glob("*.json")):
        if about := _read_about(file):
            found[file.stem] = about[0]
    how = "run once without --no-build, or build it ahead with jql-export"
    nothing = f"neither the bundle nor {folder} holds an engine"
    if not found:
        return f"{nothing}, and building is not allowed: {how}"
    wanted = asdict(key)
    differences = {
        name: [f"{field} {value} instead of {wanted[field]}" for field, value in asdict(other).items()
               if value != wanted[field]]
        for name, other in found.items()
    }  # fmt: skip
    name, fields = min(differences.items(), key=lambda item: len(item[1]))
    why = f"was built for {'; '.join(fields)}" if fields else "is damaged"
    return f"{nothing} {name_of(key)}, and building is not allowed; {name}, the nearest, {why}: {how}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")
