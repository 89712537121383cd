"""A bundle and a user's own documents -> certificate.json and .html: what each graph decides otherwise than PyTorch.

Probe documents show that a graph computes what it should. They do not show what its rounding costs on the documents
that it will be used for: how many of them are kept at a cut by the one and not by the other. So the reference scores a
uniform sample of the user's documents, in fp32 and in the bf16 that the original pipeline runs in, and each graph that
runs on this machine scores the same ids.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from jql_engine.bundle import Bundle, sha256_of
from jql_engine.certificate import CERTIFICATE, CUT, FORMAT, REFERENCE_BF16, FlipShare
from jql_engine.data import DocumentBatch, ScoreBatch, TokenBatch
from jql_engine.decision.comparison import Comparison, Paired, compare, flips_at
from jql_engine.decision.report.comparison import certificate_page
from jql_engine.decision.report.plots import check_matplotlib
from jql_engine.decision.written import write_json, write_text
from jql_engine.engine import Engine
from jql_engine.errors import BundleError, InputError, ParityError
from jql_engine.files.formats import open_file
from jql_engine.files.inputs import Columns, InputFile, find_files
from jql_engine.files.reading import Cursor, documents
from jql_engine.printing import redact
from jql_engine.sessions.certify import SCALED, scale_of, tolerance_of
from jql_engine.sessions.select import runnable
from jql_engine.tokenizer import Tokenizer
from jql_engine.windows import Windows
from jql_export.hub import Checkpoint
from jql_export.readouts.base import Readout
from jql_export.reference import Reference

PAGE = "certificate.html"
DOCUMENTS = 2_000
SEED = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """Documents drawn at random from all of a corpus."""

    tokens: TokenBatch
    n_read: int  # documents of the corpus


def certify_bundle(
    path: Path,
    checkpoint: Checkpoint,
    readouts: Sequence[Readout],
    corpus: str,
    *,
    text_column: str = "text",
    n_docs: int = DOCUMENTS,
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Score `n_docs` documents of `corpus` by PyTorch and every graph that runs here; write and return the certificate.

    Raises BundleError where `checkpoint` or `readouts` are not those that the bundle `path` was made of, InputError for
    the corpus, and ParityError, with no certificate written, for a graph that is out of its tolerance.
    """
    check_matplotlib()
    bundle = Bundle.open(path)
    _check_sources(bundle, checkpoint, readouts)
    sample = draw(bundle, corpus, text_column, n_docs)
    lengths = sample.tokens.lengths
    report(f"{len(lengths):,} of {sample.n_read:,} documents, {lengths.sum():,} tokens; PyTorch in fp32")
    expected = _by_reference(bundle, checkpoint, readouts, sample.tokens, torch.float32)
    report(f"{REFERENCE_BF16}, as the original pipeline computes")
    in_bf16 = _by_reference(bundle, checkpoint, readouts, sample.tokens, torch.bfloat16)
    found = {REFERENCE_BF16: _compared(bundle, sample.tokens, expected, in_bf16)}
    for kind in ("cuda", "cpu"):
        for name in runnable(bundle, kind):
            report(f"variant {name}")
            scores = Engine(bundle, kind, name).score_tokens(sample.tokens)
            found[name] = _compared(bundle, sample.tokens, expected, scores.values)
            _check_tolerance(bundle, name, found[name], expected, scores.values)
    certificate = _describe(bundle, corpus, sample, found)
    write_text(bundle.path / PAGE, certificate_page(certificate))
    write_json(bundle.path / CERTIFICATE, certificate)
    return certificate


def summary(certificate: Mapping[str, Any]) -> str:
    """One line: of each graph the largest share of documents that change sides."""
    parts = []
    for name, found in {REFERENCE_BF16: certificate["reference_bf16"], **certificate["variants"]}.items():
        worst = max(found["flips"], key=lambda one: one["upper"])
        parts.append(f"{name} {worst['share']:.2%} (up to {worst['upper']:.2%}) by {worst['what']}")
    return f"documents that change sides at {certificate['cut']}: " + "; ".join(parts)


def _check_sources(bundle: Bundle, checkpoint: Checkpoint, readouts: Sequence[Readout]) -> None:
    m = bundle.manifest
    for name, digest in m.encoder.files.items():
        file = checkpoint.directory / name
        if not file.is_file() or sha256_of(file) != digest:
            raise BundleError(
                f"{file} is not the file that {bundle.path} was made of: give the --encoder (or --classifier) and the "
                "revision that it was exported with"
            )
    given, made_of = {r.name: r.sha256 for r in readouts}, {r.name: r.sha256 for r in m.readouts}
    if list(given.items()) != list(made_of.items()):
        wrong = next((name for name in {**given, **made_of} if given.get(name) != made_of.get(name)), "their order")
        raise BundleError(
            f"head {wrong}: {bundle.path} was made of other heads, {', '.join(made_of)}; give the same files in the "
            "same order"
        )
    for readout, recorded in zip(readouts, m.readouts, strict=True):
        if (given_layers := readout.info(m.pooling).layers) != recorded.layers:
            raise BundleError(
                f"head {readout.name}: {bundle.path} has the activation {recorded.layers[-1].activation}, given was "
                f"{given_layers[-1].activation}: repeat the --activation that it was exported with"
            )
    if not readouts:
        raise BundleError(f"{bundle.path} has no heads: there is nothing to decide by")


def draw(bundle: Bundle, corpus: str, text_column: str, n_docs: int) -> Sample:
    """A uniform sample of the documents of `corpus` that have a text, tokenized; the same one each time."""
    columns = Columns(text_column, template=bundle.template)
    listed = find_files([corpus])
    if listed.refused:
        raise InputError(listed.refused[0].reason)
    files = [open_file(source, columns) for source in listed.files]
    n_rows = sum(file.n_rows for file in files)
    texts: list[str] = []
    n_drawn = n_docs + n_docs // 10 + 10  # some have no text
    while len(texts) < n_docs:
        texts = _draw_texts(files, n_rows, n_drawn)[:n_docs]
        if n_drawn >= n_rows:
            break
        n_drawn *= 4
    if not texts:
        raise InputError(f"{corpus} holds no text in column {text_column!r}")
    return Sample(Tokenizer.of(bundle).encode(DocumentBatch.of(pa.array(texts, pa.large_string()))), n_rows)


def _draw_texts(files: Sequence[InputFile], n_rows: int, n_drawn: int) -> list[str]:
    """The texts among `n_drawn` of `n_rows` documents, in the order that they were drawn in: each start is uniform."""
    chosen = np.random.default_rng(SEED).choice(n_rows, min(n_drawn, n_rows), replace=False)
    order = np.argsort(chosen)
    found = dict(zip(order.tolist(), _texts(files, chosen[order]), strict=True))
    return [text for drawn in range(len(chosen)) if (text := found[drawn]) is not None]


def _texts(files: Sequence[InputFile], rows: NDArray[np.int64]) -> Iterator[str | None]:
    """The texts of `rows`, ascending, counted through all files."""
    first = 0
    for file in files:
        cursor = Cursor(file, 0, file.columns.needed)
        for row in rows[(rows >= first) & (rows < first + file.n_rows)] - first:
            cursor.skip(int(row) - cursor.row)
            for batch in cursor.take(1):
                yield from (text for part, _ in documents(pa.table(batch), file.columns) for text in part.to_pylist())
        first += file.n_rows


def _by_reference(
    bundle: Bundle, checkpoint: Checkpoint, readouts: Sequence[Readout], tokens: TokenBatch, dtype: torch.dtype
) -> NDArray[np.float32]:
    """Scores [n, H] of documents, of the windows that the bundle asks for."""
    windows = Windows.of(bundle)
    cut = windows.cut(tokens)
    found = Reference(checkpoint.directory, readouts, bundle.manifest.pooling, dtype).run(cut.tokens)
    scores = replace(ScoreBatch.empty(cut.tokens, len(bundle.heads)), values=found.scores)
    return windows.merge(tokens, cut, scores).values


def _compared(
    bundle: Bundle, tokens: TokenBatch, expected: NDArray[np.float32], found: NDArray[np.float32]
) -> Comparison:
    nobody = np.zeros(len(tokens.rows), np.int64)
    return compare(Paired(bundle.heads, expected.T, found.T, tokens.lengths, nobody, (None,)))


def _check_tolerance(
    bundle: Bundle, variant: str, found: Comparison, expected: NDArray[np.float32], scores: NDArray[np.float32]
) -> None:
    allowed = tolerance_of(bundle, variant).score
    if found.compared < found.documents:
        raise ParityError(
            f"variant {variant}: {found.documents - found.compared:,} of {found.documents:,} documents have no finite "
            "score by it or by PyTorch; there is no certificate, export the bundle again"
        )
    for head, ours, reference in zip(bundle.heads, scores.T, expected.T, strict=True):
        scale = scale_of(reference)
        greatest = (np.abs(ours.astype(np.float64) - reference) / scale).max()
        if not greatest <= allowed:
            note = SCALED if scale.max() > 1 else ""
            raise ParityError(
                f"variant {variant} is out of tolerance: score_{head} differs by {greatest:.2e} on the documents "
                f"given, allowed are {allowed:.0e}{note}; there is no certificate, export the bundle again"
            )


def _describe(bundle: Bundle, corpus: str, sample: Sample, found: Mapping[str, Comparison]) -> dict[str, Any]:
    described = {
        name: {"flips": [asdict(one) for one in _flip_shares(one)], "comparison": one.to_json()}
        for name, one in found.items()
    }
    return {
        "format": FORMAT,
        "bundle": bundle.hash,
        "documents": len(sample.tokens.rows),
        "corpus": {"given": redact(corpus), "documents": sample.n_read, "seed": SEED},
        "windows": asdict(bundle.manifest.windows),
        "cut": CUT,
        "machine": {"processor": _processor(), "cores": len(os.sched_getaffinity(0))},
        "made_with": {name: version(name) for name in ("jql-engine", "torch", "transformers")},
        "reference_bf16": described.pop(REFERENCE_BF16),
        "variants": described,
    }


def _flip_shares(found: Comparison) -> list[FlipShare]:
    return [FlipShare(one.what, one.share, one.interval[1]) for one in flips_at(found.whole, CUT)]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
