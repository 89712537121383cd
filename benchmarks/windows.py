"""Does a token of a document of 8,192 cost what one of 1,024 does, where layers attend to windows?

Method. Graphs of random weights in the shapes of ModernBERT's Base and Large, with a small vocabulary: six of Base's
layers that all have windows, and whole models with a global layer in three. Documents of random ids, one at a time, on
all cores: eight of 1,024 tokens, or one of 8,192, so that a row has 8,192 tokens either way. Each row runs once to warm
up and then in turn with all others, `--rounds` times; rates are those of the medians. The settings have for each graph
and runtime the `time_ratio` of a token at 8,192 to one at 1,024, the median over the rounds, and the `flop_ratio` of
the model. Peak memory is that of a process of its own, which loads the graph and computes one document.

    python -m benchmarks.windows --shape base --shape large --name windows

The last line of stdout is the path of the JSON it wrote, benchmarks/results/NAME.json.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.table import Row, peak_memory_mib, write_result

LENGTHS = (1024, 8192)
SHAPES = {
    "base": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 1152, "num_hidden_layers": 22},
    "large": {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 2624, "num_hidden_layers": 28},
}
WINDOWS = {"num_hidden_layers": 6, "layer_types": ["sliding_attention"] * 6}
SPECIALS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
Run = Callable[[NDArray[np.int64]], object]  # ids [1, L]


@dataclass(frozen=True, slots=True)
class Graph:
    """One graph in one runtime."""

    name: str
    variant: str
    file: Path
    flop_ratio: float  # of a token at 8,192 to one at 1,024

    def row(self, length: int) -> Row:
        """Its row of the table for documents of `length` tokens."""
        return Row("engine", f"{self.name}, {length:,} tokens", self.variant, LENGTHS[-1] // length, LENGTHS[-1])


def main(
    name: Annotated[str, typer.Option(help="Of the result file.")],
    shape: Annotated[list[str] | None, typer.Option(help="base or large; repeat.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help="cpu-fp32, openvino-fp32, openvino-bf16; repeat.")] = None,
    rounds: Annotated[int, typer.Option()] = 5,
) -> None:
    """Measure and write benchmarks/results/NAME.json."""
    with tempfile.TemporaryDirectory() as folder:
        graphs = list(write_graphs(Path(folder), shape or ["base"], variant or ["cpu-fp32", "openvino-bf16"]))
        rows = {(graph.name, graph.variant, n): graph.row(n) for graph in graphs for n in LENGTHS}
        for graph in graphs:
            for n in LENGTHS:
                rows[graph.name, graph.variant, n].peak_memory_mib = peak_memory(graph, n)
        time_in_turn({graph: [rows[graph.name, graph.variant, n] for n in LENGTHS] for graph in graphs}, rounds)
    ratios = {}
    for graph in graphs:
        short, long = (rows[graph.name, graph.variant, n] for n in LENGTHS)
        of_rounds = [slow / fast for slow, fast in zip(long.seconds, short.seconds, strict=True)]
        found = {"time_ratio": round(statistics.median(of_rounds), 3), "flop_ratio": round(graph.flop_ratio, 3)}
        ratios[f"{graph.name}, {graph.variant}"] = found
        for row in (short, long):
            row.finish()
            print(f"{row.name:40}{row.variant:15}{row.rate()}{row.peak_memory_mib:8,} MiB")
        print(f"{graph.name:40}{graph.variant:15}{found['time_ratio']:12} x a token, FLOP {found['flop_ratio']} x")
    print(write_result(name, list(rows.values()), {"rounds": rounds, "lengths": list(LENGTHS), "ratios": ratios}))


def write_graphs(folder: Path, shapes: list[str], variants: list[str]) -> Iterator[Graph]:
    """Each model's graph for each variant."""
    from benchmarks.figures import flops_per_token
    from jql_export.families.read import read_encoder
    from jql_export.graph.encoder import write_graph
    from jql_export.variants import VARIANTS

    models = {f"{shapes[0]}, six layers with windows": SHAPES[shapes[0]] | WINDOWS, **{s: SHAPES[s] for s in shapes}}
    for number, (name, settings) in enumerate(models.items()):
        weights = read_encoder(_checkpoint(folder / f"{number}", settings))
        n_windowed = sum(layer.windowed for layer in weights.layers)
        short, long = (flops_per_token(weights.spec, np.array([n]), n_windowed) for n in LENGTHS)
        for variant in variants:
            file = folder / f"{number}-{VARIANTS[variant].graph}"
            if not file.exists():
                write_graph(file, weights, [], "mean", VARIANTS[variant].dialect())
            yield Graph(name, variant, file, long / short)


def _checkpoint(folder: Path, settings: dict[str, object]) -> Path:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.ModernBertConfig(**{"vocab_size": 1000, **SPECIALS, **settings})
    transformers.ModernBertModel(config).save_pretrained(folder)
    return folder


def peak_memory(graph: Graph, length: int) -> int:
    """MiB that a process takes at most which computes one document of `length` tokens."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (graph, length))


def _peak(graph: Graph, length: int) -> int:
    opened(graph)(_document(length))
    return peak_memory_mib()


def time_in_turn(graphs: dict[Graph, list[Row]], rounds: int) -> None:
    """Seconds of every round into the rows."""
    runs = {graph: opened(graph) for graph in graphs}
    for number in range(rounds + 1):
        for graph, rows in graphs.items():
            for row, length in zip(rows, LENGTHS, strict=True):
                ids, start = _document(length), time.perf_counter()
                for _ in range(row.documents if number else 1):
                    runs[graph](ids)
                if number:
                    row.seconds.append(round(time.perf_counter() - start, 4))
                    print(f"{row.name} {row.variant}: {row.tokens / row.seconds[-1]:,.0f} tokens/s", flush=True)


def _document(length: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(3, 1000, (1, length))


def opened(graph: Graph) -> Run:
    """The graph in its runtime, with the settings of jql_engine.sessions."""
    n_threads = len(os.sched_getaffinity(0))
    if graph.variant == "cpu-fp32":
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads, options.enable_mem_pattern = n_threads, False
        options.log_severity_level = 3  # tables of the other kind of layers are not used
        session = ort.InferenceSession(str(graph.file), options, providers=["CPUExecutionProvider"])
        return lambda ids: session.run(["embedding"], {"input_ids": ids})
    import openvino

    hint = {"openvino-bf16": "bf16", "openvino-fp32": "f32"}[graph.variant]
    settings = {"INFERENCE_PRECISION_HINT": hint, "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": n_threads}
    request = openvino.Core().compile_model(str(graph.file), "CPU", settings).create_infer_request()
    return lambda ids: request.infer({"input_ids": ids})


if __name__ == "__main__":
    typer.run(main)
