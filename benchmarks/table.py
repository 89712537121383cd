"""The result of a benchmark: rows, printed as a table and written as JSON with the machine and the versions."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "jql-engine", "onnxruntime", "onnxruntime-gpu", "openvino", "torch", "transformers", "tokie", "tokenizers",
    "pyarrow",
)  # fmt: skip
ISA = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
MEAN_TOKENS = 690  # documents per minute are given at the published mean, so that corpora can be compared


@dataclass(slots=True)
class Row:
    """One line of the table."""

    what: str  # reference | engine | peer | end_to_end | feed | evaluator | ceiling
    name: str
    variant: str
    documents: int
    tokens: int
    seconds: list[float] = field(default_factory=list)
    tokens_per_second: float = 0.0
    documents_per_minute: float = 0.0  # at MEAN_TOKENS
    gflops: float = 0.0  # of a ceiling
    score_difference: float | None = None  # largest, to the fp32 reference of the same run
    spearman: dict[str, float] = field(default_factory=dict)  # of each head, to the same
    peak_memory_mib: int = 0  # resident, where a row has a process of its own
    stages: dict[str, dict[str, float]] = field(default_factory=dict)  # shares of the time, of a pipeline

    def finish(self) -> None:
        """Fill in the rates from the median of the rounds."""
        self.tokens_per_second = round(self.tokens / statistics.median(self.seconds), 1)
        self.documents_per_minute = round(self.tokens_per_second * 60 / MEAN_TOKENS, 1)

    def rate(self) -> str:
        """For the table."""
        return f"{self.gflops:12,.1f} GFLOP/s " if self.gflops else f"{self.tokens_per_second:12,.1f} tokens/s"

    def remarks(self) -> str:
        """For the table, after the rate."""
        near = "" if self.score_difference is None else f"   scores within {self.score_difference:.1e}"
        return near + (f", Spearman {min(self.spearman.values()):.5f}" if self.spearman else "")


@dataclass(slots=True)
class GpuRow(Row):
    """One line of a GPU's table; `what` may also be kernel and profile, see benchmarks.gpu.measure."""

    budget_tokens: int = 0  # of a batch of ours
    best_budget: bool = False  # of those that a variant was timed with
    mfu: float = 0.0  # of the model's FLOP, over the large fp16 product of the same run
    to_reference: float = 0.0  # tokens per second over those of the faster of JQL's loops in the same run
    gigabytes_per_second: float = 0.0  # of a copy
    overflowed: int = 0  # documents that overflowed fp16
    note: str = ""  # what else must be known: it failed, memory allowed less
    ops: dict[str, dict[str, float]] = field(default_factory=dict)  # by type: see benchmarks.gpu.profile; of a profile
    nodes: dict[str, int] = field(default_factory=dict)  # on each provider, of a profile
    attention: dict[str, int] = field(default_factory=dict)  # nodes by the kernel chosen for them, of a profile

    def finish(self) -> None:
        """As of Row; a row that failed has no rates."""
        if self.seconds:
            Row.finish(self)

    def rate(self) -> str:
        """For the table."""
        if self.gigabytes_per_second:
            return f"{self.gigabytes_per_second:12,.1f} GB/s    "
        return Row.rate(self) if self.seconds else f"{'-':>12}         "

    def remarks(self) -> str:
        """For the table, after the rate."""
        found = []
        if self.mfu:
            found.append(f"MFU {self.mfu:.3f}, {self.documents_per_minute:,.0f} documents/min")
        if self.to_reference:
            found.append(f"{self.to_reference:.2f} x the reference")
        if self.score_difference is not None:
            found.append(Row.remarks(self).strip())
        if self.overflowed:
            found.append(f"{self.overflowed} documents overflowed")
        if self.attention:
            found.append("attention " + _counts(self.attention))
        if self.nodes:
            found.append("nodes " + _counts(self.nodes))
        if self.best_budget:
            found.append("best budget")
        return "   " + "; ".join(filter(None, [*found, self.note]))


def _counts(numbers: dict[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in numbers.items())


def print_rows(rows: Sequence[Row]) -> None:
    """One line each."""
    for row in rows:
        print(f"{row.what:11}{row.name:50}{row.variant:15}{row.rate()}{row.remarks()}")


def print_ops(row: GpuRow) -> None:
    """The time of a profile, one line for each type of op."""
    for op, figures in row.ops.items():
        seconds = figures["seconds"] or float("nan")
        print(
            f"{row.variant:15}{op:30}{int(figures['nodes']):5} nodes{figures['share']:8.1%}"
            f"{seconds / row.tokens * 1e9:10.1f} ns/token{figures['gigabytes'] / seconds:10,.0f} GB/s"
            f"{figures['teraflop'] / seconds:8,.0f} TFLOP/s"
        )


def write_result(
    name: str,
    rows: Sequence[Row],
    settings: dict[str, object],
    gpu: dict[str, object] | None = None,
    versions: dict[str, str] | None = None,
) -> Path:
    """Write benchmarks/results/NAME.json; `gpu`, `versions`: what a GPU's run adds."""
    result = {
        "schema": 1,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": _machine() | ({"gpu": gpu} if gpu else {}),
        "versions": {package: v for package in PACKAGES if (v := _version(package))} | (versions or {}),
        "settings": settings,
        "rows": [asdict(row) for row in rows],
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    aside = file.with_suffix(".writing")
    aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    aside.replace(file)
    return file


def peak_memory_mib() -> int:
    """The most that this process has held; not ru_maxrss, in which a process inherits what its parent held."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


def _machine() -> dict[str, object]:
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    fields = dict(line.split(":", 1) for line in info.split("\n\n")[0].splitlines() if ":" in line)
    known = {key.strip(): value.strip() for key, value in fields.items()}
    flags = known.get("flags", "").split()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": f"{known.get('model name', platform.processor())}, family {known.get('cpu family', '?')}",
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30, 1),
        "isa": [flag for flag in ISA if flag in flags],
        "python": platform.python_version(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
