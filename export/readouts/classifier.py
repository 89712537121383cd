"""The head of a sequence classifier, as transformers publishes it -> Readout; nothing of it is run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from jql_engine.bundle import Activation, Pooling, sha256_of
from jql_engine.errors import HeadError
from jql_export.families.base import positive, read_config
from jql_export.readouts.base import NAME, Layer, Readout, to_fp32
from jql_export.tensors import WEIGHT_FILES, Array, Linear, Norm, open_tensors

T = TypeVar("T")
Output = Literal["sigmoid", "softmax"]
PROBLEMS = (None, "regression", "single_label_classification", "multi_label_classification")
DEFAULT_LABELS = 2  # of a config that says nothing: LABEL_0, LABEL_1


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """The tensors of a classifier's head, each found with whatever prefix it has."""

    name: str
    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Callable[[], torch.Tensor]]
    taken: list[str]  # full names

    @property
    def where(self) -> str:
        return f"classifier {self.name}: {self.directory}"

    def take(self, key: str, *shape: int | None) -> Array:
        """The tensor `key`, of which None in its shape may be anything; raises HeadError."""
        found = [full for full in self.tensors if full == key or full.endswith(f".{key}")]
        if len(found) != 1:
            how = f"several tensors {key}: {', '.join(sorted(found))}" if found else f"no tensor {key}"
            raise HeadError(f"{self.where} has {how}; {self.config['model_type']} has one")
        array = to_fp32(self.where, found[0], self.tensors[found[0]]())
        if len(shape) != array.ndim or any(n not in (None, size) for n, size in zip(shape, array.shape, strict=True)):
            expected = ", ".join("*" if n is None else str(n) for n in shape)
            raise HeadError(f"{self.where}: {found[0]} is {list(array.shape)}, expected [{expected}]")
        self.taken.append(found[0])
        return array

    def linear(self, name: str, n_in: int | None = None, bias: bool = True) -> Linear:
        """`name`.weight [out, in] and, with `bias`, `name`.bias [out]."""
        weight = self.take(f"{name}.weight", None, n_in)
        return Linear(weight, self.take(f"{name}.bias", len(weight)) if bias else None)


def _tanh(name: str, checkpoint: _Checkpoint) -> tuple[Pooling, Layer]:
    """A layer on the first token's state, as BERT's pooler."""
    return "cls", Layer(checkpoint.linear(name), "tanh")


def _modernbert(checkpoint: _Checkpoint) -> tuple[Pooling, Layer]:
    config, directory = checkpoint.config, checkpoint.directory
    poolings: dict[str, Pooling] = {"cls": "cls", "mean": "mean"}
    pooling = _one_of(checkpoint, "classifier_pooling", "cls", poolings)
    activations: dict[str, Activation] = {"gelu": "gelu", "silu": "silu", "relu": "relu", "tanh": "tanh"}
    activation = _one_of(checkpoint, "classifier_activation", "gelu", activations)
    dense = checkpoint.linear("head.dense", bias=config.get("classifier_bias", False))
    width = len(dense.weight)
    shift = checkpoint.take("head.norm.bias", width) if config.get("norm_bias", False) else np.zeros(width, np.float32)
    norm = Norm(checkpoint.take("head.norm.weight", width), shift)
    return pooling, Layer(dense, activation, norm, positive(directory, {"norm_eps": 1e-5, **config}, "norm_eps"))


def _one_of(checkpoint: _Checkpoint, key: str, default: str, known: Mapping[str, T]) -> T:
    found = checkpoint.config.get(key, default)
    if not isinstance(found, str) or found not in known:
        raise HeadError(f"{checkpoint.where} has {key} {found!r}; known are {', '.join(known)}")
    return known[found]


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where a family keeps its head, and the classes that compute it so."""

    classes: tuple[str, ...]
    before: Callable[[_Checkpoint], tuple[Pooling, Layer]]  # reads what stands before the last layer
    last: str = "classifier"  # the last layer's name


_POOLER = partial(_tanh, "pooler.dense")
LAYOUTS: Mapping[str, _Layout] = {  # by model_type
    "bert": _Layout(("BertForSequenceClassification",), _POOLER),
    "gte": _Layout(("GteForSequenceClassification",), _POOLER),
    "modernbert": _Layout(("ModernBertForSequenceClassification",), _modernbert),
    "new": _Layout(("NewForSequenceClassification", "GteForSequenceClassification"), _POOLER),
    "xlm-roberta": _Layout(
        ("XLMRobertaForSequenceClassification",), partial(_tanh, "classifier.dense"), "classifier.out_proj"
    ),
}


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
    labels that become one name; CheckpointError for files that cannot be read.
    """
    if not NAME.fullmatch(name):
        raise HeadError(f"classifier name {name!r} cannot be a column name; use letters, digits, '.', '_' and '-'")
    config = read_config(directory)
    _check(name, directory, config)
    checkpoint = _Checkpoint(name, directory, config, open_tensors(directory), taken=[])
    layout = LAYOUTS[config["model_type"]]
    pooling, hidden = layout.before(checkpoint)
    output = checkpoint.linear(layout.last, len(hidden.linear.weight))
    outputs = _outputs(name, directory, config, len(output.weight))
    if activation == "softmax" and len(outputs) == 1:
        raise HeadError(f"classifier {name} has one output, of which a softmax is always 1; ask for sigmoid")
    return Readout(
        name,
        "classifier",
        (hidden, Layer(output, activation)),
        _sha256(directory),
        outputs,
        pooling=pooling,
        normalize=False,
        source=source,
        revision=revision,
        checkpoint=directory,
        tensors=tuple(checkpoint.taken),
    )


def _check(name: str, directory: Path, config: Mapping[str, Any]) -> None:
    """Raise HeadError where config.json describes something else than a sequence classifier of a known family."""
    where, kind = f"classifier {name}: {directory}", config.get("model_type")
    known = "; ".join(f"{family}: {' or '.join(layout.classes)}" for family, layout in sorted(LAYOUTS.items()))
    if not isinstance(kind, str) or kind not in LAYOUTS:
        raise HeadError(f"{where} has model_type {kind!r}; known are {known}")
    found = config.get("architectures")
    if not isinstance(found, list) or not set(map(str, found)) & set(LAYOUTS[kind].classes):
        classes = ", ".join(map(str, found)) if isinstance(found, list) else repr(found)
        own = ", with code of its repository (auto_map), which is never run" if config.get("auto_map") else ""
        raise HeadError(f"{where} is {classes or 'of no architecture'} of model_type {kind}{own}; known are {known}")
    if config.get("problem_type") not in PROBLEMS:
        raise HeadError(
            f"{where} has problem_type {config['problem_type']!r}; known are {', '.join(map(str, PROBLEMS[1:]))}"
        )


def _outputs(name: str, directory: Path, config: Mapping[str, Any], n_outputs: int) -> tuple[str, ...]:
    said = config.get("num_labels")
    if said is not None and type(said) is not int:
        raise HeadError(f"classifier {name}: {directory}: config.json has num_labels = {said!r}, expected an integer")
    labels = config.get("id2label") or {i: f"LABEL_{i}" for i in range(said or DEFAULT_LABELS)}
    try:
        by_number = {int(number): str(label) for number, label in labels.items()}
    except (AttributeError, ValueError) as error:
        raise HeadError(f"classifier {name}: {directory}: config.json has id2label = {labels!r}") from error
    if sorted(by_number) != list(range(n_outputs)) or said not in (None, n_outputs):
        raise HeadError(
            f"classifier {name}: {directory}: its last layer has {n_outputs} outputs, config.json has num_labels = "
            f"{said} and the labels {', '.join(map(str, by_number.values()))}; both must fit"
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
