"""How far a graph may be from the fp32 oracle: the one place, for export and for the tests."""

from __future__ import annotations

from dataclasses import replace

from jql_engine.sessions.base import ON_GPU
from jql_engine.sessions.certify import LONG_TOKENS, Tolerance

__all__ = ["EVALUATED_WINDOWS", "LONG_TOKENS", "TOLERANCES", "Tolerance", "tolerance_of"]

TOLERANCES = {
    "fp32": Tolerance(embedding=1e-5, embedding_long=5e-5, score=1e-4, batch=1e-5),
    # Measured with fp16 weights and activations, sums in fp32: embeddings 4e-4 on the tests' encoders, 3e-4 on the
    # demo's; scores of the demo's learned heads 1.3e-3. A score's error grows with the head's weights.
    "fp16": Tolerance(embedding=1e-3, embedding_long=1e-3, score=1e-2, batch=1e-2),
    # transformers' own bf16 is 1.8e-3 away on multilingual e5, and its scores 0.024; in GTE base's shape with random
    # weights it is 5.6e-3 away (OpenVINO 5.1e-3). The bundle has the figure of each graph, and --tolerance is the
    # user's limit.
    "bf16": Tolerance(embedding=1e-2, embedding_long=1e-2, score=0.1, batch=0.1),
}

# Of an element of an embedding of the tests' ModernBERT, seven layers of wide weights, as the evaluator of CUDA's
# operators computes it; found were 3.2e-3 and 2.4e-2. Published models are held to TOLERANCES.
EVALUATED_WINDOWS = {"fp16": 1e-2, "bf16": 6e-2}


def tolerance_of(precision: str, provider: str) -> Tolerance:
    """What a graph may differ by in `precision`, with the runtime that it is written for.

    On a GPU a score alone may differ from the same in a batch by as much as from the reference, in fp32 too. cuBLAS has
    other kernels for few rows: one adds the n products of a row one after another, another in dozens of parts. A sum of
    n products in fp32 is off by at most n u, as a rule by sqrt(n) u, of the sum of their magnitudes, with u = 2^-24
    (Higham and Mary, 2019, doi:10.1137/18M1226312), and n is 768 to 3,072. So alone and batched are two orders of the
    same sums, as the GPU and the reference are. In Snowflake's shape, random weights, heads of 1,000, documents of 12
    to 42 tokens, scores are off by up to 2.4e-5 from fp64 where products are added one after another, by 4.5e-6 in 32
    parts, and 2.7e-5 from each other. On a CPU alone and batched were found 4e-6 apart, and 1e-5 is kept.
    """
    tolerance = TOLERANCES[precision]
    return replace(tolerance, batch=tolerance.score) if provider in ON_GPU else tolerance
