"""From a choice of device and graph to a loaded graph that is known to compute what the reference does."""

from __future__ import annotations

import gc
from collections.abc import Callable

from jql_engine.bundle import Bundle
from jql_engine.errors import ParityError
from jql_engine.sessions.base import DEFAULTS, ON_GPU, Fallback, Session, SessionOptions, check_options
from jql_engine.sessions.certify import certify, read_probes, short_probes, tolerance_of
from jql_engine.sessions.cuda.capacity import OutOfMemoryError
from jql_engine.sessions.select import Choice, runnable


def open_session(
    bundle: Bundle,
    choice: Choice,
    device: str,
    options: SessionOptions = DEFAULTS,
    report: Callable[[str], None] = lambda _: None,
) -> Session:
    """Load the graph of `choice` on `device`, and certify it before its first batch.

    On a GPU, which export did not have, with all probe documents, and likewise the graph for documents that overflow
    there; on a CPU, which may be another than export's, with the short ones.

    Raises ParityError where this machine computes something else than the reference, and what `open_variant` raises.
    """
    info = bundle.manifest.variants[choice.variant]
    session = open_variant(bundle, choice.variant, device, options, report)
    if info.provider not in ON_GPU:
        certify(session, *short_probes(*read_probes(bundle)), tolerance_of(bundle, choice.variant))
    else:
        _certify_fallback(bundle, session.fallback, report)  # first: a probe document may overflow
        figures = certify(session, *read_probes(bundle), tolerance_of(bundle, choice.variant))
        found = figures.get("max_abs_score", figures["max_abs_embedding"])
        if choice.tolerance is not None and found > choice.tolerance:
            raise ParityError(
                f"variant {choice.variant} on {device} differs by {found:.3g} from the fp32 reference, allowed is "
                f"{choice.tolerance:.3g}; allow more with --tolerance, or ask for a --variant in fp32"
            )
        report(f"{choice.variant} on {device} is certified: within {found:.1e} of the fp32 reference")
    return session


def _certify_fallback(bundle: Bundle, fallback: Fallback | None, report: Callable[[str], None]) -> None:
    """Certify the graph for documents that overflow, beside the session that it is for, and give its memory back.

    Most jobs never need it, and to keep it would take four bytes a weight and room for the longest document. The first
    overflow opens it again, in seconds and without the probes: the process, GPU, library, graph file and largest batch
    are the same, and so are the kernels.
    """
    if fallback is None:
        return
    probes, tolerance, session = read_probes(bundle), tolerance_of(bundle, fallback.variant), fallback.open()
    short = bundle.manifest.variants[fallback.variant].provider not in ON_GPU
    try:
        if not short:
            certify(session, *probes, tolerance)
    except OutOfMemoryError:  # it has what the other session leaves
        short = True
    if short:
        gc.collect()  # of the error, in a cycle with the thread's future: its frames would keep the session
        certify(session, *short_probes(*probes), tolerance)
    report(f"{fallback.variant}, for documents that overflow fp16, is certified")


def open_variant(
    bundle: Bundle,
    variant: str,
    device: str = "cpu",
    options: SessionOptions = DEFAULTS,
    report: Callable[[str], None] = lambda _: None,
) -> Session:
    """Load the graph `variant` on `device` (cpu, cuda:N) with the session it was written for.

    `report` is told what takes minutes. Raises DeviceError where device or library are not usable.
    """
    provider, number = bundle.manifest.variants[variant].provider, int(device.partition(":")[2] or 0)
    check_options(bundle, variant, options)
    if provider == "openvino":
        from jql_engine.sessions.openvino import OpenVinoSession

        return OpenVinoSession(bundle, variant, options.threads)
    if provider == "cuda":
        from jql_engine.sessions.cuda.session import open_cuda

        return open_cuda(bundle, variant, number)
    if provider == "tensorrt":
        from jql_engine.sessions.tensorrt.session import TensorRTSession

        fallback = _tensorrt_fallback(bundle, number, options, report)
        return TensorRTSession(bundle, variant, number, options.engines, report, fallback)
    from jql_engine.sessions.cpu import CpuSession

    return CpuSession(bundle, variant, options.threads)


def _tensorrt_fallback(
    bundle: Bundle, number: int, options: SessionOptions, report: Callable[[str], None]
) -> Fallback | None:
    """What recomputes documents that overflow in TensorRT: ONNX Runtime's CUDA graph, else that for the CPU.

    `report` is told which one; None where the bundle has neither.
    """

    def fallback(name: str, kind: str) -> Fallback:
        if kind == "cpu":
            return Fallback(name, lambda: open_variant(bundle, name, options=SessionOptions(threads=options.threads)))
        from jql_engine.sessions.cuda.session import open_small  # imports ONNX Runtime, which need not be here

        return Fallback(name, lambda: open_small(bundle, name, number))

    variants = bundle.manifest.variants
    for kind, provider in (("cuda", "cuda"), ("cpu", "cpu"), ("cpu", "any")):
        for name in runnable(bundle, kind):
            if (variants[name].provider, variants[name].precision) == (provider, "fp32"):
                where = f"cuda:{number}" if kind == "cuda" else "the CPU"
                report(f"documents that overflow fp16 will be recomputed in fp32 by {name} on {where}")
                return fallback(name, kind)
    return None
