"""Packed graphs that may be faster than the one that is exported, beside it: the same scores, written otherwise.

Method. Each graph is written from the checkpoint, loaded on the GPU, and computes the same batches, which lie there
beforehand (benchmarks.gpu.kernel); `--rounds` repeats them all in turn, the median counts. A graph is worth its lines
in jql_export.graph.cuda_packed where it is faster at the best budget on the GPUs that matter; what is slower everywhere
goes from here. `score_difference` is that to the exported graph.

    python -m benchmarks.gpu.alternatives --encoder DIR --bundle BUNDLE --corpus CORPUS.parquet --name NAME

The last line of stdout is the path of the JSON it wrote, benchmarks/results/NAME.json.
"""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from onnx import TensorProto

from benchmarks.cases import heads_of
from benchmarks.corpus import sample
from benchmarks.figures import compare_finite
from benchmarks.gpu.jql import reason
from benchmarks.gpu.kernel import Resident, batches_of
from benchmarks.table import GpuRow, print_rows, write_result
from jql_engine.bundle import Bundle, Pooling
from jql_engine.data import TokenBatch
from jql_engine.sessions.cuda import provider as onnxruntime_cuda
from jql_engine.sessions.gpu import Gpu
from jql_engine.tokenizer import Tokenizer
from jql_export.families.base import EncoderSpec, EncoderWeights, LayerWeights
from jql_export.families.read import read_encoder
from jql_export.graph.cuda_packed import CudaDialect, first_rows, rotated, stacked
from jql_export.graph.dialect import MICROSOFT, Dialect
from jql_export.graph.encoder import write_graph
from jql_export.graph.writer import FloatType, GraphWriter
from jql_export.tensors import Linear, Norm

BUDGETS = (16_384, 32_768, 65_536)
BLOCK = 1024  # threads at most
SHIFT = 0.25  # of a norm's weights; on multilingual e5 0.1 and 1 double the error of scores in fp16


class MergedProjections(CudaDialect):
    """Queries, keys and values by one product, and a split of it: fewer products, and what they give is moved."""

    def project(self, g: GraphWriter, name: str, layer: LayerWeights, x: str) -> Sequence[str]:
        """See CudaDialect."""
        value = Linear(layer.value.weight, None)
        merged = g.project_and_add(x, f"{name}.qkv", stacked(layer.query, layer.key, value))
        return g.ops("Split", merged, outputs=("", "", ""), axis=1, num_outputs=3)


class WideRotation(CudaDialect):
    """RoPE of several heads at once, of weights that are `interleaved`.

    The kernel has a block for each token and head, of a thread for each value. Where the two values that are turned
    together lie side by side, it does not matter to it where a head ends.
    """

    def __init__(self, n_together: int, dtype: FloatType) -> None:
        """`n_together`: heads that are turned as one."""
        super().__init__(dtype)
        self._n_together = n_together

    def turns(self, spec: EncoderSpec) -> bool:
        """Whether the heads of an encoder can be turned so."""
        n_threads = self._n_together * spec.head_size
        return spec.positions == "rope" and spec.n_attention_heads % self._n_together == 0 and n_threads <= BLOCK

    def prepare(self, g: GraphWriter, spec: EncoderSpec) -> None:
        """RoPE caches, each as wide as the heads that are turned together."""
        super().prepare(g, spec)
        for name in ("rope.cos", "rope.sin"):
            g.weights[name] = np.tile(g.weights[name], (1, self._n_together))

    def rotate(self, g: GraphWriter, x: str, layer: LayerWeights, spec: EncoderSpec) -> str:
        """See CudaDialect."""
        return rotated(g, x, layer, spec.n_attention_heads // self._n_together, interleaved=True)


class FirstQueries(CudaDialect):
    """Attention of first tokens alone in the last layer: ONNX's, of opset 24, on keys and values in a rectangle."""

    def attend(
        self, g: GraphWriter, name: str, layer: LayerWeights, spec: EncoderSpec, x: str, cls_only: bool
    ) -> tuple[str, str]:
        """See Dialect."""
        if not cls_only:
            return super().attend(g, name, layer, spec, x, cls_only)
        first = first_rows(g, x)
        query = g.op("Unsqueeze", g.project_and_add(first, f"{name}.query", layer.query), g.ints(1))
        key = g.project_and_add(x, f"{name}.key", layer.key)
        key = self.rotate(g, key, layer, spec) if spec.positions == "rope" else key
        value = g.project(x, f"{name}.value", layer.value)
        key, value = (g.op("RestorePadding", rows, "token_offset", domain=MICROSOFT) for rows in (key, value))
        heads = spec.n_attention_heads
        lengths = _lengths(g)
        context = g.op("Attention", query, key, value, "", "", "", lengths, q_num_heads=heads, kv_num_heads=heads)
        return g.op("Squeeze", context, g.ints(1)), first


def _lengths(g: GraphWriter) -> str:
    """Tokens of each document, int64 [B]."""
    ends = g.op("Slice", "cu_seqlens", g.ints(1), g.ints(np.iinfo(np.int64).max), g.ints(0))
    starts = g.op("Slice", "cu_seqlens", g.ints(0), g.ints(-1), g.ints(0))
    return g.op("Cast", g.op("Sub", ends, starts), to=TensorProto.INT64)


def interleaved(encoder: EncoderWeights) -> EncoderWeights:
    """The same encoder with the two values of a head that RoPE turns together side by side.

    Attention multiplies queries by keys: where both are in another order, it gives the same.
    """
    size = encoder.spec.head_size
    pairs = np.arange(size).reshape(2, -1).T.reshape(-1)  # 0, half, 1, half + 1, ...
    rows = np.arange(encoder.spec.hidden_size).reshape(-1, size)[:, pairs].reshape(-1)

    def ordered(linear: Linear) -> Linear:
        return Linear(linear.weight[rows], None if linear.bias is None else linear.bias[rows])

    layers = (replace(layer, query=ordered(layer.query), key=ordered(layer.key)) for layer in encoder.layers)
    return replace(encoder, layers=tuple(layers))


def without_biases(encoder: EncoderWeights) -> EncoderWeights:
    """The same encoder, whose projections from a norm's output have no bias: it is in their weights.

    What a norm gives, out = n w + b, has one property, sum((out - b) / w) = 0. So a bias can be had as a multiple of
    sum(out / w), which is the constant sum(b / w), by a row added to all of the weights. That needs a constant far from
    0: SHIFT times w is added to b, and taken off again from the biases of the residual sums.
    """
    layers: list[LayerWeights] = []
    before = encoder.embedding_norm
    for i, layer in enumerate(encoder.layers):
        inner = layer.attention_norm
        is_last = i == len(encoder.layers) - 1
        layers.append(
            replace(
                layer,
                query=_absorbed(layer.query, before),
                key=_absorbed(layer.key, before),
                value=_absorbed(layer.value, before),
                output=_taken_off(layer.output, before),
                attention_norm=_shifted(inner),
                up=_absorbed(layer.up, inner),
                gate=None if layer.gate is None else _absorbed(layer.gate, inner),
                down=_taken_off(layer.down, inner),
                mlp_norm=layer.mlp_norm if is_last else _shifted(layer.mlp_norm),
            )
        )
        before = layer.mlp_norm
    return replace(encoder, embedding_norm=_shifted(encoder.embedding_norm), layers=tuple(layers))


def _shifted(norm: Norm) -> Norm:
    return Norm(norm.weight, (norm.bias + SHIFT * norm.weight).astype(np.float32))


def _absorbed(linear: Linear, norm: Norm) -> Linear:
    """What gives of `_shifted(norm)` what `linear` gives of `norm`, without a bias."""
    weight, scale = linear.weight.astype(np.float64), norm.weight.astype(np.float64)
    bias = _bias(linear) - weight @ (SHIFT * scale)
    constant = (norm.bias / scale + SHIFT).sum()
    if not scale.all() or abs(constant) < 1:
        raise ValueError("a norm has a weight of 0, or its biases add up to the shift: its projections need a bias")
    return Linear((weight + np.outer(bias, 1 / scale) / constant).astype(np.float32), None)


def _taken_off(linear: Linear, norm: Norm) -> Linear:
    return Linear(linear.weight, (_bias(linear) - SHIFT * norm.weight).astype(np.float32))


def _bias(linear: Linear) -> Any:
    return np.zeros(len(linear.weight)) if linear.bias is None else linear.bias.astype(np.float64)


class Together(WideRotation, FirstQueries):
    """Fewer blocks in every layer, and in the last one fewer queries."""


def _unchanged(encoder: EncoderWeights) -> EncoderWeights:
    return encoder


@dataclass(frozen=True, slots=True)
class Alternative:
    """How a graph is written, and how the weights are changed before."""

    dialect: Callable[[FloatType], Dialect]
    changed: Callable[[EncoderWeights], EncoderWeights] = _unchanged

    def fits(self, spec: EncoderSpec, pooling: Pooling) -> bool:
        """Whether it makes a difference to an encoder, and can be had."""
        dialect = self.dialect(np.float16)
        if isinstance(dialect, WideRotation) and not dialect.turns(spec):
            return False
        if spec.normalizes_first and (self.changed is not _unchanged or isinstance(dialect, FirstQueries)):
            return False  # they know norms after residual sums alone, and one kind of attention
        return pooling == "cls" or not isinstance(dialect, FirstQueries)


ALTERNATIVES = {
    "as exported": Alternative(CudaDialect),
    "queries, keys and values merged": Alternative(MergedProjections),
    "RoPE of 4 heads at once": Alternative(partial(WideRotation, 4), interleaved),
    "RoPE of 12 heads at once": Alternative(partial(WideRotation, 12), interleaved),
    "first queries alone": Alternative(FirstQueries),
    "without biases": Alternative(CudaDialect, without_biases),
    "all, RoPE of 4 heads": Alternative(partial(Together, 4), lambda encoder: without_biases(interleaved(encoder))),
}


def main(
    encoder: Annotated[Path, typer.Option()],
    bundle: Annotated[Path, typer.Option(help="Of the same encoder; any variant.")],
    corpus: Annotated[Path, typer.Option(help="Parquet with a column `text`.")],
    name: Annotated[str, typer.Option(help="Of the result file.")],
    device: Annotated[int, typer.Option(help="Number of the GPU.")] = 0,
    documents: Annotated[int, typer.Option()] = 2_000,
    max_tokens: Annotated[int, typer.Option(help="Longest document of the sample.")] = 8_192,
    rounds: Annotated[int, typer.Option()] = 5,
    budget: Annotated[list[int] | None, typer.Option(help="Tokens of a batch; repeat.")] = None,
) -> None:
    """Measure and write benchmarks/results/NAME.json."""
    from benchmarks.gpu.nvidia import gpu_machine, gpu_versions

    opened = Bundle.open(bundle)
    _, tokens = sample(corpus, documents, Tokenizer.of(opened), max_tokens)
    settings = {"corpus": corpus.name, "documents": documents, "max_tokens": max_tokens, "rounds": rounds}
    gpu, versions, rows = gpu_machine(f"cuda:{device}"), gpu_versions(), []
    for found in measure(read_encoder(encoder), opened, tokens, device, budget or list(BUDGETS), rounds):
        print_rows(found)
        rows += found
        file = write_result(name, rows, settings, gpu, versions)
    print(file)


def measure(
    encoder: EncoderWeights, bundle: Bundle, tokens: TokenBatch, device: int, budgets: list[int], rounds: int
) -> Iterator[list[GpuRow]]:
    """The rows of each budget, one for each alternative; what fails says why."""
    gpu = Gpu(device)
    with tempfile.TemporaryDirectory() as folder:
        graphs = {
            name: _attempt(onnxruntime_cuda.load, file, device, gpu.stream)
            for name, file in write_alternatives(Path(folder), encoder, bundle)
        }
        for budget in budgets:
            batches, cases = batches_of(tokens, budget, bundle.manifest.max_tokens), []
            for name, graph in graphs.items():
                row = GpuRow("kernel", name, f"cuda-fp16 {budget // 1024}k", len(tokens.rows), len(tokens.ids))
                row.budget_tokens = budget
                if not isinstance(graph, Exception):
                    graph = _attempt(Resident, graph, batches, "cuda", device, gpu.synchronize)
                cases.append((row, graph))
            yield time_in_turn(cases, rounds, bundle.heads)


def _attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` gives, or the exception that it raises: the other alternatives must not be lost."""
    try:
        return function(*arguments)
    except Exception as error:
        traceback.print_exc()
        return error


def write_alternatives(
    folder: Path, encoder: EncoderWeights, bundle: Bundle, dtype: FloatType = np.float16
) -> Iterator[tuple[str, Path]]:
    """Write the graphs that this encoder can have; the first is the exported one."""
    pooling = bundle.manifest.pooling
    for number, (name, alternative) in enumerate(ALTERNATIVES.items()):
        if not alternative.fits(encoder.spec, pooling):
            continue
        try:
            weights = alternative.changed(encoder)
        except ValueError as error:
            print(f"{name}: {error}")
            continue
        file = folder / f"{number}.onnx"
        write_graph(file, weights, heads_of(bundle), pooling, alternative.dialect(dtype))
        yield name, file


def time_in_turn(cases: list[tuple[GpuRow, Any]], rounds: int, heads: tuple[str, ...]) -> list[GpuRow]:
    """Each Resident, or why there is none, once to warm up and `rounds` times in turn; against the first."""
    scores: dict[str, np.ndarray] = {}
    for n in range(rounds + 1):
        for row, case in cases:
            if row.note:
                continue
            start = time.perf_counter()
            found = case if isinstance(case, Exception) else _attempt(case.run)
            if isinstance(found, Exception):
                row.note = f"failed: {reason(found)}"
            elif n:
                row.seconds.append(round(time.perf_counter() - start, 6))
            else:
                scores[row.name] = found
    rows = [row for row, _ in cases]
    for row in rows:
        row.finish()
        compare_finite(row, scores.get(row.name), scores.get(rows[0].name), heads)
        if row.seconds and rows[0].seconds:
            row.note = row.note or f"{row.tokens_per_second / rows[0].tokens_per_second:.3f} x {rows[0].name}"
    return rows


if __name__ == "__main__":
    typer.run(main)
