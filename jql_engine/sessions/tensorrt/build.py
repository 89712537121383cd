"""TensorRT, or TensorRT for RTX, through the Python API that both share: load one, turn an ONNX graph into an engine.

TensorRT proper measures kernels on the GPU at hand and builds for it alone. TensorRT for RTX builds without a GPU, for
named compute capabilities, and compiles the kernels where the engine runs.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jql_engine.data import Budget
from jql_engine.errors import BundleError, DeviceError
from jql_engine.sessions.tensorrt.profiles import Interface, Profile, profiles_of

TENSORRT, RTX = "tensorrt", "tensorrt-rtx"
MODULES = {TENSORRT: ("tensorrt",), RTX: ("tensorrt_rtx", "tensorrt_rtx_bindings")}
# The operators RotaryEmbedding and Attention came with TensorRT 10.15; of TensorRT for RTX 1.7 is the oldest tested.
OLDEST = {TENSORRT: "10.15", RTX: "1.7"}
INSTALL = {
    TENSORRT: "pip install 'tensorrt>=10.15'",
    RTX: "pip install 'tensorrt-rtx-cu13-libs>=1.7' 'tensorrt-rtx-cu13-bindings>=1.7'",
}


@dataclass(frozen=True, slots=True)
class Library:
    """TensorRT, or TensorRT for RTX, as it was loaded."""

    name: str  # tensorrt or tensorrt-rtx
    version: str
    module: Any

    def __str__(self) -> str:
        return f"{'TensorRT' if self.name == TENSORRT else 'TensorRT for RTX'} {self.version}"


def load_library(name: str | None = None) -> Library:
    """Load tensorrt or tensorrt-rtx, None: the first that is installed; DeviceError where there is none to use."""
    if name is not None and name not in MODULES:
        raise DeviceError(f"library {name!r} is unknown; known are {', '.join(MODULES)}")
    names = list(MODULES) if name is None else [name]
    for library in names:
        for module in MODULES[library]:
            if (found := _import(library, module)) is not None:
                return _checked(Library(library, str(found.__version__), found))
    raise DeviceError(f"{' and '.join(names)}: not installed; {', or '.join(INSTALL[name] for name in names)}")


def _import(library: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            return None
        raise DeviceError(f"{library}: module {module} misses {error.name}; {INSTALL[library]}") from error
    except (ImportError, OSError, RuntimeError) as error:  # the shared library behind the module
        raise DeviceError(f"{library} is installed, but cannot be loaded ({error}); {INSTALL[library]}") from error


def _checked(library: Library) -> Library:
    oldest = OLDEST[library.name]
    if [int(part) for part in re.findall(r"\d+", library.version)[:2]] < [int(part) for part in oldest.split(".")]:
        raise DeviceError(f"{library} is too old, {oldest} or later is needed; {INSTALL[library.name]}")
    return library


@dataclass(frozen=True, slots=True)
class Built:
    """A serialized engine."""

    engine: Any  # a buffer
    timings: bytes | None  # of its kernels, for builds to come; None where the library measures none
    fused: bool  # whether attention is one kernel, or single operations


def build(
    library: Library,
    graph: Path,
    budget: Budget,
    compute_capability: str,
    timings: bytes,
    report: Callable[[str], None],
) -> Built:
    """Build the engine of `graph` with one profile for each bucket of `budget`; `timings` of earlier builds, or empty.

    Raises BundleError naming the node that the library cannot take, or its own words where it cannot build; DeviceError
    where the library does not build for `compute_capability` ("8.0").
    """
    report(f"building an engine of {graph.name} with {library} for compute capability {compute_capability}")
    try:
        return _Build(library, graph, report).run(budget, compute_capability, timings, fused=True)
    except _UnfusedError:
        # Seen with head size 8, a model for tests: correct, and slower on long documents.
        report(f"{library} has no fused attention kernel for this model: its attention is built from single operations")
        return _Build(library, graph, report).run(budget, compute_capability, timings, fused=False)


class _UnfusedError(Exception):
    """The library has no kernel for the attention of a graph."""


class _Build:
    """A parsed graph and its builder."""

    def __init__(self, library: Library, graph: Path, report: Callable[[str], None]) -> None:
        trt = library.module
        self.library, self.graph, self.report = library, graph, report
        self.log = listener(trt)
        self.builder = trt.Builder(self.log)
        strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        # Where the flag is gone, there are no other networks.
        self.network = self.builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
        self.parser = trt.OnnxParser(self.network, self.log)
        if not self.parser.parse_from_file(str(graph)):
            raise BundleError(self._refusal())

    def run(self, budget: Budget, compute_capability: str, timings: bytes, fused: bool) -> Built:
        config = self._config(compute_capability)
        profiles = profiles_of(budget)
        Interface.of_network(self.network, profiles).check(budget, str(self.graph))
        for profile in profiles:
            config.add_optimization_profile(self._shapes(profile))
        if not fused:
            self._decompose()
        monitor = _monitor(self.library.module, self.report)  # held here: it must outlive the build
        config.progress_monitor = monitor
        measures = self.library.name == TENSORRT
        if measures:
            config.set_timing_cache(config.create_timing_cache(timings), False)
        engine = self.builder.build_serialized_network(self.network, config)
        if engine is None:
            self._explain(fused)
        return Built(engine, bytes(config.get_timing_cache().serialize()) if measures else None, fused)

    def _config(self, compute_capability: str) -> Any:
        trt, config = self.library.module, self.builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)  # the heads are fp32, not a mantissa of ten bits
        if self.library.name == RTX:
            config.num_compute_capabilities = 1
            config.set_compute_capability(_value_of(compute_capability, self.library), 0)
        return config

    def _shapes(self, profile: Profile) -> Any:
        """Rows of exactly the bucket's length; kernels are chosen for full batches."""
        shapes = self.builder.create_optimization_profile()
        smallest, largest = (1, profile.row_length), (profile.max_docs, profile.row_length)
        for i in range(self.network.num_inputs):
            shapes.set_shape(self.network.get_input(i).name, smallest, largest, largest)
        return shapes

    def _decompose(self) -> None:
        for i in range(self.network.num_layers):
            layer = self.network.get_layer(i)
            if layer.type == self.library.module.LayerType.ATTENTION_INPUT:
                layer.__class__ = self.library.module.IAttentionInputLayer  # get_layer returns the base class
                layer.attention.decomposable = True

    def _refusal(self) -> str:
        errors = [self.parser.get_error(i) for i in range(self.parser.num_errors)]
        places = [f"node {e.node_name()} ({e.node_operator()}): " if e.node_operator() else "" for e in errors]
        what = "; ".join(f"{place}{e.desc()}" for place, e in zip(places, errors, strict=True))
        return f"{self.graph}: {self.library} cannot read {what}; choose another --variant"

    def _explain(self, fused: bool) -> None:
        found = "; ".join(self.log.errors) or "no reason given"
        if fused and "dedicated kernel" in found:
            raise _UnfusedError
        raise BundleError(f"{self.graph}: {self.library} cannot build an engine of it: {found}")


def _value_of(wanted: str, library: Library) -> Any:
    """The value of TensorRT for RTX for a compute capability like 8.0; DeviceError where it builds none for it."""
    known = {
        f"{name[2:-1]}.{name[-1]}": value
        for name, value in library.module.ComputeCapability.__members__.items()
        if name.startswith("SM")
    }
    if wanted not in known:
        raise DeviceError(
            f"compute capability {wanted}: {library} builds for {', '.join(known)}; for a GPU of {wanted} use TensorRT "
            f"on that GPU: {INSTALL[TENSORRT]}"
        )
    return known[wanted]


def deserialize(library: Library, engine_bytes: Any, file: Path) -> tuple[Any, Any]:
    """The runtime and the engine that a buffer holds; the first must outlive the second.

    `file`: where it came from, for DeviceError, which says why it cannot run. The code for the host that an engine may
    carry is not allowed: TensorRT refuses an engine with any.
    """
    log = listener(library.module)
    runtime = library.module.Runtime(log)
    if runtime is None:
        raise DeviceError(f"{library} cannot start: {'; '.join(log.errors)}")
    engine = runtime.deserialize_cuda_engine(engine_bytes)
    if engine is None:
        raise DeviceError(
            f"{file}: {library} cannot run this engine: {'; '.join(log.errors)}; delete it from the engine cache to "
            "have it built again, or, if it belongs to a bundle, export that again"
        )
    return runtime, engine


def listener(trt: Any) -> Any:
    """A logger that keeps errors in its `errors`, for the message of our own, and drops the rest."""

    class Listener(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(" ".join(message.split()))

    return Listener()


def _monitor(trt: Any, report: Callable[[str], None]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def phase_start(self, phase: str, parent: str | None, n_steps: int) -> None:
            if parent == "Building engine":  # the phases of the whole; theirs are too many to show
                report(f"{phase}, {n_steps} steps")

        def phase_finish(self, phase: str) -> None: ...

        def step_complete(self, phase: str, step: int) -> bool:  # noqa: ARG002
            return True

    return Monitor()
