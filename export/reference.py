"""The plain PyTorch model: the oracle that every graph is measured against.

The encoder is the class that transformers itself has for the checkpoint, an implementation independent of ours, in
fp32, one document at a time and therefore without padding. Two published layouts are none that AutoModel can load
without running their repository's code; for them the native class of the same architecture gets what it lacks here:

- `new` (gte-multilingual-base): NTK-scaled RoPE frequencies;
- jina-embeddings-v3: the LoRA adapter, computed beside every layer and not merged into its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    GteConfig,
    GteForSequenceClassification,
    GteModel,
    JinaEmbeddingsV3Config,
    JinaEmbeddingsV3Model,
)

from jql_engine.bundle import Activation, Pooling
from jql_engine.data import TokenBatch
from jql_engine.errors import CheckpointError, EngineError
from jql_engine.sessions.certify import Expected
from jql_export.families.base import read_config
from jql_export.families.jina_v3 import LORA_TASK, is_jina_v3
from jql_export.readouts.base import Readout
from jql_export.tensors import open_tensors

ACTIVATIONS: dict[Activation, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "softmax": lambda: nn.Softmax(dim=1),
}


Load: TypeAlias = Callable[[Path, Mapping[str, Any], torch.dtype], Any]
# Whatever config.json asks for.
PLAIN = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}


class Reference:
    """Encoder, pooling and readouts in eager PyTorch; of a classifier the class that transformers has for all of it."""

    def __init__(
        self, directory: Path, readouts: Sequence[Readout], pooling: Pooling, dtype: torch.dtype = torch.float32
    ) -> None:
        """Load the checkpoints in `dtype`; raises CheckpointError where transformers would leave a layer random."""
        self.encoder, self.pooling = load_encoder(directory, dtype), pooling
        self.scorers = [
            _Head(readout, pooling, dtype)
            if readout.checkpoint is None
            else _Classifier(readout, readout.checkpoint, dtype)
            for readout in readouts
        ]

    @torch.inference_mode()
    def run(self, tokens: TokenBatch) -> Expected:
        """Embed and score every document of `tokens`."""
        rows = [
            self._run(torch.from_numpy(ids.astype(np.int64))[None])
            for ids in np.split(tokens.ids, tokens.offsets[1:-1])
        ]
        embeddings, scores = (torch.cat(parts).float().numpy() for parts in zip(*rows, strict=True))
        return Expected(embeddings, scores)

    def _run(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embedding [1, D] and scores [1, H] of one document [1, L]."""
        hidden = self.encoder(input_ids=ids, **PLAIN).last_hidden_state
        embedding = nn.functional.normalize(_pool(hidden, self.pooling), dim=1)
        return embedding, torch.cat([embedding[:, :0], *(scorer(ids, hidden) for scorer in self.scorers)], dim=1)


class _Head:
    """A readout on the encoder's states."""

    def __init__(self, readout: Readout, pooling: Pooling, dtype: torch.dtype) -> None:
        self._pooling, self._normalize = readout.pooling or pooling, readout.normalize
        self._module = head_module(readout).to(dtype)

    def __call__(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        pooled = _pool(hidden, self._pooling)
        found: torch.Tensor = self._module(nn.functional.normalize(pooled, dim=1) if self._normalize else pooled)
        return found


class _Classifier:
    """A whole classifier of its own; only the activation that was asked for is added."""

    def __init__(self, readout: Readout, directory: Path, dtype: torch.dtype) -> None:
        self._model, self._activation = load_classifier(directory, dtype), readout.layers[-1].activation

    def __call__(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        logits: torch.Tensor = self._model(input_ids=ids, **PLAIN).logits
        return logits if self._activation is None else ACTIVATIONS[self._activation]()(logits)


def _pool(hidden: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    return hidden[:, 0] if pooling == "cls" else hidden.mean(1)


def load_encoder(directory: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The checkpoint's transformers class, without remote code; raises CheckpointError for a random layer."""
    config = read_config(directory)
    layout = "jina-embeddings-v3" if is_jina_v3(config) else config.get("model_type")
    return _loaded(directory, config, dtype, LOADERS.get(str(layout), partial(_load_auto, AutoModel)))


def load_classifier(directory: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The sequence classifier's transformers class; raises CheckpointError for a random layer."""
    config = read_config(directory)
    load = partial(_load_auto, AutoModelForSequenceClassification)
    if config.get("model_type") == "new":
        load = partial(_load_new, GteForSequenceClassification)
    return _loaded(directory, config, dtype, load)


def _loaded(directory: Path, config: Mapping[str, Any], dtype: torch.dtype, load: Load) -> nn.Module:
    try:
        model: nn.Module = load(directory, config, dtype)
    except EngineError:
        raise
    except Exception as error:  # of its checks of config.json, of torch, of a missing class: they share none
        own = " without code of its repository" if config.get("auto_map") else ""
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CheckpointError(
            f"{directory}: transformers cannot load model_type {config.get('model_type')!r}{own}, so there is no "
            f"reference to certify a graph against ({what})"
        ) from error
    # Chunks of the feed-forward layers change no result, and fail for lengths that they do not divide.
    for module in model.modules():
        if hasattr(module, "chunk_size_feed_forward"):
            vars(module)["chunk_size_feed_forward"] = 0
    return model.eval()


def _load_auto(kind: Any, directory: Path, config: Mapping[str, Any], dtype: torch.dtype) -> Any:  # noqa: ARG001
    """What transformers has for the checkpoint, of the auto class `kind`."""
    model, report = kind.from_pretrained(
        directory, dtype=dtype, attn_implementation="sdpa", output_loading_info=True, local_files_only=True,
        trust_remote_code=False,
    )  # fmt: skip
    _check(directory, report, kind is AutoModel)
    return model


def _load_new(kind: Any, directory: Path, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """GteModel, or the classifier around it, with the frequencies of new-impl's NTKScalingRotaryEmbedding, in fp32."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta"))
    inner = "" if kind is GteModel else "gte."
    state = {_renamed(name, inner): read() for name, read in open_tensors(directory).items()}
    native = _native(GteConfig, config, theta)
    native.id2label = {int(i): str(label) for i, label in (config.get("id2label") or native.id2label).items()}
    model = _load_state(directory, kind, native, state, dtype)
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling not in ("default", "ntk"):
        raise CheckpointError(
            f"{directory}: the PyTorch reference supports the RoPE types 'default' and 'ntk', found {scaling!r}"
        )
    if scaling == "ntk":
        dim, factor = config["hidden_size"] // config["num_attention_heads"], rope["factor"]
        frequencies = 1.0 / ((theta * factor) ** (torch.arange(0, dim, 2).float() / dim))
        encoder = model if kind is GteModel else model.gte
        encoder.rotary_emb.inv_freq = frequencies / factor ** (2 / dim)
    return model


def _renamed(name: str, inner: str) -> str:
    """The encoder's tensors begin with `new.` where there is a head beside it, and are given with `inner` instead."""
    if name.startswith("new."):
        return inner + name.removeprefix("new.")
    return name if name.startswith("classifier.") else inner + name


def _load_jina_v3(directory: Path, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """JinaEmbeddingsV3Model, which has no adapters, with LORA_TASK's added to what each layer computes."""
    state = {name.removeprefix("roberta."): read() for name, read in open_tensors(directory).items()}
    inner = ".parametrizations.weight.0.lora_"
    factors = {name: state.pop(name) for name in sorted(state) if inner in name}
    state = {name.replace(".parametrizations.weight.original", ".weight"): value for name, value in state.items()}
    native = _native(JinaEmbeddingsV3Config, config, config["rotary_emb_base"])
    model = _load_state(directory, JinaEmbeddingsV3Model, native, state, dtype)
    task, scale = config["lora_adaptations"].index(LORA_TASK), config["lora_alpha"] / config["lora_rank"]
    for name in factors:
        layer, _, factor = name.partition(inner)
        if factor == "A" and not layer.startswith("pooler."):
            a, b = (factors[f"{layer}{inner}{key}"][task].to(dtype) for key in "AB")
            _adapt(model, layer, a, b, scale)
    return model


# Of layouts that AutoModel cannot load, by model_type, which Jina's shares with XLM-R.
LOADERS: dict[str, Load] = {
    "new": partial(_load_new, GteModel),
    "jina-embeddings-v3": _load_jina_v3,
}


def _adapt(model: nn.Module, layer: str, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    """Add scale (x A^T) B^T to the layer that is published as `layer`; for an embedding table scale A[id] B."""
    if layer.startswith("embeddings."):
        model.get_submodule(layer).register_forward_hook(lambda _, args, y: y + scale * (a[args[0]] @ b))
        return
    path, _, name = layer.removeprefix("encoder.").rpartition(".")
    path = path.replace(".mixer", ".self_attn")
    parts = {"Wqkv": ("q_proj", "k_proj", "v_proj"), "out_proj": ("o_proj",)}.get(name, (name,))
    for part, rows in zip(parts, b.chunk(len(parts)), strict=True):
        model.get_submodule(f"{path}.{part}").register_forward_hook(
            lambda _, args, y, rows=rows: y + scale * ((args[0] @ a.T) @ rows.T)
        )


def _native(kind: Any, config: Mapping[str, Any], theta: Any) -> Any:
    """The published shape as the config of a native class."""
    same = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
        "max_position_embeddings", "type_vocab_size", "layer_norm_eps", "pad_token_id",
    )  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": float(theta)}
    return kind(**{key: config[key] for key in same if key in config}, rope_parameters=rope)


def _load_state(directory: Path, kind: Any, config: Any, state: dict[str, torch.Tensor], dtype: torch.dtype) -> Any:
    """A native class with all of `state`; transformers renames the tensors of the published layout itself."""
    model, report = kind.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
    )
    outside = ("pooler.", "classifier.", "lm_head.")
    if lost := sorted(key for key in report["unexpected_keys"] if not key.startswith(outside)):
        raise CheckpointError(f"{directory}: {kind.__name__} has no place for {', '.join(lost)}")
    _check(directory, report, not kind.__name__.endswith("ForSequenceClassification"))
    return model


def _check(directory: Path, report: Mapping[str, Any], is_encoder: bool) -> None:
    # The pooler of BERT feeds no output of the encoder that is used here.
    random = [key for key in report["missing_keys"] if not (is_encoder and key.startswith("pooler."))]
    if random or report["mismatched_keys"]:
        raise CheckpointError(
            f"{directory}: transformers finds no weights for {random or report['mismatched_keys']}; "
            "the PyTorch reference would be random there"
        )


def head_module(readout: Readout) -> nn.Sequential:
    """The layers of `readout`, pooled vectors [B, D] to scores [B, outputs], fp32."""
    modules: list[nn.Module] = []
    for layer in readout.layers:
        weight, bias = layer.linear.weight, layer.linear.bias
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        module.weight.data = torch.from_numpy(weight)
        if bias is not None:
            module.bias.data = torch.from_numpy(bias)
        modules.append(module)
        if layer.activation is not None:
            modules.append(ACTIVATIONS[layer.activation]())
        if layer.norm is not None and layer.norm_epsilon is not None:
            norm = nn.LayerNorm(len(weight), eps=layer.norm_epsilon)
            norm.weight.data, norm.bias.data = map(torch.from_numpy, (layer.norm.weight, layer.norm.bias))
            modules.append(norm)
    return nn.Sequential(*modules)
