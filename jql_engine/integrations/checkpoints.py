"""The tensors of a torch checkpoint, without torch and without running what a pickle asks to be run.

torch.save writes a zip: `data.pkl`, a pickle in which each tensor names a storage, and `data/<key>`, the bytes of a
storage. Here the pickle can build tensors and plain containers; whatever else it names becomes an inert placeholder.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jql_engine.errors import HeadError

STORAGES = {"FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16}


def read_tensors(file: Path, names: Sequence[str]) -> Mapping[str, NDArray[np.float32]]:
    """The tensors `names` of the checkpoint's state_dict, fp32; raises HeadError naming what is wrong."""
    try:
        with zipfile.ZipFile(file) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            content = _Unpickler(archive, name.removesuffix("data.pkl")).load()
    except OSError as error:
        raise HeadError(f"{file} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a pickle can go wrong in any way
        raise HeadError(f"{file} is no checkpoint that torch.save wrote: {error!r}") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    missing = [name for name in names if not isinstance(state.get(name), np.ndarray)]
    if missing:
        raise HeadError(
            f"{file} lacks {', '.join(missing)}; its state_dict holds {', '.join(map(str, state)) or 'nothing'}"
        )
    return {name: state[name].astype(np.float32) for name in names}


class _Inert:
    """Stands for any class or function that a pickle names; takes everything and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> _Inert:
        return self

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        """Of a list-like."""

    def extend(self, _: Any) -> None:
        """Of a list-like."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, prefix: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{prefix}data.pkl")))
        self._archive, self._prefix = archive, prefix

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        return name if module == "torch" and name in STORAGES else _Inert

    def persistent_load(self, pid: Any) -> NDArray[Any] | None:
        _, storage, key, *_ = pid
        if storage not in STORAGES:
            return None
        return np.frombuffer(self._archive.read(f"{self._prefix}data/{key}"), STORAGES[storage])


def _rebuild(storage: NDArray[Any] | None, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> Any:
    """A tensor as a view of its storage; None where its type is none of STORAGES."""
    if storage is None:
        return None
    count = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else 0
    if offset < 0 or offset + count > len(storage) or min([0, *stride]) < 0:
        raise ValueError(f"a tensor of {list(size)} does not fit its storage of {len(storage)}")
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)
