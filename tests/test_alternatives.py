"""benchmarks.alternatives: every graph that is tried gives the scores of the exported one."""

from __future__ import annotations

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

from benchmarks.alternatives import ALTERNATIVES, interleaved, without_biases, write_alternatives
from benchmarks.operators import OPERATORS
from benchmarks.profile import feeds_of
from jql_engine.batching import plan
from jql_engine.data import Budget
from jql_engine.parity import read_probes
from jql_export.checkpoint import read_encoder
from tests.conftest import FAMILIES


def compute(file, tokens):
    evaluator = ReferenceEvaluator(str(file), new_ops=OPERATORS)
    scores = {}
    for batch in plan(tokens, Budget(500, "packed")):
        found = evaluator.run(["scores"], feeds_of(batch))[0]
        scores |= zip(batch.rows.tolist(), found, strict=True)
    return np.array([scores[row] for row in sorted(scores)])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_graph_gives_the_scores_of_the_reference(bundles, encoders, family, tmp_path):
    tokens, expected = read_probes(bundles[family])
    written = dict(write_alternatives(tmp_path, read_encoder(encoders[family]), bundles[family], np.float32))
    rope = {name for name in written if "RoPE" in name}
    assert written.keys() - rope == {name for name in ALTERNATIVES if "RoPE" not in name}
    assert rope == ({"RoPE of 4 heads at once", "all, RoPE of 4 heads"} if family == "gte" else set())
    for name, file in written.items():
        np.testing.assert_allclose(compute(file, tokens), expected.scores, rtol=0, atol=2e-5, err_msg=name)


def test_no_projection_from_a_norm_has_a_bias_left(encoders):
    changed = without_biases(read_encoder(encoders["gte"]))
    for layer in changed.layers:
        assert all(linear.bias is None for linear in (layer.query, layer.key, layer.value, layer.up, layer.gate))
        assert layer.output.bias is not None and layer.down.bias is not None


def test_what_is_turned_together_lies_side_by_side(encoders):
    encoder = read_encoder(encoders["gte"])
    size, one, other = encoder.spec.head_size, encoder.layers[0].key, interleaved(encoder).layers[0].key
    for head in range(encoder.spec.n_attention_heads):
        for i in range(size // 2):
            for at, side in ((i, 0), (i + size // 2, 1)):
                row = head * size + 2 * i + side
                np.testing.assert_array_equal(other.weight[row], one.weight[head * size + at])
                assert other.bias[row] == one.bias[head * size + at]
