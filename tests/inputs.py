"""Input files for tests: what they hold, and how they break."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jql_engine.bundle import MANIFEST, Bundle, describe_files

OTHER_TOKIE = "tokie 0.1.3"


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


def made_with_other_tokie(bundle: Bundle, folder: Path, *, same_ids: bool) -> Bundle:
    """A copy of `bundle` that was made with another version of tokie than the one installed, which is exact or not."""
    shutil.copytree(bundle.path, folder)
    file = folder / "tokenizer.json"
    tokenizer, manifest = json.loads(file.read_text()), json.loads((folder / MANIFEST).read_text())
    if same_ids:  # tokie 0.1.4 leaves out NFKC, and white space that is split off
        tokenizer["normalizer"], tokenizer["pre_tokenizer"] = None, tokenizer["pre_tokenizer"]["pretokenizers"][1]
        vocabulary = tokenizer["model"]["vocab"]
        tokenizer["model"]["vocab"] = [(piece, float(np.float32(score))) for piece, score in vocabulary]
    file.write_text(json.dumps(tokenizer))
    manifest["tokenizer"]["fast"], manifest["files"] = OTHER_TOKIE, describe_files(folder)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return Bundle.open(folder)
