"""Tiny models of every family, built in code, with real tokenizers and real Lightning checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from jql_engine.bundle import Bundle
from jql_engine.engine import Engine
from jql_engine.errors import DeviceError
from jql_engine.sessions.devices import every_gpu, gpu_without_driver
from jql_export.bundle import Checkpoint, export_bundle
from jql_export.families.read import read_encoder
from jql_export.readouts.head_file import read_head
from jql_export.variants import VARIANTS
from tests.inputs import train_unigram

warnings.filterwarnings("ignore", module="lightning")

MAX_TOKENS = 96
FAMILIES = ("gte", "bert", "xlm-roberta")


def _has_gpu() -> bool:
    with suppress(DeviceError):
        return bool(every_gpu("cuda"))
    return False


HAS_GPU = _has_gpu()
without_gpu = pytest.mark.skipif(HAS_GPU or gpu_without_driver() is not None, reason="this machine has an NVIDIA GPU")
# Variants that ONNX Runtime's CPU provider can run.
ON_CPU = [name for name, kind in VARIANTS.items() if kind.provider in ("cpu", "any")]
POOLING = {"gte": "cls", "bert": "mean", "xlm-roberta": "cls"}


def write_tokenizer(folder: Path) -> int:
    """A Unigram tokenizer in XLM-R's layout, trained on the probe sentences; returns the vocabulary size."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    space = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), space])
    train_unigram(tokenizer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer.get_vocab_size()


def write_encoder(folder: Path, family: str, **settings: object) -> Path:
    """A two-layer encoder of `family` with weights wide enough that every part of it matters."""
    import transformers

    vocab_size = write_tokenizer(folder)
    shape = {
        "vocab_size": vocab_size, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "pad_token_id": 1, "initializer_range": 0.2,
    } | settings  # fmt: skip
    torch.manual_seed(0)
    if family == "gte":
        config = transformers.GteConfig(**{"max_position_embeddings": MAX_TOKENS, **shape})
        model = transformers.GteModel(config)
    elif family == "bert":
        config = transformers.BertConfig(**{"max_position_embeddings": MAX_TOKENS, **shape})
        model = transformers.BertModel(config)
    else:
        assert family == "xlm-roberta", family  # positions start at pad + 1
        config = transformers.XLMRobertaConfig(**{"max_position_embeddings": MAX_TOKENS + 2, **shape})
        model = transformers.XLMRobertaModel(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0, 0.3)
            elif weight.ndim == 1:
                weight.normal_(1, 0.2)
    model.save_pretrained(folder)
    return folder


def write_head(file: Path, input_size: int = 32, hidden_size: int = 16, seed: int = 0) -> Path:
    """A regression head as Lightning itself saves one."""
    import lightning

    class RegressionHead(lightning.LightningModule):
        def __init__(self, input_dim: int, hidden_dim: int) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.layer1, self.layer2 = torch.nn.Linear(input_dim, hidden_dim), torch.nn.Linear(hidden_dim, 1)

        def training_step(self, batch, _):
            return self.layer2(torch.relu(self.layer1(batch))).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    torch.manual_seed(seed)
    head = RegressionHead(input_size, hidden_size)
    with torch.no_grad():
        for weight in head.parameters():
            weight.normal_(0, 1)
    off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    trainer = lightning.Trainer(max_steps=1, accelerator="cpu", **dict.fromkeys(off, False))
    trainer.fit(head, torch.utils.data.DataLoader(torch.randn(4, input_size), batch_size=4))
    trainer.save_checkpoint(file)
    return file


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint directory of each family."""
    root = tmp_path_factory.mktemp("encoders")
    return {family: write_encoder(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="session")
def head_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two heads of different hidden sizes."""
    root = tmp_path_factory.mktemp("heads")
    return {
        "edu": write_head(root / "edu.ckpt", hidden_size=16, seed=1),
        "prose": write_head(root / "prose.ckpt", hidden_size=24, seed=2),
    }


def export(encoder: Path, heads: dict[str, Path], out: Path, variants: Sequence[str] = ("cpu-fp32",)) -> Bundle:
    """Export a tiny checkpoint."""
    family = read_encoder(encoder).spec.architecture
    read = [read_head(name, file) for name, file in heads.items()]
    return export_bundle(Checkpoint(encoder, encoder.name, None), read, out, POOLING[family], MAX_TOKENS, variants)


@pytest.fixture(scope="session")
def bundles(encoders, head_files, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """A bundle of each family with both dialects; tests must not change it."""
    root = tmp_path_factory.mktemp("bundles")
    variants = ("cpu-fp32", "standard-fp32")
    return {family: export(encoders[family], head_files, root / family, variants) for family in FAMILIES}


@pytest.fixture(scope="session")
def bundle(bundles) -> Bundle:
    """The GTE bundle."""
    return bundles["gte"]


@pytest.fixture(scope="session")
def engine(bundle) -> Engine:
    """An engine on the GTE bundle, on the CPU."""
    return Engine(bundle.path, device="cpu")


@pytest.fixture(scope="session")
def padded(bundle) -> Engine:
    """The same with a graph that takes padded batches."""
    return Engine(bundle.path, device="cpu", variant="standard-fp32")
