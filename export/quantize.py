"""An OpenVINO graph -> the same with int8 matrix products, calibrated on documents.

Weights are rounded per output channel ahead of time, activations to ranges found on the calibration documents (NNCF's
post-training quantization with SmoothQuant). The heads stay in fp32: with them in int8 the largest score error of
multilingual e5 was 0.87 instead of 0.31.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jql_engine.data import TokenBatch
from jql_engine.errors import CheckpointError, InputError

N_DOCUMENTS = 128
LONGEST = 512  # tokens of a calibration document that are used; more of them teach more than longer ones


def quantize_int8(graph: Path, file: Path, tokens: TokenBatch) -> None:
    """Write `file` (OpenVINO's .xml, weights beside it in .bin) from `graph` (.onnx), calibrated on `tokens`.

    Raises CheckpointError where openvino or nncf is not installed.
    """
    check_installed()
    import openvino

    model = openvino.Core().read_model(graph)
    documents = [ids[None, :LONGEST].astype(np.int64) for ids in np.split(tokens.ids, tokens.offsets[1:-1])]
    nncf = _import_nncf()
    with redirect_stdout(sys.stderr):  # its progress bars
        quantized = nncf.quantize(
            model,
            nncf.Dataset(documents, lambda ids: {"input_ids": ids}),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(documents),
            ignored_scope=nncf.IgnoredScope(names=_head_products(model)),
        )
    openvino.save_model(quantized, file, compress_to_fp16=False)


def check_installed() -> None:
    """Raise CheckpointError that says what to install."""
    for package in ("openvino", "nncf"):
        if find_spec(package) is None:
            raise CheckpointError(
                f"variant openvino-int8 is made with openvino and nncf, and {package} is not installed; "
                "pip install 'jql-engine[openvino,int8]'"
            )


def read_texts(file: Path) -> list[str]:
    """The first N_DOCUMENTS texts of the column `text` of a parquet file; raises InputError."""
    try:
        with pq.ParquetFile(file) as source:
            batch = next(source.iter_batches(N_DOCUMENTS, columns=["text"]), None)
        texts = [] if batch is None else [text for text in batch.column("text").to_pylist() if text]
    except (OSError, KeyError, pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"calibration documents cannot be read from {file}: {error}") from error
    if not texts:
        raise InputError(f"{file} holds no text for calibration; expected is parquet with a column `text`")
    return texts


def _head_products(model: Any) -> Sequence[str]:
    """Names of the matrix products that read a weight of the heads."""
    found = []
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul":
            sources = [value.get_source_output().get_node().get_friendly_name() for value in node.inputs()]
            if any(name.startswith("heads.") for name in sources):
                found.append(node.get_friendly_name())
    return found


def _import_nncf() -> Any:
    # Where it finds this package, NNCF reports each call to its maker, unless a file in the user's home forbids it.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import nncf

    nncf.set_log_level(logging.ERROR)
    return nncf
