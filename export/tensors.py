"""The tensors of a checkpoint directory, by name and in fp32, each to be taken once.

Files are read as tensors and JSON, never as code. A tensor that belongs to the encoder and is never taken is an error:
a layer can neither stay random nor be dropped unseen.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from jql_engine.errors import CheckpointError
from jql_engine.names import RelativeName

Array = NDArray[np.float32]
WEIGHT_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
WORD = "embeddings.word_embeddings"
# Where torch.nn.utils.parametrize keeps a weight that something is added to.
PARAMETRIZED = "parametrizations.weight"
FOLDER = 0x10  # among the external attributes of a zip's member, as DOS had them


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x weight^T + bias."""

    weight: Array  # [out, in]
    bias: Array | None  # [out]


@dataclass(frozen=True, slots=True)
class Norm:
    """Layer normalization."""

    weight: Array  # [D]
    bias: Array  # [D]


@dataclass(frozen=True, slots=True)
class Adapter:
    """One of the LoRA adapters that a checkpoint holds for every linear layer and embedding table."""

    name: str
    index: int
    n_adapters: int
    rank: int
    scale: float


class TensorFile:
    """The tensors of a checkpoint, by canonical name, each to be taken once."""

    def __init__(
        self,
        directory: Path,
        adapter: Adapter | None = None,
        word: str = WORD,
        roots: tuple[str, ...] = ("embeddings", "emb_ln", "encoder"),
    ) -> None:
        """Open model.safetensors, its sharded form, or pytorch_model.bin (weights only); raises CheckpointError.

        `word`: the table of the vocabulary, before whose name any prefix may stand; `roots`: the first parts of the
        names of tensors that belong to the encoder.
        """
        self._roots = roots
        self.path = directory
        self.adapter = adapter
        self._tensors = open_tensors(directory)
        word = f"{word}.weight" if adapter is None else f"{word}.{PARAMETRIZED}.original"
        prefixes = [name.removesuffix(word) for name in self._tensors if name.endswith(word)]
        if len(prefixes) != 1:
            raise CheckpointError(
                f"{directory}: expected one tensor named {word}, after any prefix, found {len(prefixes)}; "
                f"the checkpoint holds {_some(self._tensors)}"
            )
        self.prefix = prefixes[0]
        self.vocab_size = len(self._read(self.prefix + word, 2))
        self._left = set(self._tensors)

    def take(self, name: str, shape: tuple[int, ...]) -> Array:
        """The tensor `name` in fp32; raises CheckpointError where it is missing, of another shape or not finite."""
        full = self.prefix + name
        if full not in self._tensors:
            raise CheckpointError(f"{self.path}: tensor {full} is missing; the checkpoint holds {_some(self._tensors)}")
        tensor = self._read(full, len(shape))
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{self.path}: tensor {full} is {list(tensor.shape)}, config.json says {list(shape)}")
        self._left.discard(full)
        array: Array = tensor.to(torch.float32).numpy()
        if not np.isfinite(array).all():  # of a row for a rare token no probe document need tell
            raise CheckpointError(f"{self.path}: tensor {full} holds NaN, or what is infinite in fp32; copy it again")
        return array

    def _read(self, full: str, n_dimensions: int) -> torch.Tensor:
        tensor = self._tensors[full]()
        if wrong := not_plain(tensor):
            raise CheckpointError(f"{self.path}: {full} is {wrong}")
        if tensor.dim() != n_dimensions:
            raise CheckpointError(
                f"{self.path}: tensor {full} is {list(tensor.shape)}, expected {n_dimensions} dimensions"
            )
        return tensor.detach()

    def linear(self, name: str, n_in: int, n_out: int) -> Linear:
        """`name`.weight [n_out, n_in] and `name`.bias [n_out]."""
        return Linear(self._weight(name, n_out, n_in, ("lora_B", "lora_A")), self.take(f"{name}.bias", (n_out,)))

    def table(self, name: str, n_rows: int, width: int) -> Array:
        """The embedding table `name`.weight [n_rows, width]; its adapter has A and B the other way round."""
        return self._weight(name, n_rows, width, ("lora_A", "lora_B"))

    def _weight(self, name: str, n_rows: int, n_columns: int, factors: tuple[str, str]) -> Array:
        """`name`.weight, with the adapter merged in where there is one: W + scale B A (LoRA, arXiv:2106.09685)."""
        adapter = self.adapter
        if adapter is None:
            return self.take(f"{name}.weight", (n_rows, n_columns))
        name = f"{name}.{PARAMETRIZED}"
        left = self.take(f"{name}.0.{factors[0]}", (adapter.n_adapters, n_rows, adapter.rank))[adapter.index]
        right = self.take(f"{name}.0.{factors[1]}", (adapter.n_adapters, adapter.rank, n_columns))[adapter.index]
        merged: Array = self.take(f"{name}.original", (n_rows, n_columns)) + np.float32(adapter.scale) * (left @ right)
        return merged

    def norm(self, name: str, size: int) -> Norm:
        """`name`.weight and `name`.bias, both [size]."""
        return Norm(self.take(f"{name}.weight", (size,)), self.take(f"{name}.bias", (size,)))

    def unused(self) -> tuple[str, ...]:
        """Names never taken; raises CheckpointError where one of them belongs to the encoder."""
        roots = "|".join(map(re.escape, self._roots))
        buffers = r"(position|token_type)_ids$"  # of older transformers
        part_of_encoder = re.compile(rf"{re.escape(self.prefix)}({roots})\.(?!{buffers})")
        if lost := sorted(filter(part_of_encoder.match, self._left)):
            raise CheckpointError(
                f"{self.path}: {len(lost)} tensors of the encoder have no place in the model that config.json "
                f"describes: {_some(lost)}"
            )
        return tuple(sorted(self._left))


def open_tensors(directory: Path) -> dict[str, Callable[[], torch.Tensor]]:
    """A function for each tensor that reads it; raises CheckpointError."""
    for name in WEIGHT_FILES:
        file = directory / name
        if not file.is_file():
            continue
        try:
            shards = {name}
            if name.endswith(".index.json"):
                shards = set(read_json(file)["weight_map"].values())
            return {key: get for shard in sorted(shards) for key, get in _open_shard(directory, shard).items()}
        except Exception as error:  # safetensors, pickle and torch each have their own
            raise CheckpointError(f"{file} cannot be read: {error}") from error
    raise CheckpointError(f"{directory} holds no weights: expected one of {', '.join(WEIGHT_FILES)}")


def _open_shard(directory: Path, name: str) -> dict[str, Callable[[], torch.Tensor]]:
    file = directory / RelativeName(name).text
    if name.endswith(".bin"):
        check_zip(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
        return {_current(key): partial(_same, tensor) for key, tensor in state.items()}
    shard: Any = safe_open(file, framework="pt")  # untyped; reads a tensor when asked for it
    return {_current(key): partial(shard.get_tensor, key) for key in shard.keys()}  # noqa: SIM118 (no mapping)


def _current(name: str) -> str:
    """The name that a tensor has today: layer norms of BERT's time, bert-base-uncased's for one, had gamma and beta."""
    return re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))


def check_zip(file: Path) -> None:
    """Raise BadZipFile where a member of a file of torch is not what its checksum says, or is marked as a folder.

    torch 2.13 looks at neither: it reads other weights, and of a folder whatever lies in memory.
    """
    if not zipfile.is_zipfile(file):  # torch's format before 1.6, or nothing that it reads
        return
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.external_attr & FOLDER:
                raise zipfile.BadZipFile(f"{member.filename} is marked as a folder; it is damaged")
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"{damaged} is not what its checksum says; copy or save the file again")


def not_plain(tensor: object) -> str | None:
    """What it is instead of a strided tensor of floating-point numbers, and what is expected; None for one."""
    if not isinstance(tensor, torch.Tensor):
        return f"a {type(tensor).__name__}, expected a tensor"
    if tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta:
        return None
    what = "meta" if tensor.is_meta else f"{tensor.layout}".removeprefix("torch.")
    return f"a {what} tensor of {tensor.dtype}, expected a strided one of floating point"


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def read_json(file: Path) -> dict[str, Any]:
    """The object in `file`; raises CheckpointError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, expected an object")
    return content


def _some(names: Any, limit: int = 5) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more
