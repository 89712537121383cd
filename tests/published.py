"""What models on the hub say in config.json and which tensors they hold.

Every key is as published; SMALL is what write_model takes instead. The comments say what was seen: nothing could be
downloaded where this was written, so the files were read in public copies of their pages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests import published_layouts as layout
from tests.published_layouts import Config, Shapes

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 4}

BERT = {
    "model_type": "bert", "attention_probs_dropout_prob": 0.1, "classifier_dropout": None,
    "gradient_checkpointing": False, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768,
    "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-12, "max_position_embeddings": 512,
    "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0, "position_embedding_type": "absolute",
    "torch_dtype": "float32", "type_vocab_size": 2, "use_cache": True, "vocab_size": 30522,
}  # fmt: skip
E5_SMALL = {"hidden_size": 384, "intermediate_size": 1536, "vocab_size": 250037}
XLM_R = {
    "model_type": "xlm-roberta", "attention_probs_dropout_prob": 0.1, "bos_token_id": 0, "classifier_dropout": None,
    "eos_token_id": 2, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02,
    "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 514, "num_attention_heads": 12,
    "num_hidden_layers": 12, "output_past": True, "pad_token_id": 1, "position_embedding_type": "absolute",
    "torch_dtype": "float32", "type_vocab_size": 1, "use_cache": True, "vocab_size": 250002,
}  # fmt: skip
XLM_R_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
CODE = "Alibaba-NLP/new-impl--"
NEW = {
    "model_type": "new", "attention_probs_dropout_prob": 0.0,
    "auto_map": {
        "AutoConfig": f"{CODE}configuration.NewConfig", "AutoModel": f"{CODE}modeling.NewModel",
        "AutoModelForSequenceClassification": f"{CODE}modeling.NewForSequenceClassification",
    },
    "classifier_dropout": None, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768,
    "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-12, "layer_norm_type": "layer_norm",
    "logn_attention_clip1": False, "logn_attention_scale": False, "max_position_embeddings": 8192,
    "num_attention_heads": 12, "num_hidden_layers": 12, "pack_qkv": True, "position_embedding_type": "rope",
    "torch_dtype": "float32", "unpad_inputs": False, "use_memory_efficient_attention": False,
}  # fmt: skip
GTE_ENGLISH = {
    "pad_token_id": 0, "rope_scaling": {"factor": 2.0, "type": "ntk"}, "rope_theta": 500000, "type_vocab_size": 0,
    "vocab_size": 30528,
}  # fmt: skip
GTE_MULTILINGUAL = {
    "pad_token_id": 1, "rope_scaling": {"factor": 8.0, "type": "ntk"}, "rope_theta": 20000, "type_vocab_size": 1,
    "vocab_size": 250048,
}  # fmt: skip
OWN_CODE = {
    **NEW["auto_map"], "AutoConfig": "configuration.NewConfig",
    "AutoModelForSequenceClassification": "modeling.NewForSequenceClassification",
}  # fmt: skip
MODERNBERT = {
    "model_type": "modernbert", "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 50281,
    "classifier_activation": "gelu", "classifier_bias": False, "classifier_dropout": 0.0, "classifier_pooling": "mean",
    "cls_token_id": 50281, "decoder_bias": True, "deterministic_flash_attn": False, "embedding_dropout": 0.0,
    "eos_token_id": 50282, "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0,
    "gradient_checkpointing": False, "hidden_activation": "gelu", "hidden_size": 768, "initializer_cutoff_factor": 2.0,
    "initializer_range": 0.02, "intermediate_size": 1152, "layer_norm_eps": 1e-05, "local_attention": 128,
    "local_rope_theta": 10000.0, "max_position_embeddings": 8192, "mlp_bias": False, "mlp_dropout": 0.0,
    "norm_bias": False, "norm_eps": 1e-05, "num_attention_heads": 12, "num_hidden_layers": 22, "pad_token_id": 50283,
    "position_embedding_type": "absolute", "sep_token_id": 50282, "torch_dtype": "float32", "vocab_size": 50368,
}  # fmt: skip
MODERNBERT_LARGE = {
    "hidden_size": 1024, "intermediate_size": 2624, "num_attention_heads": 16, "num_hidden_layers": 28,
}  # fmt: skip
MMBERT = {
    "bos_token_id": 2, "cls_token_id": 1, "eos_token_id": 1, "global_rope_theta": 160000, "local_rope_theta": 160000,
    "mask_token_id": 4, "pad_token_id": 0, "position_embedding_type": "sans_pos", "sep_token_id": 1,
    "vocab_size": 256000,
}  # fmt: skip
SPARSE = {"repad_logits_with_grad": False, "sparse_pred_ignore_index": -100, "sparse_prediction": False}
ROPE_OF_V5 = {
    "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 160000.0} for kind in ("full_attention", "sliding_attention")
    }
}
REGRESSION = {"problem_type": "regression"}
THREE_INTEGERS = {
    "id2label": {"0": 0, "1": 1, "2": 2}, "label2id": {"0": "0", "1": "1", "2": "2"},
    "problem_type": "single_label_classification",
}  # fmt: skip
ONE_LABEL = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
TOPICS = (
    "Adult", "Art & Design", "Software Dev.", "Crime & Law", "Education & Jobs", "Hardware", "Entertainment",
    "Social Life", "Fashion & Beauty", "Finance & Business", "Food & Dining", "Games", "Health", "History",
    "Home & Hobbies", "Industrial", "Literature", "Politics", "Religion", "Science & Tech.", "Software",
    "Sports & Fitness", "Transportation", "Travel",
)  # fmt: skip
DOMAINS = (
    "Adult", "Arts_and_Entertainment", "Autos_and_Vehicles", "Beauty_and_Fitness", "Books_and_Literature",
    "Business_and_Industrial", "Computers_and_Electronics", "Finance", "Food_and_Drink", "Games", "Health",
    "Hobbies_and_Leisure", "Home_and_Garden", "Internet_and_Telecom", "Jobs_and_Education", "Law_and_Government",
    "News", "Online_Communities", "People_and_Society", "Pets_and_Animals", "Real_Estate", "Science",
    "Sensitive_Subjects", "Shopping", "Sports", "Travel_and_Transportation",
)  # fmt: skip


def labels(names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    return {"id2label": {str(i): n for i, n in enumerate(names)}, "label2id": {n: i for i, n in enumerate(names)}}


@dataclass(frozen=True, slots=True)
class Published:
    """One model: its config, and the shapes of its tensors by name."""

    config: Config
    shapes: Callable[[Config], Shapes]
    file: str = "model.safetensors"
    megabytes: int | None = None  # of the published file, where its size was seen

    @property
    def is_classifier(self) -> bool:
        return self.config["architectures"][0].endswith("ForSequenceClassification")


def model(kind: str, *parts: Config, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {"architectures": [kind]}
    for part in (*parts, changes):
        config |= part
    return config


CLASSIFIER = "ForSequenceClassification"
BERT_CLASSIFIER = model(f"Bert{CLASSIFIER}", BERT)
MODERNBERT_CLASSIFIER = model(f"ModernBert{CLASSIFIER}", MODERNBERT, SPARSE)
MODERNBERT_MASKED = model("ModernBertForMaskedLM", MODERNBERT, tie_word_embeddings=True)
MODELS = {
    # Config seen whole, in an ONNX copy of the repository.
    "HuggingFaceFW/fineweb-edu-classifier": Published(
        BERT_CLASSIFIER | ONE_LABEL | REGRESSION | {"classifier_dropout": 0.0, "hidden_dropout_prob": 0.0},
        layout.bert_classifier,
        megabytes=438,
    ),
    # Config not seen: the card names BERT, arctic-embed-m (seen whole) as its base, and one score.
    "nvidia/nemocurator-fineweb-nemotron-4-edu-classifier": Published(
        BERT_CLASSIFIER | ONE_LABEL, layout.bert_classifier
    ),
    # Seen whole. XLM-R's vocabulary in BERT's layout.
    "agentlans/multilingual-e5-small-domain-classifier": Published(
        BERT_CLASSIFIER
        | E5_SMALL
        | labels(DOMAINS)
        | {"bos_token_id": 0, "eos_token_id": 2, "dtype": "float32", "finetuning_task": "text-classification"},
        layout.bert_classifier,
    ),
    # Seen up to label2id; what follows it is that of gte-base-en-v1.5, its base, seen whole. FormatClassifier and the
    # two without URL have the same architecture and 24 labels of their own, not seen.
    "WebOrganizer/TopicClassifier": Published(
        model(f"New{CLASSIFIER}", NEW, GTE_ENGLISH, labels(TOPICS), auto_map=OWN_CODE),
        layout.new_classifier,
        megabytes=550,
    ),
    # Seen up to transformers_version; 70 languages have one each.
    "HuggingFaceFW/finepdfs_edu_classifier_tam_Taml": Published(
        MODERNBERT_CLASSIFIER | MMBERT | ONE_LABEL | REGRESSION | {"dtype": "float32"}, layout.modernbert_classifier
    ),
    # Config not seen: the card names ModernBERT-large; the size is that of another classifier on it.
    "HuggingFaceFW/finepdfs_edu_classifier_eng_Latn": Published(
        MODERNBERT_CLASSIFIER | MODERNBERT_LARGE | ONE_LABEL | REGRESSION,
        layout.modernbert_classifier,
        megabytes=1583,
    ),
    # Seen whole: labels that are integers. The size is that of another classifier on ModernBERT-base.
    "MichaelKont/modernbert-llm-router": Published(
        MODERNBERT_CLASSIFIER | THREE_INTEGERS | {"reference_compile": False},
        layout.modernbert_classifier,
        megabytes=598,
    ),
    # Seen whole.
    "BAAI/bge-reranker-v2-m3": Published(
        model(f"XLMRoberta{CLASSIFIER}", XLM_R, XLM_R_LARGE, ONE_LABEL, max_position_embeddings=8194),
        layout.xlm_r_classifier,
    ),
    # Not seen: as bge-reranker-base, which was made of it and was seen whole. The encoder of FineWeb2-HQ's heads.
    "FacebookAI/xlm-roberta-base": Published(model("XLMRobertaForMaskedLM", XLM_R), layout.xlm_r_masked),
    # Seen whole, in fine-tuned copies.
    "intfloat/multilingual-e5-base": Published(model("XLMRobertaModel", XLM_R), layout.bert_with_pooler),
    # Seen whole.
    "intfloat/multilingual-e5-small": Published(
        model("BertModel", BERT, E5_SMALL, tokenizer_class="XLMRobertaTokenizer"), layout.bert_with_pooler
    ),
    # Seen whole.
    "Snowflake/snowflake-arctic-embed-m": Published(model("BertModel", BERT), layout.bert_with_pooler),
    # Seen whole, at the revision with model_type `new`; later ones say `gte`.
    "Snowflake/snowflake-arctic-embed-m-v2.0": Published(
        model("NewModel", NEW, GTE_MULTILINGUAL, classifier_dropout=0.1, rope_scaling=None, rope_theta=160000),
        layout.new,
    ),
    # Seen but for its last lines, in fine-tuned copies.
    "Alibaba-NLP/gte-multilingual-base": Published(
        model("NewModel", NEW, GTE_MULTILINGUAL, ONE_LABEL, classifier_dropout=0.0, torch_dtype="float16"),
        layout.new_for_tokens,
    ),
    # Seen whole: no types of tokens at all.
    "Alibaba-NLP/gte-base-en-v1.5": Published(model("NewModel", NEW, GTE_ENGLISH), layout.new),
    # Seen whole.
    "answerdotai/ModernBERT-base": Published(MODERNBERT_MASKED, layout.modernbert_masked),
    # Seen whole, at an early revision, which says 512 positions.
    "answerdotai/ModernBERT-large": Published(MODERNBERT_MASKED | MODERNBERT_LARGE, layout.modernbert_masked),
    # Seen whole for mmBERT-small; the base's width is on its card. A .bin, as the card of its migrated copy says.
    "jhu-clsp/mmBERT-base": Published(
        MODERNBERT_MASKED | MMBERT, layout.modernbert_masked_tied, file="pytorch_model.bin"
    ),
    # Seen whole, as transformers 5 writes it.
    "datalama/mmBERT-small": Published(
        MODERNBERT_MASKED | MMBERT | ROPE_OF_V5 | {"hidden_size": 384, "num_attention_heads": 6},
        layout.modernbert_masked_tied,
    ),
    # Seen in a fine-tuned copy. No prefix before its tensors.
    "Alibaba-NLP/gte-modernbert-base": Published(
        model("ModernBertModel", MODERNBERT, SPARSE, reference_compile=False), layout.modernbert
    ),
    # Config not seen: reports on it say ModernBERT with 22 layers of 768, those on its multilingual siblings SiLU.
    "ibm-granite/granite-embedding-english-r2": Published(
        model("ModernBertModel", MODERNBERT, SPARSE, hidden_activation="silu"), layout.modernbert
    ),
}


def write_model(folder: Path, name: str, leave_out: Collection[str] = (), **changes: Any) -> dict[str, Any]:
    """A checkpoint like the published one, but SMALL, with random weights in the published type; returns its config."""
    published = MODELS[name]
    config = {**published.config, **SMALL, **changes}
    dtype = getattr(torch, config["torch_dtype"])
    generator = torch.Generator().manual_seed(7)
    state = {}
    for key, shape in published.shapes(config).items():
        if key.endswith("position_ids"):
            state[key] = torch.arange(shape[1])[None]
            continue
        centre = 1.0 if len(shape) == 1 and key.endswith("weight") else 0.0
        state[key] = (centre + 0.3 * torch.randn(shape, generator=generator)).to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({key: config[key] for key in config if key not in leave_out}))
    if published.file.endswith(".bin"):
        torch.save(state, folder / published.file)
    else:
        save_file(state, folder / published.file, metadata={"format": "pt"})
    return config
