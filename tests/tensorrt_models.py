"""The demo's real model with its TensorRT graph."""

from __future__ import annotations

from pathlib import Path

from jql_engine.bundle import Bundle
from jql_export.bundle import Checkpoint, export_bundle
from jql_export.readouts.head_file import read_head

VARIANT = "tensorrt-fp16"
DEMO = Path(__file__).parent.parent / "examples" / "demo"


def export_demo(out: Path) -> Bundle:
    """The demo's bundle."""
    heads = [read_head(name, DEMO / "heads" / f"{name}.ckpt") for name in ("education", "prose")]
    return export_bundle(Checkpoint(DEMO / "encoder", "demo", None), heads, out, variants=("cpu-fp32", VARIANT))
