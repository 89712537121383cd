"""benchmarks.gpu.alternatives: every graph that is tried gives the scores of the exported one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

from benchmarks.gpu.alternatives import ALTERNATIVES, interleaved, time_in_turn, without_biases, write_alternatives
from benchmarks.gpu.profile import feeds_of
from benchmarks.table import GpuRow
from jql_engine.batching import plan_batches
from jql_engine.data import Budget
from jql_engine.sessions.certify import read_probes
from jql_export.families.read import read_encoder
from tests.conftest import FAMILIES
from tests.operators import OPERATORS


def compute(file, tokens):
    evaluator = ReferenceEvaluator(str(file), new_ops=OPERATORS)
    scores = {}
    for batch in plan_batches(tokens, Budget(500, "packed")):
        found = evaluator.run(["scores"], feeds_of(batch))[0]
        scores |= zip(batch.rows.tolist(), found, strict=True)
    return np.array([scores[row] for row in sorted(scores)])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_graph_gives_the_scores_of_the_reference(bundles, encoders, family, tmp_path):
    tokens, expected = read_probes(bundles[family])
    written = dict(write_alternatives(tmp_path, read_encoder(encoders[family]), bundles[family], np.float32))
    rope = {name for name in written if "RoPE" in name}
    others = {"as exported", "queries, keys and values merged", "without biases"}
    assert written.keys() - rope == others | (
        {"first queries alone"} if bundles[family].manifest.pooling == "cls" else set()
    )
    assert rope == ({"RoPE of 4 heads at once", "all, RoPE of 4 heads"} if family == "gte" else set())
    for name, file in written.items():
        np.testing.assert_allclose(compute(file, tokens), expected.scores, rtol=0, atol=2e-5, err_msg=name)


def test_an_encoder_gets_what_makes_a_difference_to_it(encoders):
    spec = read_encoder(encoders["gte"]).spec
    first, rope = ALTERNATIVES["first queries alone"], ALTERNATIVES["RoPE of 4 heads at once"]
    assert first.fits(spec, "cls") and not first.fits(spec, "mean")
    assert rope.fits(spec, "mean") and not rope.fits(replace(spec, positions="absolute"), "mean")
    assert not rope.fits(replace(spec, hidden_size=512 * spec.n_attention_heads), "mean"), "a block has 1,024 threads"


def test_where_a_bias_cannot_be_in_the_weights_it_is_said(bundles, encoders, tmp_path, capsys):
    encoder = read_encoder(encoders["gte"])
    encoder.embedding_norm.weight[3] = 0
    written = dict(write_alternatives(tmp_path, encoder, bundles["gte"]))
    assert "without biases" not in written and "as exported" in written
    assert "without biases: a norm has a weight of 0" in capsys.readouterr().out


def test_what_fails_is_a_row_that_says_why_and_what_overflows_is_not_compared():
    class Resident:
        def __init__(self, scores):
            self.scores = np.array(scores, np.float32)

        def run(self):
            if not len(self.scores):
                raise RuntimeError("no kernel")
            return self.scores

    names = ("as exported", "broken", "not loaded", "other")
    rows = [GpuRow("kernel", name, "cuda-fp16 8k", 3, 300) for name in names]
    given = [Resident([[1], [2], [np.nan]]), Resident([]), ValueError("no graph"), Resident([[1], [2.5], [3]])]
    found = time_in_turn(list(zip(rows, given, strict=True)), 2, ("a",))
    assert [len(row.seconds) for row in found] == [2, 0, 0, 2]
    assert [row.note for row in found[1:3]] == ["failed: RuntimeError: no kernel", "failed: ValueError: no graph"]
    assert found[0].overflowed == 1 and found[3].score_difference == 0.5 and found[3].note.endswith("x as exported")


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
