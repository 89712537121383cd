"""Score files for tests, as jql-run writes them: columns, metadata, one file or many."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jql_engine.files.settings import METADATA_KEY

SETTINGS = {"bundle": "b" * 64, "variant": "cpu-fp32", "output": "sidecar", "jql-engine": "0.1.0"}


def write(
    file: Path, columns: Mapping[str, Any], settings: Mapping[str, Any] | None = SETTINGS, **options: Any
) -> Path:
    """One file; the heads are those of the columns score_*. `settings` None: as another program writes it."""
    table = pa.table(dict(columns))
    if settings is not None:
        heads = [name.removeprefix("score_") for name in table.column_names if name.startswith("score_")]
        own = {"heads": heads, "source_bytes": file.name.__hash__(), "source_version": file.name}
        table = table.replace_schema_metadata({METADATA_KEY: json.dumps({**own, **settings})})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, compression="zstd", **options)
    return file


def write_many(folder: Path, columns: Mapping[str, Any], n_files: int = 3, **options: Any) -> Path:
    """The rows in files of different lengths, and row groups of different lengths."""
    table = pa.table(dict(columns))
    cuts = np.linspace(0, 1, n_files + 1) ** 1.5 * table.num_rows
    for number, (start, stop) in enumerate(zip(cuts[:-1].astype(int), cuts[1:].astype(int), strict=True)):
        rows = table.slice(start, stop - start)
        write(folder / f"{number:03}.parquet", dict(zip(rows.column_names, rows.columns, strict=True)), **options)
    return folder


def columns_of(
    scores: Sequence[np.ndarray], n_tokens: np.ndarray | None = None, lang: Sequence[Any] | None = None
) -> dict[str, Any]:
    """Columns score_a, score_b, ...; a masked score is null, and so is its length where all of them are."""
    columns: dict[str, Any] = {f"score_{name}": _array(one) for name, one in zip("abcdef", scores, strict=False)}
    if n_tokens is not None:
        columns["n_tokens"] = _array(n_tokens.astype(np.int32))
    if lang is not None:
        columns["lang"] = pa.array(lang, pa.string(), from_pandas=True)
    return columns


def _array(values: np.ndarray) -> pa.Array:
    mask = np.ma.getmaskarray(values) if isinstance(values, np.ma.MaskedArray) else None
    return pa.array(np.asarray(values), mask=mask)
