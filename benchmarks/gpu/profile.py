"""Where the time of a graph goes, op by op, on which provider each node ran, and which attention kernel was chosen.

Method. A process of its own loads the graph with ONNX Runtime's profiler on, runs some batches twice and keeps the
second time. On a GPU the profiler's clock stops when a kernel is queued, not when it ends, so that process runs with
CUDA_LAUNCH_BLOCKING=1, which waits for each; that costs microseconds a node, and batches are large. Its environment
also has ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO=1: every call of an attention op then prints, for example,

    Operator=PackedMultiHeadAttention Node=attention_0 DataType=fp16 SdpaKernel=FLASH_ATTENTION

(microsoft/onnxruntime, contrib_ops/cuda/bert/attention_kernel_options.cc, AttentionKernelDebugInfo::Print).

    python -m benchmarks.gpu.profile --bundle BUNDLE --variant NAME --device cuda:0 --batches FILE.npz --out FOLDER

is that process; benchmarks.gpu.measure starts it through `profile`. The last line of its stdout is the profiler's file.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime as ort
import typer

from jql_engine.bundle import Bundle
from jql_engine.data import Batch
from jql_engine.sessions.cuda import provider as onnxruntime_cuda
from jql_engine.sessions.cuda.layouts import fields_of, pack, pad, used_bytes
from jql_engine.sessions.gpu import Gpu

ROOT = Path(__file__).parents[2]
KERNEL = re.compile(r"Operator=(?P<operator>\S+)(?: Node=(?P<node>.*?))? DataType=\S+ SdpaKernel=(?P<kernel>[A-Z_]+)")
ENVIRONMENT = {"CUDA_LAUNCH_BLOCKING": "1", "ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO": "1"}


@dataclass(frozen=True, slots=True)
class Profile:
    """What one graph did."""

    # Op type: seconds, share of the time, nodes, gigabytes read and written, teraflop of products; the longest first.
    ops: dict[str, dict[str, float]]
    nodes: dict[str, int]  # nodes on each provider
    attention: dict[str, int]  # attention kernel: nodes that it was chosen for; printed on GPUs alone

    @property
    def seconds(self) -> float:
        """Of all ops."""
        return sum(op["seconds"] for op in self.ops.values())


def profile(bundle: Path, variant: str, device: str, batches: list[Batch]) -> Profile:
    """Profile `batches` in another process; RuntimeError with what it wrote where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "batches.npz")
        write_batches(file, batches)
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu.profile",
            "--bundle",
            str(bundle.resolve()),
            "--variant",
            variant,
        ]
        command += ["--device", device, "--batches", str(file), "--out", folder]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True, errors="replace"
        )
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            said = done.stderr.split("\n")
            raise RuntimeError(
                f"benchmarks.gpu.profile ended with {done.returncode}: {next(filter(None, said[::-1]), '')}"
            )
        events = json.loads(Path(done.stdout.splitlines()[-1]).read_text(encoding="utf-8"))
    return Profile(*aggregate(events, len(batches)), attention_kernels(done.stdout.splitlines()))


def aggregate(events: Iterable[Mapping[str, Any]], n_runs: int) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """Time of each op type over the last `n_runs` runs of a profile, and the number of nodes on each provider."""
    nodes: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            nodes[event["name"]].append(event)
    none = {"seconds": 0.0, "share": 0.0, "nodes": 0, "gigabytes": 0.0, "teraflop": 0.0}
    ops: dict[str, dict[str, float]] = defaultdict(none.copy)
    providers: Counter[str] = Counter()
    for calls in nodes.values():
        last = sorted(calls, key=lambda event: event["ts"])[-n_runs:]
        op = ops[last[0]["args"]["op_name"]]
        op["seconds"] += sum(event["dur"] for event in last) / 1e6
        op["nodes"] += 1
        op["gigabytes"] += sum(moved_bytes(event["args"]) for event in last) / 1e9
        op["teraflop"] += sum(product_flop(event["args"]) for event in last) / 1e12
        providers[last[0]["args"]["provider"]] += 1
    total = sum(op["seconds"] for op in ops.values())
    for op in ops.values():
        op["share"] = round(op["seconds"] / total, 4)
        op |= {key: round(op[key], 6) for key in ("seconds", "gigabytes", "teraflop")}
    return dict(sorted(ops.items(), key=lambda item: -item[1]["seconds"])), dict(providers)


def moved_bytes(args: Mapping[str, Any]) -> int:
    """What a node must read and write at least: inputs, weights and outputs once; of a table the rows it takes."""
    if args["op_name"] in ("Squeeze", "Unsqueeze", "Reshape"):  # the same memory under another shape
        return 0
    output = int(args.get("output_size", 0))
    if args["op_name"] == "Gather":
        return 2 * output
    return int(args.get("activation_size", 0)) + int(args.get("parameter_size", 0)) + output


def product_flop(args: Mapping[str, Any]) -> int:
    """2 m n k of a matrix product, 0 of anything else."""
    if args["op_name"] not in ("MatMul", "Gemm", "FusedMatMul"):
        return 0
    (inner, *_), (output, *_) = (list(args[side][0].values()) for side in ("input_type_shape", "output_type_shape"))
    return 2 * math.prod(output) * int(inner[-1])


def attention_kernels(lines: Iterable[str]) -> dict[str, int]:
    """How many nodes each attention kernel was chosen for; a node that changes its kernel counts for both."""
    chosen = {(m["kernel"], m["operator"], m["node"]) for line in lines if (m := KERNEL.search(line))}
    return dict(Counter(kernel for kernel, _, _ in chosen))


def feeds_of(batch: Batch, pad_id: int | None = None) -> dict[str, Any]:
    """The inputs of a graph for a batch: packed, padded with `pad_id`, or of one exact length where that is None."""
    room = np.empty(used_bytes(fields_of(batch)), np.uint8)
    if batch.row_length is None:
        return pack(batch, room)
    if pad_id is not None:
        return pad(batch, room, pad_id)
    assert batch.n_padding == 0, "a graph for exact lengths takes no padding"
    return {"input_ids": batch.rectangle(0)[0]}


def padding_of(bundle: Bundle, variant: str) -> int | None:
    """The id that a variant's batches are padded with; None where they are not."""
    return bundle.manifest.tokenizer.pad if bundle.manifest.variants[variant].layout == "padded" else None


def write_batches(file: Path, batches: list[Batch]) -> None:
    """Batches for another process."""
    arrays = {}
    for i, batch in enumerate(batches):
        arrays |= {f"ids{i}": batch.ids, f"offsets{i}": batch.offsets, f"length{i}": np.array(batch.row_length or 0)}
    np.savez(file, **arrays)


def read_batches(file: Path) -> list[Batch]:
    """What `write_batches` wrote; rows number the documents of each batch."""
    arrays, batches = np.load(file), []
    for i in range(len(arrays.files) // 3):
        offsets, length = arrays[f"offsets{i}"], int(arrays[f"length{i}"])
        batches.append(Batch(np.arange(len(offsets) - 1), arrays[f"ids{i}"], offsets, length or None))
    return batches


def main(
    bundle: Annotated[Path, typer.Option()],
    variant: Annotated[str, typer.Option()],
    device: Annotated[str, typer.Option(help="cpu or cuda:N")],
    batches: Annotated[Path, typer.Option(help="What write_batches wrote.")],
    out: Annotated[Path, typer.Option(help="Folder of the profiler's file.")],
) -> None:
    """Run the batches twice with the profiler on."""
    opened, prefix = Bundle.open(bundle), out / "profile"
    graph = opened.graph(variant)
    if device == "cpu":
        options = ort.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, str(prefix)
        session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    else:
        gpu = Gpu(int(device.partition(":")[2] or 0))
        session = onnxruntime_cuda.load(graph, gpu.number, gpu.stream, prefix)
    feeds = [feeds_of(batch, padding_of(opened, variant)) for batch in read_batches(batches)]
    for _ in range(2):  # the first time memory is taken and kernels are chosen
        for feed in feeds:
            session.run(None, feed)
    print(session.end_profiling())


if __name__ == "__main__":
    typer.run(main)
