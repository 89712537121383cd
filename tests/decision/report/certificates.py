"""The content of a certificate.json, as the export writes it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from jql_engine.certificate import CUT, FORMAT, FlipShare
from jql_engine.decision.comparison import Comparison, Paired, compare, flips_at

HEADS = ("education", "<prose>")


def certificate(noises: tuple[float, ...] = (0.02, 0.0005, 0.03)) -> dict[str, Any]:
    """Of PyTorch in bf16 and two variants, whose scores are so far apart from fp32's."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(2, 2_000)).astype(np.float32)
    n_tokens, groups = rng.integers(2, 3_000, 2_000), np.zeros(2_000, np.int64)
    found = []
    for noise in noises:
        other = (scores + rng.normal(scale=noise, size=scores.shape)).astype(np.float32)
        found.append(compare(Paired(HEADS, scores, other, n_tokens, groups, (None,))))
    reference, *variants = map(_described, found)
    return {
        "format": FORMAT,
        "bundle": "ab" * 32,
        "documents": 2_000,
        "corpus": {"given": "s3://key:secret@bucket/corpus", "documents": 123_456, "seed": 0},
        "windows": {"take": "first", "aggregate": "max"},
        "cut": CUT,
        "machine": {"processor": "A processor", "cores": 2},
        "made_with": {"jql-engine": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "reference_bf16": reference,
        "variants": dict(zip(("cpu-fp32", "openvino-bf16"), variants, strict=True)),
    }


def _described(found: Comparison) -> dict[str, Any]:
    flips = [FlipShare(one.what, one.share, one.interval[1]) for one in flips_at(found.whole, CUT)]
    return {"flips": [asdict(one) for one in flips], "comparison": found.to_json()}
