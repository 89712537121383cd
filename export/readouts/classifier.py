"""The head of a sequence classifier, as transformers publishes it -> Readout; nothing of it is run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from jql_engine.bundle import Activation, Pooling, sha256_of
from jql_engine.errors import HeadError
from jql_export.families.base import read_config
from jql_export.readouts.base import NAME, Layer, Readout
from jql_export.tensors import WEIGHT_FILES, Array, Linear, Norm, open_tensors

Output = Literal["sigmoid", "softmax"]
# The two linear layers behind the pooled state, by model_type; between them stands a tanh, ModernBERT's activation and
# norm apart. The first may lie within the encoder's prefix.
LAYERS: Mapping[str, tuple[str, str]] = {
    "modernbert": ("head.dense", "classifier"),
    "bert": ("pooler.dense", "classifier"),
    "gte": ("pooler.dense", "classifier"),
    "new": ("pooler.dense", "classifier"),
    "xlm-roberta": ("classifier.dense", "classifier.out_proj"),
}
SUFFIX = "ForSequenceClassification"
PROBLEMS = (None, "regression", "single_label_classification", "multi_label_classification")
DEFAULT_LABELS = {0: "LABEL_0", 1: "LABEL_1"}  # of a config that names none


def read_classifier(
    name: str,
    directory: Path,
    activation: Output | None = None,
    source: str | None = None,
    revision: str | None = None,
) -> Readout:
    """Read the head of the classifier in `directory`; its outputs are raw logits unless an `activation` is asked for.

    One label gives one output called `name`, several give `name`_label each, with `_` for what is neither letter nor
    digit. Raises HeadError: no sequence classifier, an unknown architecture, labels or tensors that do not fit, two
    labels that become one name.
    """
    if not NAME.fullmatch(name):
        raise HeadError(f"classifier name {name!r} cannot be a column name; use letters, digits, '.', '_' and '-'")
    config = read_config(directory)
    _check(name, directory, config)
    first, last = LAYERS[config["model_type"]]
    modern = config["model_type"] == "modernbert"
    taken = [f"{first}.weight", f"{first}.bias", f"{last}.weight", f"{last}.bias"]
    if modern and not config.get("classifier_bias", False):
        taken.remove(f"{first}.bias")
    if modern:
        taken += ["head.norm.weight", *(["head.norm.bias"] if config.get("norm_bias", False) else [])]
    tensors = open_tensors(directory)
    found = {key: _find(name, directory, tensors, key) for key in taken}
    if missing := [key for key in found.values() if key not in tensors]:
        raise HeadError(f"classifier {name}: {directory} lacks {', '.join(missing)}, which {config['model_type']} has")
    arrays = {key: _fp32(name, directory, full, tensors[full]()) for key, full in found.items()}
    width = len(arrays[f"{first}.weight"])
    w2 = arrays[f"{last}.weight"]
    shapes = dict.fromkeys(taken, (width,)) | {
        f"{first}.weight": (width, arrays[f"{first}.weight"].shape[-1]), f"{last}.weight": (len(w2), width),
        f"{last}.bias": (len(w2),),
    }  # fmt: skip
    for key, shape in shapes.items():
        if arrays[key].shape != shape:
            raise HeadError(
                f"classifier {name}: {directory}: {found[key]} is {list(arrays[key].shape)}, expected {list(shape)}"
            )
    hidden = Layer(Linear(arrays[f"{first}.weight"], arrays.get(f"{first}.bias")), "tanh")
    if modern:
        norm = Norm(arrays["head.norm.weight"], arrays.get("head.norm.bias", np.zeros(width, np.float32)))
        hidden = Layer(hidden.linear, _activation(name, directory, config), norm, float(config.get("norm_eps", 1e-5)))
    outputs = _outputs(name, directory, config, len(w2))
    if activation == "softmax" and len(outputs) == 1:
        raise HeadError(f"classifier {name} has one output, of which a softmax is always 1; ask for sigmoid")
    return Readout(
        name,
        "classifier",
        (hidden, Layer(Linear(w2, arrays[f"{last}.bias"]), activation)),
        _sha256(directory),
        outputs,
        pooling=_pooling(name, directory, config) if modern else "cls",
        normalize=False,
        source=source,
        revision=revision,
        checkpoint=directory,
        tensors=tuple(found.values()),
    )


def _check(name: str, directory: Path, config: Mapping[str, Any]) -> None:
    """Raise HeadError where config.json describes something else than a sequence classifier of a known family."""
    classes = config.get("architectures") or []
    kinds = ", ".join(sorted(LAYERS))
    if not (isinstance(classes, list) and any(str(one).endswith(SUFFIX) for one in classes)):
        raise HeadError(
            f"classifier {name}: {directory} is {', '.join(map(str, classes)) or 'of no architecture'}, expected a "
            f"...{SUFFIX} of {kinds}"
        )
    if config.get("model_type") not in LAYERS:
        raise HeadError(
            f"classifier {name}: {directory} has model_type {config.get('model_type')!r}; known are {kinds}"
        )
    if config.get("problem_type") not in PROBLEMS:
        raise HeadError(
            f"classifier {name}: {directory} has problem_type {config['problem_type']!r}; known are "
            f"{', '.join(map(str, PROBLEMS[1:]))}"
        )


def _activation(name: str, directory: Path, config: Mapping[str, Any]) -> Activation:
    known: dict[str, Activation] = {"gelu": "gelu", "silu": "silu", "relu": "relu", "tanh": "tanh"}
    found = config.get("classifier_activation", "gelu")
    if found not in known:
        raise HeadError(
            f"classifier {name}: {directory} has classifier_activation {found!r}; known are {', '.join(known)}"
        )
    return known[found]


def _pooling(name: str, directory: Path, config: Mapping[str, Any]) -> Pooling:
    found = config.get("classifier_pooling", "cls")
    if found not in ("cls", "mean"):
        raise HeadError(f"classifier {name}: {directory} has classifier_pooling {found!r}; known are cls and mean")
    return "cls" if found == "cls" else "mean"


def _find(name: str, directory: Path, tensors: Mapping[str, Any], key: str) -> str:
    """The full name of a tensor, with any prefix; raises HeadError where there are several."""
    found = [full for full in tensors if full == key or full.endswith(f".{key}")]
    if len(found) > 1:
        raise HeadError(f"classifier {name}: {directory} has several tensors {key}: {', '.join(sorted(found))}")
    return found[0] if found else key


def _fp32(name: str, directory: Path, key: str, tensor: torch.Tensor) -> Array:
    array: Array = tensor.detach().to(torch.float32).numpy()
    if not np.isfinite(array).all():
        raise HeadError(f"classifier {name}: {directory}: {key} holds NaN, or what is infinite in fp32")
    return array


def _outputs(name: str, directory: Path, config: Mapping[str, Any], n_outputs: int) -> tuple[str, ...]:
    labels = config.get("id2label") or DEFAULT_LABELS
    try:
        by_number = {int(number): str(label) for number, label in labels.items()}
    except (AttributeError, ValueError) as error:
        raise HeadError(f"classifier {name}: {directory}: config.json has id2label = {labels!r}") from error
    said = config.get("num_labels", len(by_number))
    if sorted(by_number) != list(range(n_outputs)) or said != n_outputs:
        raise HeadError(
            f"classifier {name}: {directory}: its last layer has {n_outputs} outputs, config.json names {said} labels "
            f"({', '.join(map(str, by_number.values()))}); num_labels or id2label must fit"
        )
    if n_outputs == 1:
        return (name,)
    outputs = [f"{name}_{_column(by_number[i])}" for i in range(n_outputs)]
    if twice := sorted({output for output in outputs if outputs.count(output) > 1}):
        raise HeadError(
            f"classifier {name}: {directory}: several labels become the column score_{twice[0]}; rename them in "
            "id2label in a copy"
        )
    return tuple(outputs)


def _column(label: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in label)


def _sha256(directory: Path) -> str:
    """Of one file of weights its own; of several that over their hexadecimal hashes, in the order of their names."""
    files = [file for file in sorted(directory.iterdir()) if file.suffix == ".safetensors"]
    files = files or [directory / name for name in WEIGHT_FILES if (directory / name).is_file()]
    hashes = [sha256_of(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
