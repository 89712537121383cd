"""A manifest that says other than what its bundle's probes and graphs prove is refused when the bundle is opened."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from jql_engine import Engine
from jql_engine.bundle import MANIFEST, PROBES, Bundle
from jql_engine.errors import BundleError
from tests.conftest import MAX_TOKENS, export


@pytest.fixture(scope="module")
def three(encoders, head_files, tmp_path_factory) -> Bundle:
    """A bundle of a model with a table of positions, for both libraries of a CPU and both layouts."""
    variants = ("cpu-fp32", "openvino-fp32", "standard-fp32")
    return export(encoders["xlm-roberta"], head_files, tmp_path_factory.mktemp("bundles") / "three", variants)


@pytest.fixture
def changed(three, tmp_path):
    """Opens a variant of a copy whose manifest was changed."""

    def open_changed(variant, change):
        copy = Path(shutil.copytree(three.path, tmp_path / variant))
        fields = json.loads((copy / MANIFEST).read_text())
        change(fields)
        (copy / MANIFEST).write_text(json.dumps(fields))
        return Engine(copy, device="cpu", variant=variant)

    return open_changed


@pytest.mark.parametrize("variant", ["cpu-fp32", "openvino-fp32", "standard-fp32"])
@pytest.mark.parametrize("tokens", [MAX_TOKENS + 1, 2**31 - 1])
def test_more_tokens_than_the_longest_probe_are_refused(changed, variant, tokens):
    """Beyond the table OpenVINO gives any score, without an error."""
    message = f"max_tokens is {tokens} in {MANIFEST}, the longest document in .* has {MAX_TOKENS} tokens"
    with pytest.raises(BundleError, match=message):
        changed(variant, lambda fields: fields.update(max_tokens=tokens))


def test_fewer_tokens_are_accepted(changed):
    assert changed("cpu-fp32", lambda fields: fields.update(max_tokens=8)).score(["one word"]).valid.all()


@pytest.mark.parametrize("variant", ["cpu-fp32", "openvino-fp32"])
@pytest.mark.parametrize("place", ["prefix", "suffix"])
@pytest.mark.parametrize("ids", [[10**6], [7], [0, 2], [0] * 50])
def test_other_special_tokens_than_the_probes_have_are_refused(changed, variant, place, ids):
    def change(fields):
        fields["tokenizer"][place] = ids

    with pytest.raises(BundleError, match=f"in {MANIFEST}, documents in {PROBES} have other ids there"):
        changed(variant, change)


@pytest.mark.parametrize(
    ("variant", "layout", "inputs"),
    [
        ("cpu-fp32", "padded", "input_ids"),
        ("cpu-fp32", "packed", "input_ids"),
        ("standard-fp32", "exact", "attention_mask, input_ids"),
        ("openvino-fp32", "padded", "input_ids"),
    ],
)
def test_a_layout_that_the_graph_does_not_take_is_refused(changed, variant, layout, inputs):
    with pytest.raises(BundleError, match=f"{variant} has layout '{layout}' .*its graph takes {inputs};"):
        changed(variant, lambda fields: fields["variants"][variant].update(layout=layout))
