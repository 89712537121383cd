"""Lightning .ckpt -> HeadWeights; a pickle that wants to run code is refused."""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from jql_engine.bundle import sha256_of
from jql_engine.errors import HeadError
from jql_export.tensors import Array, Linear, check_zip

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
EXPECTED = ("layer1.weight", "layer1.bias", "layer2.weight", "layer2.bias")


@dataclass(frozen=True, slots=True)
class HeadWeights:
    """One regression head: score = output(relu(hidden(embedding)))."""

    name: str
    hidden: Linear  # weight [K, D]
    output: Linear  # weight [1, K]
    sha256: str
    source: str | None = None  # repository and file on the hub
    revision: str | None = None  # commit there

    @property
    def input_size(self) -> int:
        """Width of the embeddings that this head reads."""
        return int(self.hidden.weight.shape[1])

    @property
    def hidden_size(self) -> int:
        """Width of the hidden layer."""
        return int(self.hidden.weight.shape[0])


@dataclass(frozen=True, slots=True)
class StackedHeads:
    """All heads as two matrix products: the hidden layers side by side, the outputs block-diagonal."""

    hidden_weight: Array  # [sum K, D]
    hidden_bias: Array  # [sum K]
    output_weight: Array  # [sum K, H], zero outside of a head's own block
    output_bias: Array  # [H]


def read_head(name: str, file: Path, source: str | None = None, revision: str | None = None) -> HeadWeights:
    """Read the checkpoint `file`; sizes come from its tensors. `source` and `revision` say where on the hub it lies.

    Raises HeadError: the name cannot be a column, the file is missing or holds more than plain data, a tensor is
    missing or does not fit the others.
    """
    if not NAME.fullmatch(name):
        raise HeadError(f"head name {name!r} cannot be a column name; use letters, digits, '.', '_' and '-'")
    state = _load(name, file)
    missing = [key for key in EXPECTED if not isinstance(state.get(key), torch.Tensor)]
    if missing:
        found = ", ".join(map(str, state)) or "nothing"
        raise HeadError(f"head {name}: {file} lacks {', '.join(missing)}; its state_dict holds {found}")
    if extra := sorted(map(str, set(state) - set(EXPECTED))):
        raise HeadError(f"head {name}: {file} holds {', '.join(extra)} besides {', '.join(EXPECTED)}")
    w1, b1, w2, b2 = (_fp32(name, file, key, state[key]) for key in EXPECTED)
    if w1.ndim != 2 or not w1.size or w2.shape != (1, len(w1)) or b1.shape != (len(w1),) or b2.shape != (1,):
        shapes = ", ".join(f"{key} {list(state[key].shape)}" for key in EXPECTED)
        raise HeadError(f"head {name}: {file} has {shapes}; expected [K, D], [K], [1, K], [1]")
    return HeadWeights(name, Linear(w1, b1), Linear(w2, b2), sha256_of(file), source, revision)


def _fp32(name: str, file: Path, key: str, tensor: torch.Tensor) -> Array:
    """A weight as an array; raises HeadError for what holds no finite floating-point numbers."""
    if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
        what = "meta" if tensor.is_meta else f"{tensor.layout}".removeprefix("torch.")
        raise HeadError(
            f"head {name}: {file}: {key} is a {what} tensor of {tensor.dtype}, expected a strided one of floating point"
        )
    array: Array = tensor.detach().to(torch.float32).numpy()
    if not np.isfinite(array).all():
        raise HeadError(f"head {name}: {file}: {key} holds NaN, or what is infinite in fp32; train the head again")
    return array


def check_heads(heads: Sequence[HeadWeights], hidden_size: int) -> None:
    """Raise HeadError where two heads share a name or one does not read embeddings [hidden_size]."""
    if not heads:
        raise HeadError("no heads; give at least one --head NAME=FILE.ckpt, or --no-heads to embed only")
    names = [head.name for head in heads]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise HeadError(f"two heads are named {twice[0]}; each head needs a name of its own")
    for head in heads:
        if head.input_size != hidden_size:
            raise HeadError(
                f"head {head.name} reads embeddings of size {head.input_size}, the encoder gives {hidden_size}; "
                "it was trained for another encoder"
            )


def stack(heads: Sequence[HeadWeights], hidden_size: int | None = None) -> StackedHeads:
    """Join heads, in their order; hidden sizes may differ. No heads at all need the encoder's `hidden_size` D."""
    if not heads:
        assert hidden_size is not None
        return StackedHeads(*(np.zeros(shape, np.float32) for shape in ((0, hidden_size), (0,), (0, 0), (0,))))
    outputs = np.zeros((sum(head.hidden_size for head in heads), len(heads)), np.float32)
    start = 0
    for i, head in enumerate(heads):
        outputs[start : start + head.hidden_size, i] = head.output.weight[0]
        start += head.hidden_size
    return StackedHeads(
        np.concatenate([head.hidden.weight for head in heads]),
        np.concatenate([_bias(head.hidden) for head in heads]),
        outputs,
        np.concatenate([_bias(head.output) for head in heads]),
    )


def write_heads(file: Path, heads: StackedHeads) -> None:
    """Write the heads of a bundle; see jql_engine.bundle."""
    tensors = {
        "hidden.weight": heads.hidden_weight,
        "hidden.bias": heads.hidden_bias,
        "output.weight": heads.output_weight,
        "output.bias": heads.output_bias,
    }
    # save_file would give the file to its owner alone, whatever the umask says.
    file.write_bytes(save({name: np.ascontiguousarray(value) for name, value in tensors.items()}))


def _bias(linear: Linear) -> Array:
    assert linear.bias is not None
    return linear.bias


def _load(name: str, file: Path) -> dict[str, Any]:
    try:
        check_zip(file)
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise HeadError(f"head {name}: {file} cannot be read: {error.strerror}") from error
    except pickle.UnpicklingError as error:
        raise HeadError(
            f"head {name}: {file} holds more than tensors and plain data, which could run code; refused. Save its "
            f"state_dict alone with torch.save if you trust it. ({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:  # a damaged zip, a truncated stream: torch raises many kinds
        raise HeadError(f"head {name}: {file} is no checkpoint that torch can read: {error!r}") from error
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict):
        raise HeadError(f"head {name}: {file} holds a {type(checkpoint).__name__}, expected a state_dict")
    return state
