"""Damaged tokenizer.json, read by export and at run time."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa

from jql_engine.data import DocumentBatch, TokenBatch
from jql_engine.errors import TokenizerError
from jql_engine.tokenizer import Tokenizer, prove_fast
from jql_export import probes
from jql_export.tokenizer import write_tokenizer
from tests.fuzzing import bases
from tests.fuzzing.mutate import cut, damage, damage_json

TEXTS = [
    "", " ", "a", "Water boils at a lower temperature on a mountain.", "</s> <s>", "süß 月亮 🌙", "x" * 300, "\n\n",
    "e\u0301\u200b\ufeff", "the the the", "▁", *probes.SENTENCES[:6],
]  # fmt: skip
MAX_TOKENS = 48


class TokenizerKind:
    """tokenizer.json of three kinds."""

    may_crash = False

    def __init__(self, folder: Path) -> None:
        self.bases = [json.loads(file.read_text(encoding="utf-8")) for file in bases.tokenizers(folder)]

    def write(self, rng: random.Random, folder: Path) -> Path:
        """Damage in a field, seldom in a byte."""
        base = rng.choice(self.bases)
        if rng.random() < 0.1:
            raw = rng.choice([damage, cut])(rng, json.dumps(base).encode())
        else:
            raw = damage_json(rng, base).encode("utf-8", "surrogatepass")
        file = folder / "case.json"
        file.write_bytes(raw)
        return file

    def read(self, file: Path) -> None:
        """Export's way, whose ids are those of `tokenizers` itself; and a run's, as if it had been proven before."""
        source, target = file.parent / "source", file.parent / "target.json"
        source.mkdir(exist_ok=True)
        shutil.copy(file, source / "tokenizer.json")
        info = write_tokenizer(source, target, 1)
        info = prove_fast(target, info, TEXTS)
        found = _encode(Tokenizer(target, info, MAX_TOKENS))
        plain = _encode(Tokenizer(target, type(info)(info.prefix, info.suffix, 1, None, None, []), MAX_TOKENS))
        assert np.array_equal(found.ids, plain.ids), "the fast tokenizer gives other ids"
        assert np.array_equal(found.offsets, plain.offsets), "the fast tokenizer gives other lengths"
        try:
            _encode(Tokenizer(target, type(info)([0], [2], 1, "tokie 0.1.4", 5, []), MAX_TOKENS))
        except TokenizerError:
            return


def _encode(tokenizer: Tokenizer) -> TokenBatch:
    return tokenizer.encode(DocumentBatch.of(pa.array([*TEXTS, None], pa.large_string())))
