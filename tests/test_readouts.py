"""Readouts on stored embeddings: what PyTorch computes, and every damage of their file named."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from jql_engine.bundle import MANIFEST, READOUTS, Bundle, describe_files
from jql_engine.errors import BundleError
from jql_engine.readouts import ACTIVATIONS, Readouts
from jql_export.readouts.base import Layer, Readout, write_readouts
from jql_export.reference import head_module
from jql_export.tensors import Linear, Norm


@pytest.fixture
def copy(bundle, tmp_path) -> Path:
    return Path(shutil.copytree(bundle.path, tmp_path / "copy"))


def with_tensors(copy: Path, change: dict[str, np.ndarray | None]) -> Bundle:
    tensors = {name: t for name, t in {**load_file(copy / READOUTS), **change}.items() if t is not None}
    save_file(tensors, copy / READOUTS)
    return listed(copy, {})


def listed(copy: Path, fields: dict[str, object]) -> Bundle:
    manifest = json.loads((copy / MANIFEST).read_text()) | fields
    manifest["files"] = describe_files(copy)
    (copy / MANIFEST).write_text(json.dumps(manifest))
    return Bundle.open(copy)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_any_chain_of_layers_is_what_torch_computes(copy, activation, norm, bias):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(0, 1, shape).astype(np.float32)  # noqa: E731
    first = Layer(Linear(draw(7, 32), draw(7) if bias else None), activation, *([Norm(draw(7), draw(7)), 1e-5] * norm))
    readout = Readout("x", "test", (first, Layer(Linear(draw(3, 7), draw(3)), "tanh")), "", ("x_a", "x_b", "x_c"))
    write_readouts(copy / READOUTS, [readout])
    bundle = listed(copy, {"readouts": [asdict(readout.info("cls"))]})
    embeddings = rng.normal(0, 1, (50, 32)).astype(np.float32)
    with torch.inference_mode():
        expected = head_module(readout)(torch.from_numpy(embeddings)).numpy()
    found = Readouts.of(bundle).score(embeddings)
    assert found.dtype == np.float32 and isinstance(head_module(readout), nn.Sequential)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edu.0.weight": None}, r"has nothing as edu\.0\.weight, expected float32 \[\*, 32\]"),
        ({"edu.0.weight": np.ones(32, np.float32)}, r"float32 \[32\] as edu\.0\.weight"),
        ({"edu.0.weight": np.ones((16, 31), np.float32)}, r"float32 \[16, 31\] as edu\.0\.weight"),
        ({"edu.0.bias": None}, r"nothing as edu\.0\.bias, expected float32 \[16\]"),
        ({"edu.0.bias": np.ones(1, np.float32)}, r"float32 \[1\] as edu\.0\.bias, expected float32 \[16\]"),
        ({"edu.1.weight": np.ones((2, 16), np.float32)}, r"\[2, 16\] as edu\.1\.weight, expected float32 \[1, 16\]"),
        ({"prose.1.bias": np.ones(1, np.float64)}, r"float64 \[1\] as prose\.1\.bias"),
        ({"prose.1.bias": np.full(1, np.nan, np.float32)}, r"values that are not finite as prose\.1\.bias"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(copy, change, message):
    with pytest.raises(BundleError, match=message):
        Readouts.of(with_tensors(copy, change))


def test_a_file_that_is_no_safetensors_is_named(copy):
    (copy / READOUTS).write_bytes(b"nothing")
    with pytest.raises(BundleError, match=f"{READOUTS} is damaged"):
        Readouts.of(listed(copy, {}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalize": False}, r"'edu' \(jql-head\) cannot be applied to stored embeddings, which are cls-pooled"),
        ({"pooling": "mean"}, "cannot be applied to stored embeddings"),
        ({"layers": [{"activation": "gelu"}, {}]}, "has a gelu, which cannot be computed here"),
    ],
)
def test_what_cannot_be_applied_to_stored_embeddings_is_said(bundle, copy, change, message):
    edu, prose = (asdict(readout) for readout in bundle.manifest.readouts)
    with pytest.raises(BundleError, match=message):
        Readouts.of(listed(copy, {"readouts": [edu | change, prose]}))
