"""Heads that are published as a file of their own -> Readout; a pickle that wants to run code is refused.

JQL's is a Lightning checkpoint and reads the L2-normalized embedding. FineWeb2-HQ's (epfml/FineWeb-HQ-Classifiers,
<language>.pt) is a state_dict, reads the mean of all token states as it is, and ends in a sigmoid.
"""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from jql_engine.bundle import sha256_of
from jql_engine.errors import HeadError
from jql_export.readouts.base import NAME, Layer, Readout, to_fp32
from jql_export.tensors import Linear, check_zip

EXPECTED = ("layer1.weight", "layer1.bias", "layer2.weight", "layer2.bias")
FINEWEB2_HQ = ("classifier.0.weight", "classifier.0.bias", "classifier.3.weight", "classifier.3.bias")


def read_head(name: str, file: Path, source: str | None = None, revision: str | None = None) -> Readout:
    """Read the checkpoint `file`; sizes come from its tensors. `source` and `revision` say where on the hub it lies.

    Raises HeadError: the name cannot be a column, the file is missing or holds more than plain data, a tensor is
    missing or does not fit the others.
    """
    if not NAME.fullmatch(name):
        raise HeadError(f"head name {name!r} cannot be a column name; use letters, digits, '.', '_' and '-'")
    state = _load(name, file)
    is_fineweb = FINEWEB2_HQ[0] in state
    expected = FINEWEB2_HQ if is_fineweb else EXPECTED
    missing = [key for key in expected if not isinstance(state.get(key), torch.Tensor)]
    if missing:
        found = ", ".join(map(str, state)) or "nothing"
        raise HeadError(f"head {name}: {file} lacks {', '.join(missing)}; its state_dict holds {found}")
    if extra := sorted(map(str, set(state) - set(expected))):
        raise HeadError(f"head {name}: {file} holds {', '.join(extra)} besides {', '.join(expected)}")
    w1, b1, w2, b2 = (to_fp32(f"head {name}: {file}", key, state[key]) for key in expected)
    if w1.ndim != 2 or not w1.size or w2.shape != (1, len(w1)) or b1.shape != (len(w1),) or b2.shape != (1,):
        shapes = ", ".join(f"{key} {list(state[key].shape)}" for key in expected)
        raise HeadError(f"head {name}: {file} has {shapes}; expected [K, D], [K], [1, K], [1]")
    head = jql_head(name, Linear(w1, b1), Linear(w2, b2), sha256_of(file), source, revision)
    if not is_fineweb:
        return head
    layers = (head.layers[0], replace(head.layers[1], activation="sigmoid"))
    return replace(head, kind="fineweb2-hq", layers=layers, pooling="mean", normalize=False)


def jql_head(
    name: str, hidden: Linear, output: Linear, sha256: str, source: str | None = None, revision: str | None = None
) -> Readout:
    """Score = output(relu(hidden(embedding))), of `hidden` [K, D] and `output` [1, K]."""
    layers = (Layer(hidden, "relu"), Layer(output))
    return Readout(name, "jql-head", layers, sha256, outputs=(name,), source=source, revision=revision)


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
