"""Which device and which graph a job takes, and why not another."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from jql_engine.bundle import Bundle, Variant
from jql_engine.certificate import Certificate, read_certificate
from jql_engine.errors import BundleError, DeviceError, InputError
from jql_engine.sessions.base import CHUNK_BYTES, ON_GPU
from jql_engine.sessions.devices import every_gpu, gpu_without_driver
from jql_engine.sessions.gpu import check_runtime
from jql_engine.sessions.tensorrt.build import load_library

DEVICE = re.compile(r"auto|cpu|cuda|cuda:\d+(,cuda:\d+)*")
# Providers and precisions that a kind of device runs, the fastest first (docs/benchmarks.md); in fp32 OpenVINO and
# ONNX Runtime are about equal.
SPEED = {
    "cpu": (
        ("openvino", "bf16"),
        ("openvino", "fp32"),
        ("cpu", "fp32"),
        ("any", "fp32"),
    ),
    # Expected: packing saves the padding, and bf16 has no fused GeGLU.
    "cuda": (("cuda", "fp16"), ("tensorrt", "fp16"), ("cuda", "bf16"), ("cuda", "fp32")),
}
# What a score may differ by from the fp32 reference where nobody asks for more or less: OpenVINO's bf16 passes. On
# multilingual e5's probe documents transformers itself is 0.024 away in bf16, OpenVINO 0.016.
TOLERANCE = 2e-2
# The same of an embedding, in a bundle without heads.
EMBEDDING_TOLERANCE = 5e-3
OR_CPU = "or take the CPU: --device cpu, in Python device='cpu'"


@dataclass(frozen=True, slots=True)
class Limit:
    """What a graph may differ by from the fp32 reference: its scores, or the documents that it decides differently."""

    tolerance: float | None = None  # of scores; None: TOLERANCE
    max_flips: float | None = None  # share of documents that change sides, in the place of a tolerance
    certificate: Certificate | None = None  # what is known of that

    @classmethod
    def of(cls, bundle: Bundle, tolerance: float | None, max_flips: float | None) -> Limit:
        """Raises BundleError where flips are limited and the bundle has no certificate."""
        if tolerance is not None and max_flips is not None:
            raise InputError("a tolerance and --max-flips are two limits of one thing: give one of them")
        return cls(tolerance, max_flips, None if max_flips is None else read_certificate(bundle))

    def reason_against(self, name: str, variant: Variant) -> str | None:
        """Why a graph is not as close to the fp32 reference as asked; None where it is, or opening it will tell."""
        if self.certificate is not None and self.max_flips is not None:
            return self.certificate.reason_against(name, self.max_flips)
        return needs_opt_in(variant, self.tolerance) or exceeds_tolerance(variant, self.tolerance)


@dataclass(frozen=True, slots=True)
class Choice:
    """What a job runs on."""

    devices: tuple[str, ...]  # cpu, or cuda:N of each GPU
    variant: str
    tolerance: float | None = None  # what was asked for of the scores, if anything
    passed_over: Mapping[str, str] = field(default_factory=dict, compare=False)  # graphs that come first, and why not

    def notes(self) -> list[str]:
        """A line for each graph that comes before this one by speed and was not taken."""
        return [
            f"variant {name}, which is taken first where it can be, is not: {why}"
            for name, why in self.passed_over.items()
        ]

    @property
    def chunk_bytes(self) -> int:
        """Text of one chunk."""
        return CHUNK_BYTES[self.devices[0].partition(":")[0]]


def choose(
    bundle: Bundle,
    device: str,
    variant: str | None = None,
    tolerance: float | None = None,
    max_flips: float | None = None,
) -> Choice:
    """The devices and the graph that `device` stands for: cpu, cuda (every GPU), cuda:0,cuda:2, or auto.

    `auto` is the GPU where the machine has one and the bundle a graph for it, else the CPU. `variant` None takes the
    fastest graph that is installed and whose scores were found within `tolerance` (None: TOLERANCE) of the fp32
    reference; bf16 on a GPU only where a tolerance asks for it. With `max_flips` it is the fastest of which the
    bundle's certificate says that no larger share of documents is decided differently.

    Raises DeviceError where a device that was asked for, or a GPU that `auto` found, cannot be used; BundleError where
    the bundle has no such graph.
    """
    if not DEVICE.fullmatch(device):
        raise DeviceError(f"device {device!r} is unknown; known are auto, cpu, cuda, cuda:N and cuda:N,cuda:M")
    limit = Limit.of(bundle, tolerance, max_flips)
    passed_over: Mapping[str, str] = {}
    if device == "auto":
        device, passed_over = _best_kind(bundle, variant, limit)
    kind = device.partition(":")[0]
    gpus = every_gpu(device) if kind == "cuda" else ()  # before anything of the bundle: the GPU was asked for
    name, faster = (_named(bundle, kind, variant, limit), {}) if variant else _fastest(bundle, kind, limit)
    if device != "cuda":
        if len(set(named := device.split(","))) < len(named):
            raise DeviceError(f"device {device} names a GPU twice; a GPU has one worker")
        if missing := sorted(set(named) - {"cpu", *gpus}):
            raise DeviceError(f"device {missing[0]} was requested; the NVIDIA driver shows {', '.join(gpus)}")
        gpus = tuple(named)
    return Choice(gpus, name, tolerance, {**passed_over, **faster})


def runnable(bundle: Bundle, kind: str) -> list[str]:
    """The variants that run on a kind of device here, the fastest first."""
    variants = bundle.manifest.variants.items()
    found = [name for how in SPEED[kind] for name, v in variants if (v.provider, v.precision) == how]
    return [name for name in found if unavailable_reason(bundle.manifest.variants[name]) is None]


def _fastest(bundle: Bundle, kind: str, limit: Limit) -> tuple[str, dict[str, str]]:
    """The fastest graph that may be taken, and why none that is faster."""
    variants = bundle.manifest.variants
    reasons: dict[str, str] = {}
    for how in SPEED[kind]:
        for name, variant in variants.items():
            if (variant.provider, variant.precision) == how:
                reason = unavailable_reason(variant) or limit.reason_against(name, variant)
                if reason is None:
                    return name, reasons
                reasons[name] = reason
    others = {name: f"written for {v.provider}, {v.precision}" for name, v in variants.items() if name not in reasons}
    why = "; ".join(f"{name}: {reason}" for name, reason in (reasons | others).items())
    raise BundleError(
        f"no variant of {bundle.path} can be taken on {kind} ({why}): fix that, or export again with another --variant"
    )


def _named(bundle: Bundle, kind: str, name: str, limit: Limit) -> str:
    variants = bundle.manifest.variants
    if name not in variants or (variants[name].provider, variants[name].precision) not in SPEED[kind]:
        have = ", ".join(f"{have} ({v.provider})" for have, v in variants.items())
        raise BundleError(
            f"{bundle.path} has no variant {name!r} for {kind}; it has {have}: choose one of these, or export again "
            "with the --variant you need"
        )
    if reason := unavailable_reason(variants[name]):
        raise DeviceError(f"variant {name}: {reason}; or take another --variant")
    if limit.tolerance is not None and (reason := exceeds_tolerance(variants[name], limit.tolerance)):
        raise BundleError(f"variant {name}: {reason}; ask for another variant or allow more with --tolerance")
    if limit.max_flips is not None and (reason := limit.reason_against(name, variants[name])):
        raise BundleError(f"variant {name}: {reason}; ask for another variant or allow more with --max-flips")
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


def _best_kind(bundle: Bundle, variant: str | None, limit: Limit) -> tuple[str, Mapping[str, str]]:
    """What a named variant is for; else cuda where a GPU is there and a graph for it would be taken, else cpu.

    And why the graphs for a GPU that is there are not taken.
    """
    variants = bundle.manifest.variants
    if variant is not None:
        return ("cuda" if variant in variants and variants[variant].provider in ON_GPU else "cpu"), {}
    for_gpus = {name: v for name, v in variants.items() if (v.provider, v.precision) in SPEED["cuda"]}
    reasons = (
        {} if limit.max_flips is not None else {name: needs_opt_in(v, limit.tolerance) for name, v in for_gpus.items()}
    )
    wanted = {name: v for name, v in for_gpus.items() if not reasons.get(name)}
    if wanted:
        return ("cuda" if _has_gpu_for(wanted) else "cpu"), {}
    if reasons:
        with suppress(DeviceError):
            every_gpu("auto")
            return "cpu", {name: reason for name, reason in reasons.items() if reason}
    return "cpu", {}


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
            f"{error}, while the kernel sees an NVIDIA GPU ({gpu}): fix the driver, or give this container or job its "
            f"GPU, {OR_CPU}"
        ) from error
    reasons = {name: unavailable_reason(graph) for name, graph in graphs.items()}
    if all(reasons.values()):
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise DeviceError(
            f"device auto: the NVIDIA driver shows {gpus}, and no graph of the bundle can run there ({why}): fix "
            f"that, {OR_CPU}"
        )
    return True


def needs_opt_in(variant: Variant, tolerance: float | None) -> str | None:
    """Why a graph is not taken without being asked for: it is far from the fp32 reference, or is on the whole."""
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
