"""Sequence classifiers in the shapes of published ones, with random weights and a tokenizer of the published kind.

Weights are drawn wide enough that attention chooses and every bias counts. The last layer looks where texts differ, so
that the logits of real texts have a mean of 0 and a standard deviation of 1: FineWeb-Edu's scores run from 0 to 5. A
vocabulary that is trained on a small corpus has fewer pieces than the published one; the table of the words is as
large.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.vocabularies import write_vocabulary

MODERNBERT = {
    "vocab_size": 50368, "hidden_size": 768, "intermediate_size": 1152, "num_hidden_layers": 22,
    "num_attention_heads": 12, "max_position_embeddings": 8192, "local_attention": 128, "classifier_pooling": "mean",
}  # fmt: skip
BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
SPREAD = 0.03  # of weights: half as much again as what training begins with
SPREAD_OF_BIASES = 0.1
SETTINGS = "tokenizer_config.json"
N_CALIBRATION, CALIBRATION_TOKENS = 32, 128


@dataclass(frozen=True, slots=True)
class Shape:
    """A published shape, and of which kind and size its vocabulary is."""

    kind: str  # of transformers: Bert, ...
    vocabulary: str
    pieces: int  # with special tokens
    max_tokens: int
    config: Mapping[str, Any] = field(default_factory=dict)


SHAPES = {
    "bert-base": Shape(
        "Bert", "wordpiece-uncased", 30522, 512, {**BASE, "vocab_size": 30522, "max_position_embeddings": 512}
    ),
    "xlmr-base": Shape(
        "XLMRoberta", "unigram", 32000, 512,
        {**BASE, "vocab_size": 250002, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    ),
    "gte-base": Shape(
        "Gte", "unigram", 32000, 8192,
        {**BASE, "vocab_size": 250048, "max_position_embeddings": 8192, "type_vocab_size": 1,
         "rope_parameters": {"rope_type": "default", "rope_theta": 160000.0}},
    ),
    "modernbert-base": Shape("ModernBert", "bytes", 50285, 8192, MODERNBERT),
    "modernbert-large": Shape(
        "ModernBert", "bytes", 50285, 8192,
        {**MODERNBERT, "hidden_size": 1024, "intermediate_size": 2624, "num_hidden_layers": 28,
         "num_attention_heads": 16},
    ),
    "mmbert-base": Shape(
        "ModernBert", "gemma", 64000, 8192,
        {**MODERNBERT, "vocab_size": 256000, "global_rope_theta": 160000.0, "local_rope_theta": 160000.0},
    ),
}  # fmt: skip


def write_classifier(
    folder: Path,
    shape: Shape,
    texts: Sequence[str],
    *,
    n_labels: int = 1,
    vocabulary: Path | None = None,
    seed: int = 0,
) -> None:
    """A checkpoint as transformers saves it; `vocabulary`: the folder of a tokenizer to copy, else one is trained."""
    folder.mkdir(parents=True)
    if vocabulary is None:
        write_vocabulary(folder, shape.vocabulary, texts, shape.pieces, shape.max_tokens)
    else:
        shutil.copy(vocabulary / "tokenizer.json", folder)
        settings = json.loads((vocabulary / SETTINGS).read_text(encoding="utf-8"))
        (folder / SETTINGS).write_text(json.dumps(settings | {"model_max_length": shape.max_tokens}), encoding="utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    config = getattr(transformers, f"{shape.kind}Config")(
        **shape.config,
        **_special_ids(tokenizer),
        initializer_range=SPREAD,
        num_labels=n_labels,
    )
    model = getattr(transformers, f"{shape.kind}ForSequenceClassification")(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0, SPREAD_OF_BIASES)
        _aim(model, tokenizer, texts)
    model.save_pretrained(folder)


def _special_ids(tokenizer: Any) -> dict[str, int]:
    ids = {"pad_token_id": tokenizer.pad_token_id, "cls_token_id": tokenizer.cls_token_id}
    ids |= {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    return ids | {"sep_token_id": tokenizer.sep_token_id}


def _aim(model: Any, tokenizer: Any, texts: Sequence[str]) -> None:
    """Let the last layer look along the directions in which some of the texts differ most, one for each label.

    A random direction would see little but rounding errors: a learned one does not look there either.
    """
    last = model.classifier.out_proj if hasattr(model.classifier, "out_proj") else model.classifier
    pooled: list[torch.Tensor] = []
    hook = last.register_forward_hook(lambda _, args, __: pooled.append(args[0]))
    longest = min(CALIBRATION_TOKENS, tokenizer.model_max_length)
    for text in texts[:: max(1, len(texts) // N_CALIBRATION)][:N_CALIBRATION]:
        model(input_ids=tokenizer(text, truncation=True, max_length=longest, return_tensors="pt")["input_ids"])
    hook.remove()
    vectors = torch.cat(pooled)
    _, scales, directions = torch.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    deviations = scales[: model.config.num_labels, None] / len(vectors) ** 0.5
    last.weight.copy_(directions[: model.config.num_labels] / deviations)
    last.bias.copy_(-last.weight @ vectors.mean(0))
