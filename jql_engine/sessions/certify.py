"""Is a graph, on the hardware it runs on, the fp32 reference? Probe documents, and what PyTorch computed of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from jql_engine.bundle import MANIFEST, PROBES, Bundle
from jql_engine.data import TokenBatch
from jql_engine.errors import BundleError, ParityError
from jql_engine.sessions.base import Session, run_in_order

LONG_TOKENS = 512
SHORT_TOKENS = 64
# Scores beyond this are held to limits that grow with them, as fp32's own rounding does: of some models they are 0 to
# 100, and there PyTorch itself is further from fp64 than the limit for scores of 0 to 5.
LARGE_SCORE = 10
SCALED = f" (of a score s beyond {LARGE_SCORE}: both over |s| / {LARGE_SCORE})"
Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Largest absolute differences to the reference that are allowed; of a score s times max(1, |s| / LARGE_SCORE)."""

    embedding: float  # documents up to LONG_TOKENS tokens
    embedding_long: float  # longer ones: attention sums more terms
    score: float
    batch: float  # a score computed alone against the same in a batch: on a GPU other kernels compute it


def tolerance_of(bundle: Bundle, variant: str) -> Tolerance:
    """What the bundle allows `variant`; raises BundleError where a limit is missing."""
    found, names = bundle.manifest.variants[variant].tolerance, [one.name for one in fields(Tolerance)]
    if missing := [name for name in names if name not in found]:
        raise BundleError(f"{bundle.path}: tolerance of {variant} lacks {', '.join(missing)}; export the bundle again")
    return Tolerance(**{name: found[name] for name in names})


@dataclass(frozen=True, slots=True)
class Expected:
    """Embeddings and scores of the probe documents, as the reference computes them."""

    embeddings: Array  # [N, D]
    scores: Array  # [N, H]


def certify(session: Session, tokens: TokenBatch, expected: Expected, tolerance: Tolerance) -> dict[str, Any]:
    """Run `session` on `tokens` and compare with the reference.

    Returns the figures for the bundle: largest absolute differences, counts, and what a score moves by when its
    document is computed alone; of the embedding only where there are no heads. Raises ParityError naming the worst
    document where a figure is out of tolerance.
    """
    found = run_in_order(session, tokens)
    for name in ("embeddings", "scores"):
        if (of := getattr(found, name).shape) != (wanted := getattr(expected, name).shape):
            raise ParityError(f"variant {session.variant} gives {name} {list(of)}, the reference {list(wanted)}")
    long = tokens.lengths > LONG_TOKENS
    scaled: dict[str, NDArray[np.float64]] = {}
    errors = {
        "embedding": np.where(long, 0, _largest(found.embeddings, expected.embeddings)),
        "embedding_long": np.where(long, _largest(found.embeddings, expected.embeddings), 0),
    }
    if expected.scores.shape[1]:
        alone = run_in_order(session, tokens, replace(session.budget, tokens=1)).scores
        errors |= {"score": _largest(found.scores, expected.scores), "batch": _largest(found.scores, alone)}
        scale = scale_of(expected.scores)
        scaled = {
            "score": _largest(found.scores, expected.scores, scale),
            "batch": _largest(found.scores, alone, scale),
        }
    limits = asdict(tolerance)
    for name, error in (errors | scaled).items():
        note = SCALED if name in scaled and scale.max() > 1 else ""
        _check(session.variant, name, error, limits[name], tokens, note)
    figures = {f"max_abs_{name}": float(f"{error.max(initial=0):.2e}") for name, error in errors.items()}
    return {"documents": len(tokens.rows), "tokens": len(tokens.ids), "longest": int(tokens.lengths.max()), **figures}


def short_probes(tokens: TokenBatch, expected: Expected) -> tuple[TokenBatch, Expected]:
    """The probe documents of up to SHORT_TOKENS tokens."""
    index = np.flatnonzero(tokens.lengths <= SHORT_TOKENS)
    documents = TokenBatch.concat([tokens.slice(int(i)) for i in index])
    return documents, Expected(expected.embeddings[index], expected.scores[index])


def write_probes(file: Path, tokens: TokenBatch, expected: Expected) -> None:
    """Write the probe documents and what the reference computes of them: see docs/bundle-format.md."""
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
    _check_probes(bundle, tensors)
    n_docs = len(tensors["offsets"]) - 1
    tokens = TokenBatch(np.arange(n_docs), tensors["ids"], tensors["offsets"], np.zeros(n_docs, np.bool_))
    return tokens, Expected(tensors["embedding"], tensors["scores"])


def _check_probes(bundle: Bundle, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Raise BundleError where the probe documents are not of this bundle's shape."""
    n_docs = max(1, len(tensors.get("offsets", ())) - 1)
    n_ids, width = len(tensors.get("ids", ())), bundle.manifest.encoder.hidden_size
    expected: dict[str, tuple[type, tuple[int, ...]]] = {
        "ids": (np.int32, (n_ids,)), "offsets": (np.int64, (n_docs + 1,)), "embedding": (np.float32, (n_docs, width)),
        "scores": (np.float32, (n_docs, len(bundle.heads))),
    }  # fmt: skip
    for name, (dtype, shape) in expected.items():
        found = tensors.get(name)
        if found is None or found.dtype != dtype or found.shape != shape:
            what = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise BundleError(
                f"{bundle.path}: {PROBES} has {what} as {name}, expected {np.dtype(dtype)} {list(shape)}; export the "
                "bundle again"
            )
    offsets = tensors["offsets"]
    if offsets[0] != 0 or offsets[-1] != n_ids or (np.diff(offsets) <= 0).any():
        raise BundleError(f"{bundle.path}: {PROBES} has offsets that do not span its ids; export the bundle again")
    _check_manifest(bundle, tensors["ids"], offsets)


def _check_manifest(bundle: Bundle, ids: NDArray[np.int32], offsets: NDArray[np.int64]) -> None:
    """Raise BundleError where the manifest says other of documents than the probes prove: they are of every kind.

    A graph has no more positions than their longest takes, and may compute anything of a longer one without an error.
    """
    m, lengths = bundle.manifest, np.diff(offsets)
    prefix, suffix = m.tokenizer.prefix, m.tokenizer.suffix
    if (longest := int(lengths.max())) < m.max_tokens:
        raise BundleError(
            f"{bundle.path}: max_tokens is {m.max_tokens} in {MANIFEST}, the longest document in {PROBES} has "
            f"{longest} tokens, and the graphs were certified up to there; export the bundle again"
        )
    first, last = offsets[:-1, None] + np.arange(len(prefix)), offsets[1:, None] - np.arange(len(suffix), 0, -1)
    is_short = lengths.min() < len(prefix) + len(suffix)
    if is_short or (ids[first] != prefix).any() or (ids[last] != suffix).any():
        raise BundleError(
            f"{bundle.path}: tokenizer has prefix {prefix} and suffix {suffix} in {MANIFEST}, documents in {PROBES} "
            "have other ids there; export the bundle again"
        )


def scale_of(scores: Array) -> NDArray[np.float64]:
    """What a limit is multiplied by for each of the reference's scores: 1 up to LARGE_SCORE, NaN's too."""
    return np.fmax(1, np.abs(scores.astype(np.float64)) / LARGE_SCORE)


def _largest(found: Array, expected: Array, scale: float | NDArray[np.float64] = 1) -> NDArray[np.float64]:
    """Largest absolute difference of each document, over `scale`, float64 [N]; NaN counts as infinite."""
    difference = (np.abs(found.astype(np.float64) - expected) / scale).max(axis=1)
    return np.where(np.isnan(difference), np.inf, difference)


def _check(variant: str, name: str, errors: NDArray[np.float64], limit: float, tokens: TokenBatch, note: str) -> None:
    worst = int(errors.argmax())
    if errors[worst] > limit:
        n_failed = int((errors > limit).sum())
        raise ParityError(
            f"variant {variant} is out of tolerance: {name} differs by {errors[worst]:.2e} on a probe document of "
            f"{tokens.lengths[worst]} tokens, allowed is {limit:.2g}{note}; {n_failed} of {len(errors)} probe "
            "documents fail. It must not be used; please report this with the encoder's name and the machine"
        )
