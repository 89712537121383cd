"""Input files for tests: what they hold, and how they break."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def not_utf8() -> pa.StringArray:
    """Texts number 1 and 3 are no UTF-8, number 2 is null; Arrow does not look."""
    parts = [b"good", b"\xff\xfe", b"", b"caf\xe9", "süß".encode()]
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int32)
    valid = pa.py_buffer(bytes([0b11011]))
    return pa.StringArray.from_buffers(5, pa.py_buffer(offsets.tobytes()), pa.py_buffer(b"".join(parts)), valid, 1)


def damage(path: Path, row_group: int) -> None:
    """Overwrite the text of one row group; the footer and the file's time stay as they are."""
    status = path.stat()
    metadata = pq.read_metadata(path).row_group(row_group)
    column = next(
        metadata.column(i) for i in range(metadata.num_columns) if metadata.column(i).path_in_schema == "text"
    )
    with path.open("r+b") as stream:
        stream.seek(column.dictionary_page_offset or column.data_page_offset)
        stream.write(b"\xff" * column.total_compressed_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
