"""The result of a benchmark: rows, printed as a table and written as JSON with the machine and the versions."""

from __future__ import annotations

import json
import os
import platform
import statistics
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "jql-engine", "onnxruntime", "onnxruntime-gpu", "openvino", "nncf", "torch", "transformers", "tokie", "tokenizers",
    "pyarrow",
)  # fmt: skip
ISA = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
MEAN_TOKENS = 690  # documents per minute are given at the published mean, so that corpora can be compared


@dataclass(slots=True)
class Row:
    """One line of the table."""

    what: str  # reference | engine | end_to_end | feed | ceiling
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


def print_rows(rows: list[Row]) -> None:
    """One line each."""
    for row in rows:
        rate = f"{row.gflops:12,.1f} GFLOP/s " if row.gflops else f"{row.tokens_per_second:12,.1f} tokens/s"
        near = "" if row.score_difference is None else f"   scores within {row.score_difference:.1e}"
        ranks = f", Spearman {min(row.spearman.values()):.5f}" if row.spearman else ""
        print(f"{row.what:11}{row.name:50}{row.variant:15}{rate}{near}{ranks}")


def write_result(name: str, rows: list[Row], settings: dict[str, object]) -> None:
    """Write benchmarks/results/NAME.json and print its path."""
    result = {
        "schema": 1,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": _machine(),
        "versions": {package: v for package in PACKAGES if (v := _version(package))},
        "settings": settings,
        "rows": [asdict(row) for row in rows],
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(file)


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
