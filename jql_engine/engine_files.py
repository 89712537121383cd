"""Engine files: under which name they lie, when one may be used, and how one is built once and by one process.

    BUNDLE/engines/<name>.engine    what TensorRT serialized
    BUNDLE/engines/<name>.json      {key: every field of EngineKey, sha256 of the engine, fused, seconds}

The second is written last and by rename: an engine without it is none. Engines are not listed in bundle.json; they
belong to a GPU and a library, not to the bundle.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import queue
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jql_engine.bundle import Bundle, sha256_of
from jql_engine.data import Budget
from jql_engine.errors import BundleError, DeviceError
from jql_engine.gpu import Gpu
from jql_engine.profiles import budget_for, profiles_of
from jql_engine.tensorrt import RTX, TENSORRT, Built, Library, Target, build, load_library

# Larger batches keep the GPU busier and need more memory; to be measured on each GPU.
BATCH_TOKENS = 16384
LOCK_SECONDS = 0.5
REPORT_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What a user may choose about engines."""

    folder: Path | None = None  # where they lie, instead of BUNDLE/engines
    build: bool = True  # False: one that fits must be there
    library: str | None = None  # tensorrt or tensorrt-rtx, None: the first installed
    hardware: str = "same-gpu"  # or same-compute-capability, ampere-plus
    version_compatible: bool = False
    batch_tokens: int = BATCH_TOKENS


@dataclass(frozen=True, slots=True)
class EngineKey:
    """All that decides whether an engine may be used."""

    variant: str
    graph: str  # SHA-256 over the hashes of the graph and its weights
    library: str
    version: str  # the major number alone where the engine is version-compatible
    gpu: str | None  # its name; None where any of the compute capability will do
    compute_capability: str  # followed by + where later ones will do too
    precision: str
    profiles: list[list[int]]  # [row length, most documents]
    hardware: str
    version_compatible: bool

    @property
    def name(self) -> str:
        """A file name that people can read; its end is a hash of every field."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:10]
        where = [f"sm{self.compute_capability}", _slug(self.gpu), f"{self.library}-{self.version}"]
        return "_".join([self.variant, *where, digest])


def key_of(
    bundle: Bundle, variant: str, budget: Budget, library: Library, target: Target, gpu: str | None
) -> EngineKey:
    """The key of the engine of a variant for `target`; `gpu`: the name of the GPU at hand, if any."""
    info = bundle.manifest.variants[variant]
    files = sorted(name for name in bundle.manifest.files if name in (info.graph, f"{info.graph}.data"))
    hashes = "".join(bundle.manifest.files[name]["sha256"] for name in files)
    # An engine of TensorRT for RTX holds no kernels chosen on one GPU: it runs on all of its compute capability.
    for_one_gpu = library.name == TENSORRT and target.hardware == "same-gpu"
    return EngineKey(
        variant,
        hashlib.sha256(hashes.encode()).hexdigest(),
        library.name,
        library.version.partition(".")[0] if target.version_compatible else library.version,
        gpu if for_one_gpu else None,
        "8.0+" if target.hardware == "ampere-plus" else target.compute_capability,
        info.precision,
        [[profile.row_length, profile.max_docs] for profile in profiles_of(budget)],
        target.hardware,
        target.version_compatible,
    )


def engine_for(
    bundle: Bundle,
    variant: str,
    compute_capability: str,
    gpu: str | None,
    options: EngineOptions,
    report: Callable[[str], None],
) -> tuple[Library, Budget, Path]:
    """The engine file of a variant, built now unless it is there already, its library, and the batches it takes."""
    library = load_library(options.library)
    budget = budget_for(bundle, options.batch_tokens)
    target = Target(compute_capability, options.hardware, options.version_compatible)
    key = key_of(bundle, variant, budget, library, target, gpu)
    folder = options.folder or bundle.path / "engines"
    timings = folder / f"{library.name}-{library.version}_{_slug(gpu)}.timings"

    def make() -> Built:
        known = timings.read_bytes() if timings.is_file() else b""
        built = _interruptible(lambda: build(library, bundle.graph(variant), budget, target, known, report), report)
        if built.timings is not None:
            write_aside(timings, built.timings)
        return built

    return library, budget, provide(folder, key, make if options.build else None, report)


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
    compute_capability: str | None,
    options: EngineOptions,
    report: Callable[[str], None],
) -> Path:
    """The engine file of a variant, for a GPU that need not be here; None: for GPU 0 of this machine.

    TensorRT builds for a GPU at hand only, so a compute capability alone asks for TensorRT for RTX.
    """
    gpu = None
    if compute_capability is None or options.library == TENSORRT:
        gpu, here = _this_gpu()
        if compute_capability not in (None, here):
            raise DeviceError(
                f"compute capability {compute_capability}: TensorRT builds on the GPU itself, and this is a {gpu} of "
                f"{here}; build there, or use --library {RTX}"
            )
        compute_capability = here
    elif options.library is None:
        options = replace(options, library=RTX)
    return engine_for(bundle, variant, compute_capability, gpu, options, report)[2]


def _this_gpu() -> tuple[str, str]:
    try:
        device = Gpu(0)
    except DeviceError as error:
        raise DeviceError(
            f"{error}; to build for a GPU elsewhere give --compute-capability, which {RTX} can do without one"
        ) from error
    device.close()
    return device.name, device.compute_capability


def provide(folder: Path, key: EngineKey, make: Callable[[], Built] | None, report: Callable[[str], None]) -> Path:
    """The engine file of `key` in `folder`; where there is none `make` builds it, under a lock, once for all processes.

    Raises BundleError where there is none and `make` is None, or where the folder cannot be written.
    """
    file = folder / f"{key.name}.engine"
    if _is_whole(file, key, report):
        return file
    if make is None:
        raise BundleError(_why_none(folder, key))
    with _locked(writable(folder) / f".{key.name}.lock", report):
        if not _is_whole(file, key, report):
            _write(file, key, make, report)
    return file


def writable(folder: Path) -> Path:
    """The folder, made where it is missing; raises BundleError where nothing can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise BundleError(
            f"{folder}: engines cannot be written there ({error.strerror}); name another folder with --engine-cache"
        ) from error


def write_aside(file: Path, content: Any) -> None:
    """Write a file beside its place and rename it."""
    aside = file.with_name(f".{file.name}.{os.getpid()}.writing")
    try:
        aside.write_bytes(content)
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def _slug(gpu: str | None) -> str:
    return re.sub(r"[^a-z0-9]+", "-", (gpu or "any").lower()).strip("-")


def _write(file: Path, key: EngineKey, make: Callable[[], Built], report: Callable[[str], None]) -> None:
    start = time.monotonic()
    built = make()
    seconds = round(time.monotonic() - start, 1)
    engine = memoryview(built.engine)
    file.with_suffix(".json").unlink(missing_ok=True)
    write_aside(file, engine)
    about = {"key": asdict(key), "sha256": hashlib.sha256(engine).hexdigest(), "fused": built.fused, "seconds": seconds}
    write_aside(file.with_suffix(".json"), (json.dumps(about, indent=1) + "\n").encode())
    report(f"built {file.name}: {engine.nbytes / 1e6:,.0f} MB in {seconds} s")


def _is_whole(file: Path, key: EngineKey, report: Callable[[str], None]) -> bool:
    about = _about(file.with_suffix(".json"))
    if about is None or not file.is_file() or about.get("key") != asdict(key):
        return False
    if sha256_of(file) == about.get("sha256"):
        return True
    report(f"{file} is damaged: its SHA-256 is not the one beside it")
    return False


def _about(file: Path) -> dict[str, Any] | None:
    try:
        about = json.loads(file.read_bytes())
    except (OSError, ValueError):  # none yet, or not ours
        return None
    return about if isinstance(about, dict) and isinstance(about.get("key"), dict) else None


def _why_none(folder: Path, key: EngineKey) -> str:
    """What is there instead: the engine that differs in the fewest fields, and in which."""
    wanted, differences = asdict(key), {}
    for file in sorted(folder.glob("*.json")):
        if about := _about(file):
            found = about["key"]
            other = [name for name in wanted if found.get(name) != wanted[name]]
            differences[file.stem] = [f"{name} {found.get(name)} instead of {wanted[name]}" for name in other]
    how = "run once without --no-build, or build it ahead with jql-export"
    if not differences:
        return f"{folder} holds no engine, and building is not allowed: {how}"
    name, fields = min(differences.items(), key=lambda item: len(item[1]))
    why = f"was built for {'; '.join(fields)}" if fields else "is damaged"
    return f"{folder} holds no engine {key.name}, and building is not allowed; {name}, the nearest, {why}: {how}"


@contextmanager
def _locked(file: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock `file`; the system gives it back when its holder ends, however that happens."""
    with file.open("w") as lock:
        waited = False
        while not _take(lock.fileno()):
            if not waited:
                report(f"another process is building this engine (lock {file}); waiting for it")
            waited = True
            time.sleep(LOCK_SECONDS)
        yield


def _take(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
