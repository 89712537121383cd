"""Bundles with the graphs alone, without a run of PyTorch that would certify them; and two published shapes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from jql_engine.bundle import MANIFEST, PROBES, READOUTS, Bundle, Manifest, Pooling, Variant, describe_files
from jql_export.families.base import EncoderWeights
from jql_export.families.read import read_encoder
from jql_export.graph.encoder import write_graph
from jql_export.readouts.base import Readout, write_readouts
from jql_export.readouts.head_file import jql_head
from jql_export.tensors import Linear
from jql_export.variants import VARIANTS
from tests.conftest import write_encoder, write_tokenizer
from tests.export.test_modernbert import write_modernbert

CUDA = tuple(name for name, kind in VARIANTS.items() if kind.provider == "cuda")
SNOWFLAKE = {
    "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 8192,
    "initializer_range": 0.02,
}  # fmt: skip
MODERNBERT_BASE = {
    "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 1152, "max_position_embeddings": 8192,
    "local_attention": 128, "initializer_range": 0.02,
}  # fmt: skip


def write_bundle(
    folder: Path,
    weights: EncoderWeights,
    heads: Sequence[Readout],
    pooling: Pooling,
    manifest: Manifest,
    variants: Sequence[str] = CUDA,
) -> Bundle:
    """What export would write of some variants; the rest of `manifest` is as it was."""
    (folder / "graphs").mkdir(parents=True)
    kinds = {name: VARIANTS[name] for name in variants}
    for kind in kinds.values():
        write_graph(folder / "graphs" / kind.graph, weights, heads, pooling, kind.dialect())
    write_readouts(folder / READOUTS, heads)
    if not (folder / "tokenizer.json").exists():
        write_tokenizer(folder)
    if not (folder / PROBES).exists():
        (folder / PROBES).touch()  # what these bundles are for computes no scores
    described = {
        name: Variant(f"graphs/{k.graph}", k.layout, k.precision, k.provider, {}, {}) for name, k in kinds.items()
    }
    encoder = replace(manifest.encoder, hidden_size=weights.spec.hidden_size, layers=len(weights.layers))
    written = replace(manifest, encoder=encoder, pooling=pooling, variants=described, files=describe_files(folder))
    (folder / MANIFEST).write_text(written.to_json())
    return Bundle.open(folder)


def write_snowflake(folder: Path, manifest: Manifest, variants: Sequence[str], n_layers: int = 2) -> Bundle:
    """A bundle whose graphs have the shape of snowflake-arctic-embed-m-v2.0, with fewer layers and words."""
    checkpoint = write_encoder(folder / "encoder", "gte", num_hidden_layers=n_layers, **SNOWFLAKE)
    return _write_wide(folder, checkpoint, "cls", manifest, variants)


def write_modernbert_base(folder: Path, manifest: Manifest, variants: Sequence[str]) -> Bundle:
    """A bundle whose graphs have the shape of ModernBERT-base, with four layers, of which two have windows."""
    checkpoint = write_modernbert(folder / "encoder", num_hidden_layers=4, **MODERNBERT_BASE)
    return _write_wide(folder, checkpoint, "mean", manifest, variants)


def _write_wide(
    folder: Path, checkpoint: Path, pooling: Pooling, manifest: Manifest, variants: Sequence[str]
) -> Bundle:
    weights = read_encoder(checkpoint)
    (folder / "bundle").mkdir()
    shutil.copy(checkpoint / "tokenizer.json", folder / "bundle")
    rng = np.random.default_rng(0)
    heads = [jql_head(name, _linear(rng, 1000, 768), _linear(rng, 1, 1000), "") for name in ("edu", "prose")]
    return write_bundle(folder / "bundle", weights, heads, pooling, replace(manifest, max_tokens=8192), variants)


def _linear(rng: np.random.Generator, n_out: int, n_in: int) -> Linear:
    return Linear(rng.normal(0, 0.1, (n_out, n_in)).astype(np.float32), np.zeros(n_out, np.float32))
