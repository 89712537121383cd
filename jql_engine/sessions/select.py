"""Which device and which graph a job takes, and why not another."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass

from jql_engine.bundle import Bundle, Variant
from jql_engine.errors import BundleError, DeviceError
from jql_engine.sessions.base import CHUNK_BYTES, ON_GPU
from jql_engine.sessions.devices import every_gpu, gpu_without_driver
from jql_engine.sessions.gpu import check_runtime
from jql_engine.sessions.tensorrt.build import load_library

DEVICE = re.compile(r"auto|cpu|cuda|cuda:\d+(,cuda:\d+)*")
# Providers and precisions that a kind of device runs, the fastest first (docs/benchmarks.md); in fp32 OpenVINO and
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
# What a score may differ by from the fp32 reference where nobody asks for more or less: OpenVINO's bf16 passes, int8
# does not. On multilingual e5's probe documents transformers itself is 0.024 away in bf16, OpenVINO 0.016.
TOLERANCE = 2e-2
# The same of an embedding, in a bundle without heads; as certified of bf16.
EMBEDDING_TOLERANCE = 5e-3
OR_CPU = "or take the CPU: --device cpu, in Python device='cpu'"


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


def choose(bundle: Bundle, device: str, variant: str | None = None, tolerance: float | None = None) -> Choice:
    """The devices and the graph that `device` stands for: cpu, cuda (every GPU), cuda:0,cuda:2, or auto.

    `auto` is the GPU where the machine has one and the bundle a graph for it, else the CPU. `variant` None takes the
    fastest graph that is installed and whose scores were found within `tolerance` (None: TOLERANCE) of the fp32
    reference; int8, and bf16 on a GPU, only where a tolerance asks for it. Raises DeviceError where a device that was
    asked for, or a GPU that `auto` found, cannot be used; BundleError where the bundle has no such graph.
    """
    if not DEVICE.fullmatch(device):
        raise DeviceError(f"device {device!r} is unknown; known are auto, cpu, cuda, cuda:N and cuda:N,cuda:M")
    if device == "auto":
        device = _best_kind(bundle, variant, tolerance)
    kind = device.partition(":")[0]
    gpus = every_gpu(device) if kind == "cuda" else ()  # before anything of the bundle: the GPU was asked for
    name = _named(bundle, kind, variant, tolerance) if variant else _fastest(bundle, kind, tolerance)
    if device != "cuda":
        if len(set(named := device.split(","))) < len(named):
            raise DeviceError(f"device {device} names a GPU twice; a GPU has one worker")
        if missing := sorted(set(named) - {"cpu", *gpus}):
            raise DeviceError(f"device {missing[0]} was requested; the NVIDIA driver shows {', '.join(gpus)}")
        gpus = tuple(named)
    return Choice(gpus, name, tolerance)


def runnable(bundle: Bundle, kind: str) -> list[str]:
    """The variants that run on a kind of device here, the fastest first."""
    variants = bundle.manifest.variants.items()
    found = [name for how in SPEED[kind] for name, v in variants if (v.provider, v.precision) == how]
    return [name for name in found if unavailable_reason(bundle.manifest.variants[name]) is None]


def _fastest(bundle: Bundle, kind: str, tolerance: float | None) -> str:
    variants, reasons = bundle.manifest.variants, {}
    for how in SPEED[kind]:
        for name, variant in variants.items():
            if (variant.provider, variant.precision) == how:
                reason = unavailable_reason(variant) or needs_opt_in(variant, tolerance)
                if not (reason := reason or exceeds_tolerance(variant, tolerance)):
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
            f"{bundle.path} has no variant {name!r} for {kind}; it has {have}: choose one of these, or export again "
            "with the --variant you need"
        )
    if tolerance is not None and (reason := exceeds_tolerance(variants[name], tolerance)):
        raise BundleError(f"variant {name}: {reason}; ask for another variant or allow more with --tolerance")
    return name


def unavailable_reason(variant: Variant) -> str | None:
    """Why a graph cannot run on this machine, and what to do; None where it can."""
    if variant.provider == "openvino":
        from jql_engine.sessions import openvino

        return openvino.unavailable_reason(variant.precision)
    if variant.provider != "tensorrt" and importlib.util.find_spec("onnxruntime") is None:
        extra = "gpu" if variant.provider in ON_GPU else "cpu"
        return f"the package onnxruntime is not installed; pip install 'jql-engine[{extra}]'"
    try:
        if variant.provider == "cuda":
            import onnxruntime

            from jql_engine.sessions.cuda.provider import check_built

            check_built(onnxruntime.get_available_providers(), 0)
        elif variant.provider == "tensorrt":
            load_library()
        if variant.provider in ON_GPU:
            check_runtime()
    except DeviceError as error:
        return str(error)
    return None


def _best_kind(bundle: Bundle, variant: str | None, tolerance: float | None) -> str:
    """What a named variant is for; else cuda where a GPU is there and a graph for it would be taken, else cpu."""
    variants = bundle.manifest.variants
    if variant is not None:
        return "cuda" if variant in variants and variants[variant].provider in ON_GPU else "cpu"
    for_gpus = {name: v for name, v in variants.items() if (v.provider, v.precision) in SPEED["cuda"]}
    wanted = {name: v for name, v in for_gpus.items() if not needs_opt_in(v, tolerance)}
    return "cuda" if wanted and _has_gpu_for(wanted) else "cpu"


def _has_gpu_for(graphs: Mapping[str, Variant]) -> bool:
    """Whether this machine has a GPU; raises DeviceError where it can run none of the graphs.

    Without a word the CPU would take weeks for the work of hours.
    """
    try:
        gpus = ", ".join(every_gpu("auto"))
    except DeviceError as error:
        if (gpu := gpu_without_driver()) is None:
            return False
        raise DeviceError(
            f"{error}, while the kernel sees an NVIDIA GPU ({gpu}): mend the driver, or give this container or job its "
            f"GPU, {OR_CPU}"
        ) from error
    reasons = {name: unavailable_reason(graph) for name, graph in graphs.items()}
    if all(reasons.values()):
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise DeviceError(
            f"device auto: the NVIDIA driver shows {gpus}, and no graph of the bundle can run there ({why}): mend "
            f"that, {OR_CPU}"
        )
    return True


def needs_opt_in(variant: Variant, tolerance: float | None) -> str | None:
    """Why a graph is not taken without being asked for: it is far from the fp32 reference, or is on the whole."""
    if variant.precision == "int8" and tolerance is None:
        return "int8 is taken only where --tolerance or --variant asks for it"
    # How far it is is known only once it is open, and then it is too late for another.
    if variant.provider in ON_GPU and variant.precision == "bf16" and (tolerance is None or tolerance <= TOLERANCE):
        return f"bf16 is taken on a GPU only where --variant or a --tolerance over {TOLERANCE} asks for it"
    return None


def exceeds_tolerance(variant: Variant, tolerance: float | None) -> str | None:
    """Why a graph is not as close to the fp32 reference as asked; a GPU's is measured when it is opened."""
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
