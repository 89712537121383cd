"""Is a graph, on the hardware it runs on, the fp32 reference? Probe documents, and what PyTorch computed of them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from jql_engine.bundle import PROBES, Bundle
from jql_engine.data import Budget, TokenBatch
from jql_engine.errors import BundleError, ParityError
from jql_engine.execution import execute
from jql_engine.sessions import DEFAULTS, ON_GPU, Fallback, Session, SessionOptions, open_variant
from jql_engine.sessions.buffered import OutOfMemoryError
from jql_engine.sessions.choice import Choice

LONG_TOKENS = 512
SHORT_TOKENS = 64
Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Largest absolute differences."""

    embedding: float  # documents up to LONG_TOKENS tokens
    embedding_long: float  # longer ones: attention sums more terms
    score: float
    batch: float  # a score computed alone against the same in a batch: on a GPU other kernels compute it


@dataclass(frozen=True, slots=True)
class Expected:
    """What the reference computes."""

    embeddings: Array  # [N, D]
    scores: Array  # [N, H]


def certify(session: Session, tokens: TokenBatch, expected: Expected, tolerance: Tolerance) -> dict[str, Any]:
    """Run `session` on `tokens` and compare with the reference.

    Returns the figures for the bundle: largest absolute differences, counts, and what a score moves by when its
    document is computed alone; of the embedding only where there are no heads. Raises ParityError naming the worst
    document where a figure is out of tolerance.
    """
    embeddings, scores = run_all(session, tokens, session.budget)
    long = tokens.lengths > LONG_TOKENS
    errors = {
        "embedding": np.where(long, 0, _largest(embeddings, expected.embeddings)),
        "embedding_long": np.where(long, _largest(embeddings, expected.embeddings), 0),
    }
    if expected.scores.shape[1]:
        alone = run_all(session, tokens, replace(session.budget, tokens=1))[1]
        errors |= {"score": _largest(scores, expected.scores), "batch": _largest(scores, alone)}
    limits = asdict(tolerance)
    for name, error in errors.items():
        _check(session.variant, name, error, limits[name], tokens)
    figures = {f"max_abs_{name}": float(f"{error.max(initial=0):.2e}") for name, error in errors.items()}
    return {"documents": len(tokens.rows), "tokens": len(tokens.ids), "longest": int(tokens.lengths.max()), **figures}


def open_certified(
    bundle: Bundle,
    choice: Choice,
    device: str,
    options: SessionOptions = DEFAULTS,
    report: Callable[[str], None] = lambda _: None,
) -> Session:
    """Load the graph of `choice` on `device`, and certify it before its first batch.

    On a GPU, which export did not have, with all probe documents, and likewise the graph for documents that overflow
    there; of OpenVINO, which was once seen to compute something else in one session than in the next, with the short
    ones.

    Raises ParityError where this machine computes something else than the reference, and what `open_variant` raises.
    """
    info = bundle.manifest.variants[choice.variant]
    session = open_variant(bundle, choice.variant, device, options, report)
    if info.provider == "openvino":
        certify(session, *_short(*read_probes(bundle)), Tolerance(**info.tolerance))
    if info.provider in ON_GPU:
        _certify_fallback(bundle, session.fallback, report)  # first: a probe document may overflow
        figures = certify(session, *read_probes(bundle), Tolerance(**info.tolerance))
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
    are the same, and so are the kernels. A graph for the CPU was certified at export.
    """
    if fallback is None or (info := bundle.manifest.variants[fallback.variant]).provider not in ON_GPU:
        return
    probes, tolerance, session = read_probes(bundle), Tolerance(**info.tolerance), fallback.open()
    try:
        certify(session, *probes, tolerance)
        short = False
    except OutOfMemoryError:  # it has what the other session leaves
        short = True
    if short:
        gc.collect()  # of the error, in a cycle with the thread's future: its frames would keep the session
        certify(session, *_short(*probes), tolerance)
    report(f"{fallback.variant}, for documents that overflow fp16, is certified")


def _short(tokens: TokenBatch, expected: Expected) -> tuple[TokenBatch, Expected]:
    index = np.flatnonzero(tokens.lengths <= SHORT_TOKENS)
    documents = TokenBatch.concat([tokens.slice(int(i)) for i in index])
    return documents, Expected(expected.embeddings[index], expected.scores[index])


def write_probes(file: Path, tokens: TokenBatch, expected: Expected) -> None:
    """Write the probe documents and what the reference computes of them; see jql_engine.bundle."""
    tensors: dict[str, NDArray[Any]] = {"ids": tokens.ids, "offsets": tokens.offsets}
    # save_file would give the file to its owner alone, whatever the umask says.
    file.write_bytes(save(tensors | {"embedding": expected.embeddings, "scores": expected.scores}))


def read_probes(bundle: Bundle) -> tuple[TokenBatch, Expected]:
    """The probe documents of a bundle; raises BundleError where it has none."""
    try:
        tensors = load_file(bundle.path / PROBES)
    except (OSError, SafetensorError) as error:
        raise BundleError(
            f"{bundle.path} has no {PROBES} to certify this device with ({error}); export the bundle again"
        ) from error
    n_docs = len(tensors["offsets"]) - 1
    tokens = TokenBatch(np.arange(n_docs), tensors["ids"], tensors["offsets"], np.zeros(n_docs, np.bool_))
    return tokens, Expected(tensors["embedding"], tensors["scores"])


def run_all(session: Session, tokens: TokenBatch, budget: Budget) -> tuple[Array, Array]:
    """Embeddings [N, D] and scores [N, H] of `tokens`, whose rows count from 0."""
    batches = [(batch.rows, output) for batch, output in execute(session, tokens, budget)]
    order = np.argsort(np.concatenate([rows for rows, _ in batches]))
    embeddings = np.concatenate([output.embeddings for _, output in batches])[order]
    return embeddings, np.concatenate([output.scores for _, output in batches])[order]


def _largest(found: Array, expected: Array) -> NDArray[np.float64]:
    """Largest absolute difference of each document, float64 [N]; NaN counts as infinite."""
    difference = np.abs(found.astype(np.float64) - expected).max(axis=1)
    return np.where(np.isnan(difference), np.inf, difference)


def _check(variant: str, name: str, errors: NDArray[np.float64], limit: float, tokens: TokenBatch) -> None:
    worst = int(errors.argmax())
    if errors[worst] > limit:
        raise ParityError(
            f"variant {variant} is out of tolerance: {name} differs by {errors[worst]:.2e} on a probe document of "
            f"{tokens.lengths[worst]} tokens, allowed is {limit:.2g}; {int((errors > limit).sum())} of {len(errors)} "
            "probe documents fail. It must not be used; please report this with the encoder's name and the machine"
        )
