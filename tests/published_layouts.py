"""How the classes of models on the hub name their tensors, and of what shapes they are; tests/published.py uses them.

Written after the published classes, not after our readers. The name of a function says which class, or file, it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]


def linear(name: str, n_in: int, n_out: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (n_out, n_in)} | ({f"{name}.bias": (n_out,)} if bias else {})


def norm(name: str, size: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (size,)} | ({f"{name}.bias": (size,)} if bias else {})


def bert(c: Config, prefix: str = "") -> Shapes:
    """Of BERT and XLM-R: embeddings, layers, and the pooler, which is stored with every encoder."""
    d, f, name = c["hidden_size"], c["intermediate_size"], f"{prefix}embeddings"
    shapes: Shapes = {
        f"{name}.word_embeddings.weight": (c["vocab_size"], d),
        f"{name}.position_embeddings.weight": (c["max_position_embeddings"], d),
        f"{name}.token_type_embeddings.weight": (c["type_vocab_size"], d),
        **norm(f"{name}.LayerNorm", d),
    }
    for layer in (f"{prefix}encoder.layer.{i}" for i in range(c["num_hidden_layers"])):
        for part in ("query", "key", "value"):
            shapes |= linear(f"{layer}.attention.self.{part}", d, d)
        shapes |= linear(f"{layer}.attention.output.dense", d, d) | norm(f"{layer}.attention.output.LayerNorm", d)
        shapes |= linear(f"{layer}.intermediate.dense", d, f) | linear(f"{layer}.output.dense", f, d)
        shapes |= norm(f"{layer}.output.LayerNorm", d)
    return shapes


def bert_with_pooler(c: Config, prefix: str = "") -> Shapes:
    return bert(c, prefix) | linear(f"{prefix}pooler.dense", c["hidden_size"], c["hidden_size"])


def bert_classifier(c: Config) -> Shapes:
    return bert_with_pooler(c, "bert.") | linear("classifier", c["hidden_size"], len(c["id2label"]))


def xlm_r_classifier(c: Config) -> Shapes:
    d = c["hidden_size"]
    last = linear("classifier.out_proj", d, len(c["id2label"]))
    return bert(c, "roberta.") | linear("classifier.dense", d, d) | last


def xlm_r_masked(c: Config) -> Shapes:
    """With the buffer and the tied table that old files hold."""
    d = c["hidden_size"]
    shapes = bert_with_pooler(c, "roberta.") | {"roberta.embeddings.position_ids": (1, c["max_position_embeddings"])}
    head = {"lm_head.bias": (c["vocab_size"],), "lm_head.decoder.weight": (c["vocab_size"], d)}
    return shapes | head | linear("lm_head.dense", d, d) | norm("lm_head.layer_norm", d)


def new(c: Config, prefix: str = "") -> Shapes:
    d, f = c["hidden_size"], c["intermediate_size"]
    shapes: Shapes = {f"{prefix}embeddings.word_embeddings.weight": (c["vocab_size"], d)}
    if c["type_vocab_size"]:
        shapes[f"{prefix}embeddings.token_type_embeddings.weight"] = (c["type_vocab_size"], d)
    shapes |= norm(f"{prefix}embeddings.LayerNorm", d)
    for layer in (f"{prefix}encoder.layer.{i}" for i in range(c["num_hidden_layers"])):
        shapes |= linear(f"{layer}.attention.qkv_proj", d, 3 * d) | linear(f"{layer}.attention.o_proj", d, d)
        shapes |= linear(f"{layer}.mlp.up_gate_proj", d, 2 * f, bias=False) | linear(f"{layer}.mlp.down_proj", f, d)
        shapes |= norm(f"{layer}.attn_ln", d) | norm(f"{layer}.mlp_ln", d)
    return shapes


def new_classifier(c: Config) -> Shapes:
    d = c["hidden_size"]
    return new(c, "new.") | linear("new.pooler.dense", d, d) | linear("classifier", d, len(c["id2label"]))


def new_for_tokens(c: Config) -> Shapes:
    """As gte-multilingual-base is stored, with a head that nobody uses."""
    return new(c, "new.") | linear("classifier", c["hidden_size"], len(c["id2label"]))


def modernbert(c: Config, prefix: str = "") -> Shapes:
    d, f = c["hidden_size"], c["intermediate_size"]
    shapes: Shapes = {f"{prefix}embeddings.tok_embeddings.weight": (c["vocab_size"], d)}
    shapes |= norm(f"{prefix}embeddings.norm", d, bias=False) | norm(f"{prefix}final_norm", d, bias=False)
    for i in range(c["num_hidden_layers"]):
        layer = f"{prefix}layers.{i}"
        shapes |= norm(f"{layer}.attn_norm", d, bias=False) if i else {}
        shapes |= linear(f"{layer}.attn.Wqkv", d, 3 * d, bias=False) | linear(f"{layer}.attn.Wo", d, d, bias=False)
        shapes |= linear(f"{layer}.mlp.Wi", d, 2 * f, bias=False) | linear(f"{layer}.mlp.Wo", f, d, bias=False)
        shapes |= norm(f"{layer}.mlp_norm", d, bias=False)
    return shapes


def modernbert_head(c: Config) -> Shapes:
    return linear("head.dense", c["hidden_size"], c["hidden_size"], bias=False) | norm(
        "head.norm", c["hidden_size"], False
    )


def modernbert_classifier(c: Config) -> Shapes:
    return modernbert(c, "model.") | modernbert_head(c) | linear("classifier", c["hidden_size"], len(c["id2label"]))


def modernbert_masked(c: Config) -> Shapes:
    return modernbert(c, "model.") | modernbert_head(c) | {"decoder.bias": (c["vocab_size"],)}


def modernbert_masked_tied(c: Config) -> Shapes:
    """As a .bin holds it: the table of the decoder, which is that of the words, under its own name as well."""
    return modernbert_masked(c) | {"decoder.weight": (c["vocab_size"], c["hidden_size"])}
