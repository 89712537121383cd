"""Wrong graphs: each is a real graph of a real encoder with one mistake in it, and none may pass."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from jql_engine.bundle import Bundle
from jql_engine.errors import ParityError
from jql_engine.sessions import certify as parity
from jql_engine.sessions.cpu import CpuSession
from jql_engine.tokenizer import Tokenizer
from jql_export import probes
from jql_export.families.read import read_encoder
from jql_export.graph.dialect import MICROSOFT
from jql_export.graph.encoder import write_graph
from jql_export.readouts.head_file import read_head
from jql_export.reference import Reference
from jql_export.tolerances import TOLERANCES
from jql_export.variants import VARIANTS
from tests.conftest import FAMILIES, ON_CPU, POOLING

FP32 = TOLERANCES["fp32"]
each_variant = pytest.mark.parametrize("variant", ON_CPU)
each_family = pytest.mark.parametrize("family", FAMILIES)


class Graph:
    """The graph of a bundle, its weights by name, open to change."""

    def __init__(self, file):
        self.model = onnx.load(file)
        self.weights = {tensor.name: numpy_helper.to_array(tensor).copy() for tensor in self.model.graph.initializer}

    def nodes(self, *types):
        return [node for node in self.model.graph.node if node.op_type in types]

    def save(self, file):
        del self.model.graph.initializer[:]
        self.model.graph.initializer.extend(
            numpy_helper.from_array(value, name) for name, value in self.weights.items()
        )
        file.parent.mkdir(exist_ok=True)
        onnx.save(self.model, file)


@pytest.fixture(scope="module")
def oracle(bundles, encoders, head_files):
    """Probe documents of a family and what PyTorch computes for them."""
    heads = [read_head(name, file) for name, file in head_files.items()]
    tokens = {family: probes.token_batch(Tokenizer.of(bundles[family])) for family in FAMILIES}
    return {
        family: (tokens[family], Reference(encoders[family], heads, POOLING[family]).run(tokens[family]))
        for family in FAMILIES
    }


@pytest.fixture
def certify(bundles, oracle, tmp_path):
    """Certifies the graph of a family after `change`."""

    def run(family, variant, change):
        graph, copy = Graph(bundles[family].graph(variant)), replace(bundles[family], path=tmp_path)
        change(graph)
        graph.save(copy.graph(variant))
        return parity.certify(CpuSession(copy, variant), *oracle[family], FP32)

    return run


@each_variant
@each_family
def test_an_unchanged_graph_is_certified_with_its_figures(certify, oracle, family, variant):
    figures = certify(family, variant, lambda _: None)
    tokens = oracle[family][0]
    assert (figures["documents"], figures["tokens"]) == (len(tokens.rows), len(tokens.ids))
    assert figures["longest"] == 96
    assert 0 < figures["max_abs_embedding"] <= FP32.embedding and 0 < figures["max_abs_score"] <= FP32.score


def key_bias_dropped(graph):
    graph.weights["layer.1.key.bias"][:] = 0


def positions_shifted(graph):
    for name in {"position", "rope.cos", "rope.sin"} & set(graph.weights):
        graph.weights[name] = np.roll(graph.weights[name], -1, axis=0)


def rope_left_out(graph):
    graph.weights["rope.cos"][:], graph.weights["rope.sin"][:] = 1, 0


def rope_turned_backwards(graph):
    graph.weights["rope.sin"] *= -1


def heads_swapped(graph):
    for name in ("heads.output.weight", "heads.output.bias"):
        graph.weights[name] = np.ascontiguousarray(graph.weights[name][..., ::-1])


def up_and_gate_swapped(graph):
    up, gate = "layer.0.up.weight", "layer.0.gate.weight"
    graph.weights[up], graph.weights[gate] = graph.weights[gate], graph.weights[up]


def layers_swapped(graph):
    names = [name for name in graph.weights if name.startswith("layer.0.")]
    for first, second in ((name, name.replace("layer.0.", "layer.1.")) for name in names):
        graph.weights[first], graph.weights[second] = graph.weights[second], graph.weights[first]


def gelu_approximated(graph):
    for node in graph.nodes("Gelu", "BiasGelu"):
        if node.domain == MICROSOFT:
            node.op_type = "FastGelu"
        else:
            node.attribute.append(helper.make_attribute("approximate", "tanh"))


def one_weight_not_a_number(graph):
    graph.weights["layer.1.down.weight"][0, 0] = np.nan


def one_weight_off_by_a_hundredth(graph):
    graph.weights["layer.0.query.weight"][3, 5] += 0.01


@each_variant
@pytest.mark.parametrize(
    ("family", "mistake"),
    [
        ("gte", key_bias_dropped),
        ("gte", positions_shifted),
        ("bert", positions_shifted),
        ("xlm-roberta", positions_shifted),
        ("gte", rope_left_out),
        ("gte", rope_turned_backwards),
        ("gte", up_and_gate_swapped),
        *((family, heads_swapped) for family in FAMILIES),
        *((family, layers_swapped) for family in FAMILIES),
        *((family, gelu_approximated) for family in FAMILIES),
        *((family, one_weight_not_a_number) for family in FAMILIES),
        *((family, one_weight_off_by_a_hundredth) for family in FAMILIES),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_wrong_graph_is_refused(certify, family, mistake, variant):
    with pytest.raises(ParityError, match=f"variant {variant} is out of tolerance"):
        certify(family, variant, mistake)


@each_variant
@each_family
def test_a_value_bias_that_is_not_folded_in_is_refused(certify, encoders, family, variant):
    output = read_encoder(encoders[family]).layers[0].output

    def change(graph):
        graph.weights["layer.0.attention_norm.residual_bias"] = output.bias

    with pytest.raises(ParityError, match="out of tolerance"):
        certify(family, variant, change)


@each_variant
@each_family
def test_a_token_type_left_out_is_refused(certify, encoders, family, variant):
    token_type = read_encoder(encoders[family]).token_type

    def change(graph):
        graph.weights["word" if family == "gte" else "position"] -= token_type

    with pytest.raises(ParityError, match="out of tolerance"):
        certify(family, variant, change)


@each_variant
@each_family
def test_the_wrong_pooling_is_refused(bundles, oracle, encoders, head_files, tmp_path, family, variant):
    heads = [read_head(name, file) for name, file in head_files.items()]
    wrong = "mean" if POOLING[family] == "cls" else "cls"
    copy = Bundle(tmp_path, bundles[family].manifest, "")
    copy.graph(variant).parent.mkdir()
    write_graph(copy.graph(variant), read_encoder(encoders[family]), heads, wrong, VARIANTS[variant].dialect())
    with pytest.raises(ParityError, match="embedding differs"):
        parity.certify(CpuSession(copy, variant), *oracle[family], FP32)


@each_family
def test_attention_to_padding_is_refused(certify, family):
    def attend_everywhere(graph):
        true = helper.make_node("Equal", ["attention_mask", "attention_mask"], ["true"])
        for node in graph.nodes("Unsqueeze"):
            if node.input[0] == "attention_mask" and "ints.1.2" in node.input:
                node.input[0] = "true"
        graph.model.graph.node.insert(0, true)

    with pytest.raises(ParityError, match="out of tolerance"):
        certify(family, "standard-fp32", attend_everywhere)


@each_variant
@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_without_rope_a_key_bias_cancels_in_the_softmax(certify, family, variant):
    figures = certify(family, variant, key_bias_dropped)
    assert figures["max_abs_embedding"] <= FP32.embedding


def test_a_refusal_names_the_figure_the_worst_document_and_the_limit(certify):
    with pytest.raises(ParityError) as caught:
        certify("gte", "cpu-fp32", heads_swapped)
    pattern = (
        r"score differs by (\S+) on a probe document of (\d+) tokens, allowed is ([^; ]+)[^;]*; (\d+) of (\d+) probe"
    )
    difference, length, limit, failed, n_docs = map(float, re.search(pattern, str(caught.value)).groups())
    assert limit == FP32.score < difference and 2 <= length <= 96 and failed == n_docs


class Shifted:
    """A session whose scores are off by so much."""

    def __init__(self, session, by):
        self._session, self._by = session, by

    def __getattr__(self, name):
        return getattr(self._session, name)

    def run(self, batch):
        output = self._session.run(batch)
        return replace(output, scores=output.scores + np.float32(self._by))


def test_limits_grow_with_scores_beyond_ten(bundles, oracle):
    tokens, expected = oracle["gte"]
    session, large = CpuSession(bundles["gte"], "cpu-fp32"), replace(expected, scores=expected.scores + np.float32(100))
    figures = parity.certify(Shifted(session, 100 + 5e-4), tokens, large, FP32)
    assert figures["max_abs_score"] == pytest.approx(5e-4, abs=1e-4)
    for by, scores in ((100 + 2e-3, large), (5e-4, expected), (np.nan, large)):
        with pytest.raises(ParityError, match="out of tolerance: score differs"):
            parity.certify(Shifted(session, by), tokens, scores, FP32)
