"""libjql through ctypes, for tests and benchmarks: the same names, NumPy arrays instead of pointers."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_int32, c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
ERROR_SIZE = 512
N_ERROR = (c_char_p, c_size_t)  # err and err_size end every signature


class Options(ctypes.Structure):
    """jql_options."""

    _fields_ = (
        ("size", c_size_t), ("variant", c_char_p), ("onnxruntime", c_char_p), ("openvino", c_char_p),
        ("threads", c_int32), ("verify", c_int32), ("certify", c_int32), ("reserved", c_int32),
    )  # fmt: skip


SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "jql_version": (c_char_p, ()),
    "jql_status_name": (c_char_p, (c_int32,)),
    "jql_open": (c_int32, (c_char_p, POINTER(Options), POINTER(c_void_p), *N_ERROR)),
    "jql_close": (None, (c_void_p,)),
    "jql_head_count": (c_size_t, (c_void_p,)),
    "jql_head_name": (c_char_p, (c_void_p, c_size_t)),
    "jql_max_tokens": (c_size_t, (c_void_p,)),
    "jql_embedding_size": (c_size_t, (c_void_p,)),
    "jql_tokenize": (
        c_int32,
        (c_void_p, c_char_p, c_size_t, c_void_p, c_size_t, POINTER(c_size_t), POINTER(c_int32), *N_ERROR),
    ),
    "jql_score_tokens": (c_int32, (c_void_p, c_void_p, c_void_p, c_size_t, c_void_p, *N_ERROR)),
    "jql_score_texts": (c_int32, (c_void_p, c_void_p, c_void_p, c_size_t, *[c_void_p] * 4, *N_ERROR)),
    "jql_embed_texts": (c_int32, (c_void_p, c_void_p, c_void_p, c_size_t, *[c_void_p] * 4, *N_ERROR)),
    "jql_score_arrow": (c_int32, (c_void_p, c_void_p, c_char_p, c_void_p, *N_ERROR)),
}


class JqlError(Exception):
    """A status that is not JQL_OK, by its name, and the sentence."""

    def __init__(self, status: str, sentence: str) -> None:
        super().__init__(f"{status}: {sentence}")
        self.status, self.sentence = status, sentence


class ArrowArrayStream(ctypes.Structure):
    """The stream interface's five pointers; pyarrow fills and reads them."""

    _fields_ = tuple(
        (name, c_void_p) for name in ("get_schema", "get_next", "get_last_error", "release", "private_data")
    )


def library_path() -> Path:
    """$JQL_LIBRARY, else where `make native` builds it."""
    return Path(os.environ.get("JQL_LIBRARY", ROOT / "build" / "native" / "libjql.so"))


def load(path: Path | None = None) -> ctypes.CDLL:
    """The library, its functions typed."""
    library = ctypes.CDLL(str(path or library_path()))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def onnxruntime_path() -> Path:
    """The library in the folder $JQL_ONNXRUNTIME, for another release than the one installed."""
    folder = os.environ.get("JQL_ONNXRUNTIME")
    pattern = "capi/libonnxruntime.so.*"
    return next(Path(folder).glob(pattern)) if folder else package_file("onnxruntime", pattern)


def package_file(package: str, pattern: str) -> Path:
    """A shared library that a Python package brings along."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None, f"{package} is not installed"
    return sorted(Path(spec.origin).parent.glob(pattern))[-1]


@dataclass(frozen=True, slots=True)
class Computed:
    """What jql_score_texts and jql_embed_texts give."""

    values: NDArray[np.float32]  # [n, heads or hidden size]
    n_tokens: NDArray[np.int32]
    truncated: NDArray[np.bool_]
    status: NDArray[np.int32]


class NativeEngine:
    """jql_engine; raises JqlError."""

    def __init__(self, bundle: Path | str, library: ctypes.CDLL | None = None, **options: Any) -> None:
        self.library = library or load()
        self._error = ctypes.create_string_buffer(ERROR_SIZE)
        self._engine = c_void_p()
        given = {
            "variant": None, "threads": 0, "verify": 1, "certify": 1,
            "onnxruntime": str(onnxruntime_path()),
            "openvino": str(package_file("openvino", "libs/libopenvino_c.so*")),
        } | options  # fmt: skip
        encoded = {name: value.encode() if isinstance(value, str) else value for name, value in given.items()}
        self.call(
            "jql_open", str(bundle).encode(), byref(Options(ctypes.sizeof(Options), **encoded)), byref(self._engine)
        )

    def shared(self) -> NativeEngine:
        """The same open engine for another thread, which needs a buffer for errors of its own."""
        other = object.__new__(NativeEngine)
        other.library, other._engine = self.library, self._engine
        other._error = ctypes.create_string_buffer(ERROR_SIZE)
        return other

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function that has err and err_size at its end."""
        status = getattr(self.library, name)(*arguments, self._error, ERROR_SIZE)
        if status:
            raise JqlError(self.library.jql_status_name(status).decode(), self._error.value.decode())
        assert self._error.value == b""

    def close(self) -> None:
        self.library.jql_close(self._engine)
        self._engine = c_void_p()

    def __enter__(self) -> NativeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def heads(self) -> tuple[str, ...]:
        names = (self.library.jql_head_name(self._engine, i) for i in range(self.library.jql_head_count(self._engine)))
        return tuple(name.decode() for name in names)

    @property
    def max_tokens(self) -> int:
        return self.library.jql_max_tokens(self._engine)

    def tokenize(self, text: str | bytes, capacity: int | None = None) -> tuple[list[int], bool]:
        """Ids, and whether they were truncated."""
        content = text.encode() if isinstance(text, str) else text
        capacity = self.max_tokens if capacity is None else capacity
        ids, n_ids, truncated = (c_int32 * capacity)(), c_size_t(), c_int32()
        self.call("jql_tokenize", self._engine, content, len(content), ids, capacity, byref(n_ids), byref(truncated))
        return ids[: n_ids.value], bool(truncated.value)

    def score_tokens(self, ids: Sequence[int], offsets: Sequence[int]) -> NDArray[np.float32]:
        """Scores [n, heads]."""
        flat, ends = np.asarray(ids, np.int32), np.asarray(offsets, np.int64)
        scores = np.full((len(ends) - 1, len(self.heads)), np.nan, np.float32)
        self.call(
            "jql_score_tokens", self._engine, flat.ctypes.data, ends.ctypes.data, len(ends) - 1, scores.ctypes.data
        )
        return scores

    def score(self, texts: Sequence[str | bytes | None], *, with_status: bool = True) -> Computed:
        """jql_score_texts."""
        return self._compute("jql_score_texts", texts, len(self.heads), with_status)

    def embed(self, texts: Sequence[str | bytes | None], *, with_status: bool = True) -> Computed:
        """jql_embed_texts."""
        return self._compute("jql_embed_texts", texts, self.library.jql_embedding_size(self._engine), with_status)

    def _compute(self, name: str, texts: Sequence[str | bytes | None], width: int, with_status: bool) -> Computed:
        contents = [text.encode() if isinstance(text, str) else text for text in texts]
        n = len(contents)
        pointers, lengths = (c_char_p * n)(*contents), (c_size_t * n)(*(len(text or b"") for text in contents))
        values, n_tokens = np.full((n, width), -1, np.float32), np.full(n, -1, np.int32)
        truncated, status = np.full(n, 2, np.uint8), np.full(n, -1, np.int32)
        self.call(
            name, self._engine, pointers, lengths, n, values.ctypes.data, n_tokens.ctypes.data, truncated.ctypes.data,
            status.ctypes.data if with_status else None,
        )  # fmt: skip
        return Computed(values, n_tokens, truncated.astype(np.bool_), status)

    def score_arrow(self, stream: pa.RecordBatchReader | pa.ChunkedArray, column: str | None) -> pa.RecordBatchReader:
        """jql_score_arrow; `stream` is anything with __arrow_c_stream__."""
        capsule = stream.__arrow_c_stream__()
        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = c_void_p, (ctypes.py_object, c_char_p)
        given, scores = get(capsule, b"arrow_array_stream"), ArrowArrayStream()
        name = column.encode() if column is not None else None
        self.call("jql_score_arrow", self._engine, given, name, byref(scores))
        return pa.RecordBatchReader._import_from_c(ctypes.addressof(scores))
