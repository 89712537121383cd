"""Score files of one job, the corpus that they are of, and a metrics file, made by NumPy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

HEADS = ("education", "prose", "facts")
GROUPS = ("de", "en", "<i>fr</i>", None)
SCRIPT = "<script>document.title = 'run'; console.error('run')</script><b>&amp;</b> \x00\x1b \u202e end"
N_ROWS = (700, 1_300)  # of each file


@dataclass(frozen=True)
class Made:
    """Where the files are, and their columns over all files."""

    scores: Path
    corpus: Path
    metrics: Path
    values: np.ndarray  # float32 [H, n]; NaN where null
    null: np.ndarray  # [H, n]
    n_tokens: np.ndarray
    truncated: np.ndarray
    groups: np.ndarray  # numbers of GROUPS

    @property
    def is_scored(self) -> np.ndarray:
        return np.isfinite(self.values).all(axis=0)

    def place(self, row: int) -> tuple[str, int]:
        """File and row in it of a row counted through all files."""
        return ("a/0.parquet", row) if row < N_ROWS[0] else ("a/1.parquet", row - N_ROWS[0])


def make(folder: Path, seed: int = 0) -> Made:
    rng = np.random.default_rng(seed)
    n = sum(N_ROWS)
    common = rng.normal(size=n)
    values = (np.round((common + rng.normal(size=(3, n))) * 20) / 20).astype(np.float32)  # with ties
    null = np.zeros((3, n), bool)
    null[:, 5:9] = True
    values[0, 20], values[1, 21], values[2, 22] = np.nan, np.inf, -np.inf
    values[null] = np.nan
    groups = rng.choice(4, n, p=(0.5, 0.3, 0.17, 0.03))
    n_tokens = rng.integers(3, 600, n)
    truncated = n_tokens > 550
    texts = [f"{SCRIPT} {i}" if i % 3 == 0 else f"text {i} " + "word " * 200 for i in range(n)]
    made = Made(folder / "scores", folder / "corpus", folder / "m.jsonl", values, null, n_tokens, truncated, groups)
    for number, rows in enumerate((slice(0, N_ROWS[0]), slice(N_ROWS[0], n))):
        source = made.corpus / f"a/{number}.parquet"
        source.parent.mkdir(parents=True, exist_ok=True)
        ids = pa.array([f"id-{i}" for i in range(n)][rows])
        pq.write_table(pa.table({"id": ids, "text": texts[rows]}), source, row_group_size=100)
        _write_scores(made, number, rows, ids, source)
    _write_metrics(made.metrics)
    return made


def _write_scores(made: Made, number: int, rows: slice, ids: pa.Array, source: Path) -> None:
    columns = {"id": ids, "lang": pa.array([GROUPS[group] for group in made.groups[rows]])}
    for head, values, null in zip(HEADS, made.values, made.null, strict=True):
        columns[f"score_{head}"] = pa.array(values[rows], mask=null[rows])
    unscored = made.null.any(axis=0)[rows]
    columns["n_tokens"] = pa.array(made.n_tokens[rows].astype(np.int32), mask=unscored)
    columns["truncated"] = pa.array(made.truncated[rows], mask=unscored)
    status = source.stat()
    settings = {
        "bundle": "ab" * 32, "variant": "cpu-fp32", "precision": "fp32", "heads": list(HEADS), "id_column": None,
        "source_bytes": status.st_size, "source_version": str(status.st_mtime_ns), "onnxruntime": "1.24",
    }  # fmt: skip
    table = pa.table(columns).replace_schema_metadata({"jql_engine": json.dumps(settings)})
    (made.scores / "a").mkdir(parents=True, exist_ok=True)
    pq.write_table(table, made.scores / f"a/{number}.parquet")


def _write_metrics(file: Path) -> None:
    lines = []
    for chunk in range(40):
        busy = {"read": 0.1, "tokenize": 0.2, "execute": 1.5 if chunk < 20 else 0.1, "write": 0.3}
        line = {"time": f"2026-01-01T00:{chunk // 2:02}:{30 * (chunk % 2) + 2:02}.000+00:00", "chunk": chunk,
                "rows": 50, "tokens": 1_000 + chunk, "seconds": busy, "failures": ["gone"] * (chunk == 3),
                "memory_bytes": (1 << 20) * (100 + chunk)}  # fmt: skip
        lines.append(json.dumps(line))
    file.write_text("\n".join(lines) + "\n" + lines[0][:40], encoding="utf-8")
