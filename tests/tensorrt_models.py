"""Bundles for the TensorRT tests: the demo's real model, and Snowflake's shape with two layers and few words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from jql_engine.bundle import Bundle, Manifest, Variant, describe_files
from jql_export.checkpoint import read_encoder
from jql_export.export import Checkpoint, export_bundle
from jql_export.graph import write_graph
from jql_export.heads import StackedHeads, read_head
from jql_export.variants import VARIANTS
from tests.conftest import write_encoder

VARIANT = "tensorrt-fp16"
DEMO = Path(__file__).parent.parent / "examples" / "demo"
SNOWFLAKE = {
    "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 8192,
    "initializer_range": 0.02,
}  # fmt: skip


def export_demo(out: Path) -> Bundle:
    """The demo's bundle."""
    heads = [read_head(name, DEMO / "heads" / f"{name}.ckpt") for name in ("education", "prose")]
    return export_bundle(Checkpoint(DEMO / "encoder", "demo", None), heads, out, variants=("cpu-fp32", VARIANT))


def write_snowflake(folder: Path, manifest: Manifest) -> Bundle:
    """A bundle whose graph has the shape of snowflake-arctic-embed-m-v2.0; the rest of `manifest` is as it was."""
    weights = read_encoder(write_encoder(folder / "encoder", "gte", **SNOWFLAKE))
    rng = np.random.default_rng(0)
    hidden, output = rng.normal(0, 0.1, (1000, 768)), rng.normal(0, 0.1, (1000, 2))
    heads = StackedHeads(*(x.astype(np.float32) for x in (hidden, np.zeros(1000), output, np.zeros(2))))
    kind = VARIANTS[VARIANT]
    file = folder / "bundle" / "graphs" / kind.graph
    file.parent.mkdir(parents=True)
    write_graph(file, weights, heads, "cls", kind.dialect())
    variant = Variant(f"graphs/{kind.graph}", kind.layout, kind.precision, kind.provider, {}, {})
    path = folder / "bundle"
    return Bundle(
        path, replace(manifest, max_tokens=8192, variants={VARIANT: variant}, files=describe_files(path)), "0" * 64
    )
