"""How far a graph may be from the fp32 oracle: the one place, for export and for the tests."""

from __future__ import annotations

from jql_engine.parity import LONG_TOKENS, Tolerance

__all__ = ["LONG_TOKENS", "TOLERANCES", "Tolerance"]

TOLERANCES = {
    "fp32": Tolerance(embedding=1e-5, embedding_long=5e-5, score=1e-4, batch=1e-5),
    # Measured with fp16 weights and activations, sums in fp32: embeddings 4e-4 on the tests' encoders, 3e-4 on the
    # demo's; scores of the demo's learned heads 1.3e-3. A score's error grows with the head's weights.
    "fp16": Tolerance(embedding=1e-3, embedding_long=1e-3, score=1e-2, batch=1e-2),
    # transformers' own bf16 is 1.8e-3 away on multilingual e5, and its scores 0.024: the bundle has the figure of each
    # graph, and --tolerance is the user's limit.
    "bf16": Tolerance(embedding=5e-3, embedding_long=5e-3, score=0.1, batch=0.1),
    "int8": Tolerance(embedding=0.1, embedding_long=0.1, score=1.0, batch=1.0),
}
