"""Memory does not grow with what a file decodes to: jql-run on files of a few kilobytes that hold gigabytes of text."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

BOUND = 1.1 * (1 << 30)  # besides what a run on three short texts takes, as docs/benchmarks.md has it
# Not ru_maxrss of the process itself: that remembers what its parent held when it started it.
MAIN = """
import re, resource, sys
from jql_engine.cli.run import main
try:
    main()
finally:
    own = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
    used = own + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(f"PEAK {used * 1024}", file=sys.stderr)
"""


def peak(bundle, source: Path, out: Path, *options: str) -> tuple[int, dict[str, object]]:
    """The most bytes that jql-run held, and its summary."""
    command = [sys.executable, "-c", MAIN, str(source), "--bundle", str(bundle.path), "--out", str(out)]
    done = subprocess.run([*command, "--device", "cpu", *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stderr.rpartition("PEAK ")[2]), json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def idle(bundle, tmp_path_factory) -> int:
    folder = tmp_path_factory.mktemp("idle")
    pq.write_table(pa.table({"text": ["Water boils"] * 3}), folder / "a.parquet")
    return peak(bundle, folder / "a.parquet", folder / "out")[0]


def megabyte(seed: int) -> str:
    words = [random.Random(seed + i).randbytes(3).hex() for i in range(500)]
    return " ".join(random.Random(seed).choices(words, k=150_000))[: 1 << 20]


def repeated(n_rows: int, *values: str) -> pa.DictionaryArray:
    index = random.Random(0).choices(range(len(values)), k=n_rows)
    return pa.DictionaryArray.from_arrays(pa.array(index, pa.int32()), pa.array(values))


def write_bomb(path: Path, columns: dict[str, pa.DictionaryArray], decoded_rows: int = 0, **options: object) -> Path:
    """A small file; so many rows of it decoded and in a row group of their own, or all as dictionaries in one."""
    table = pa.table(columns)
    options = {"dictionary_pagesize_limit": 1 << 28, "compression": "zstd", **options}
    if not decoded_rows:
        # Without Arrow's own schema nothing but the encoding says that these are dictionaries.
        pq.write_table(table, path, store_schema=False, **options)
    else:
        schema = pa.schema([(name, pa.string()) for name in columns])
        with pq.ParquetWriter(path, schema, **options) as writer:
            for start in range(0, table.num_rows, decoded_rows):
                writer.write_table(table.slice(start, decoded_rows).cast(schema))
    assert path.stat().st_size < 16 << 20
    return path


def test_20_000_rows_of_one_megabyte_text_take_no_more_than_the_bound(bundle, idle, tmp_path):
    path = write_bomb(tmp_path / "a.parquet", {"text": repeated(20_000, megabyte(0))}, row_group_size=15_000)
    used, summary = peak(bundle, path, tmp_path / "out")
    assert (summary["documents"], summary["truncated"]) == (20_000, 20_000)
    assert used - idle < BOUND
    found = pq.read_table(tmp_path / "out/a.parquet")
    assert found.num_rows == 20_000 and len(found["score_edu"].unique()) == 1


SHAPES = {
    "30 texts": ({"text": range(30)}, {}),
    "ids": ({"text": [0], "id": [1, 2]}, {}),
    "append": ({"text": [0]}, {}),
    "DELTA_BYTE_ARRAY": (
        {"text": [0]},
        {"decoded_rows": 250, "use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_2_000_rows_of_a_megabyte_take_no_more_than_the_bound(bundle, idle, tmp_path, shape):
    values, options = SHAPES[shape]
    columns = {name: repeated(2_000, *map(megabyte, seeds)) for name, seeds in values.items()}
    path = write_bomb(tmp_path / "a.parquet", columns, **options)
    copied = {"ids": "id", "append": "text"}.get(shape)
    used, summary = peak(bundle, path, tmp_path / "out", *(["--output", "append"] if shape == "append" else []))
    assert used - idle < BOUND
    assert (summary["documents"], summary["unfinished"]) == (2_000, [])
    with pq.ParquetFile(tmp_path / "out/a.parquet") as found:
        assert found.metadata.num_rows == 2_000
        assert found.schema_arrow.names[0] == (copied or "score_edu")
        row = 0
        for batch in found.iter_batches(16, columns=[copied]) if copied else ():
            assert batch.column(0).equals(columns[copied].slice(row, batch.num_rows).cast(pa.string()))
            row += batch.num_rows
