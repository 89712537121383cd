"""Damaged manifests of a bundle whose other files are sound."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa

from jql_engine.bundle import MANIFEST, Bundle
from jql_engine.data import DocumentBatch
from jql_engine.sessions.select import choose
from jql_engine.sessions.tensorrt.profiles import budget_for
from jql_engine.tokenizer import Tokenizer
from tests.fuzzing import bases
from tests.fuzzing.mutate import cut, damage, damage_json

TEXTS = ["", "Water boils at a lower temperature on a mountain.", "</s> <s>", "süß 月亮 🌙", "word " * 200]
# Variants that the bundle could have as well: same files, other providers.
FURTHER = {"openvino-fp32": ("openvino", "fp32", "exact"), "cuda-fp16": ("cuda", "fp16", "packed")}


class BundleKind:
    """bundle.json."""

    may_crash = False

    def __init__(self, folder: Path) -> None:
        self.bundle = bases.bundle(folder)
        self.manifest: dict[str, Any] = json.loads((self.bundle / MANIFEST).read_bytes())
        first = next(iter(self.manifest["variants"].values()))
        for name, (provider, precision, layout) in FURTHER.items():
            self.manifest["variants"][name] = first | {"provider": provider, "precision": precision, "layout": layout}

    def write(self, rng: random.Random, folder: Path) -> Path:
        """Damage in a field, seldom in a byte."""
        if not (copy := folder / "case.bundle").is_dir():
            shutil.copytree(self.bundle, copy, copy_function=os.link)
            (copy / MANIFEST).unlink()
        raw = damage_json(rng, self.manifest).encode("utf-8", "surrogatepass")
        if rng.random() < 0.1:
            raw = rng.choice([damage, cut])(rng, json.dumps(self.manifest).encode())
        (copy / MANIFEST).write_bytes(raw)
        return copy / MANIFEST

    def read(self, file: Path) -> None:
        """Open it, tokenize, choose a graph: what a job does before its first batch."""
        bundle = Bundle.open(file.parent)
        _check(bundle)
        tokens = Tokenizer.of(bundle).encode(DocumentBatch.of(pa.array(TEXTS, pa.large_string())))
        info, longest = bundle.manifest.tokenizer, bundle.manifest.max_tokens
        for i in range(len(TEXTS)):
            ids = tokens.slice(i).ids.tolist()
            assert 0 < len(ids) <= longest and ids[: len(info.prefix)] == info.prefix, "not the prefix"
            assert ids[len(ids) - len(info.suffix) :] == info.suffix, "not the suffix"
        choice = choose(bundle, "cpu")
        assert bundle.graph(choice.variant).is_file(), "the graph is no file"
        budget_for(bundle, 1_000)


def _check(bundle: Bundle) -> None:
    """What the rest of the runtime takes for granted."""
    m = bundle.manifest
    assert all(isinstance(name, str) and name for name in bundle.heads), "heads"
    assert len(set(bundle.heads)) == len(bundle.heads), "two heads of one name"
    for number in (m.format, m.max_tokens, m.encoder.layers, m.encoder.hidden_size):
        assert type(number) is int and 0 < number < 2**31, "sizes"
    assert m.pooling in ("cls", "mean"), "pooling"
    for token in (*m.tokenizer.prefix, *m.tokenizer.suffix, m.tokenizer.pad):
        assert type(token) is int and 0 <= token < 2**31, "ids"
    assert all(isinstance(text, str) and text for text in m.tokenizer.added_tokens), "added tokens"
    assert "tokenizer.json" in m.files and len(bundle.encoder_hash) == 64, "files"
    for variant in m.variants.values():
        assert variant.graph in m.files, "a graph that is not in files"
        assert isinstance(variant.provider, str) and isinstance(variant.precision, str), "provider"
        for value in (*variant.tolerance.values(), *variant.parity.values()):
            assert type(value) in (int, float) and abs(value) <= sys.float_info.max, "tolerance or parity"
    json.dumps([m.created_with, m.encoder.id, m.encoder.revision], allow_nan=False)
