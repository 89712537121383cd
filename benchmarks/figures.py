"""What follows from the times of a GPU: MFU, the ratio to the reference, the best budget; how far scores are off."""

from __future__ import annotations

import numpy as np

from benchmarks.cases import compare
from benchmarks.gpu.profile import Profile
from benchmarks.table import GpuRow
from jql_export.families.base import EncoderSpec

LOOP = "JQL's loop"  # how the names of the reference's rows begin that ours are compared with


def flops_per_token(spec: EncoderSpec, lengths: np.ndarray, n_windowed: int = 0) -> float:
    """FLOP of the model per token of documents of `lengths` tokens.

    Matrix products on every token, and attention: 2 L (4 D^2 + n D F) + 4 L D E[S^2] / E[S], for L layers, n matrices
    of D x F in an MLP and documents of S tokens. Nothing is deducted for shortcuts: the last layer computes less.
    """
    d, f, layers = spec.hidden_size, spec.intermediate_size, spec.n_layers
    matrices = 3 if spec.mlp == "geglu" else 2
    near = np.minimum(lengths, 3 * (spec.window or 0))
    attended, attended_near = (float(lengths @ keys.astype(np.float64) / lengths.sum()) for keys in (lengths, near))
    attention = 4 * d * ((layers - n_windowed) * attended + n_windowed * attended_near)
    return 2 * layers * (4 * d * d + matrices * d * f) + attention


def rate(rows: list[GpuRow], flops: float, matrix_gflops: float) -> None:
    """MFU of each row and its ratio to the faster of JQL's loops; says which budget is the best of a variant."""
    reference = max((row.tokens_per_second for row in rows if row.name.startswith(LOOP)), default=0.0)
    for row in rows:
        row.mfu = round(row.tokens_per_second * flops / matrix_gflops / 1e9, 4)
        row.to_reference = round(row.tokens_per_second / reference, 3) if reference else 0.0
    best = best_rows(rows)
    for row in rows:
        row.best_budget = any(row is other for other in best)


def best_rows(rows: list[GpuRow]) -> list[GpuRow]:
    """The fastest engine row of each variant that ran."""
    best: dict[str, GpuRow] = {}
    for row in rows:
        name = row.variant.partition(" ")[0]
        if row.what == "engine" and row.tokens_per_second > (best[name].tokens_per_second if name in best else 0):
            best[name] = row
    return list(best.values())


def compare_finite(row: GpuRow, found: np.ndarray | None, expected: np.ndarray | None, heads: tuple[str, ...]) -> None:
    """As `compare`, over the documents that did not overflow: the graph alone leaves those to a session."""
    if found is None or expected is None:
        return
    finite = np.isfinite(found).all(axis=1)
    row.overflowed = max(row.overflowed, int((~finite).sum()))
    finite &= np.isfinite(expected).all(axis=1)
    if found is not expected and finite.any():
        compare(row, found[finite], expected[finite], heads)


def record(row: GpuRow, measured: Profile, tokens_per_second: float) -> None:
    """A profile into its row; `tokens_per_second`: of the graph alone, whose time the ops should add up to."""
    row.seconds = [round(measured.seconds, 6)]
    row.ops, row.nodes, row.attention = measured.ops, measured.nodes, measured.attention
    row.finish()
    if tokens_per_second:
        share = measured.seconds * tokens_per_second / row.tokens
        row.note = f"the ops add up to {share:.0%} of the graph's own time"
