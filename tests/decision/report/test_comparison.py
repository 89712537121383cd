"""Pages about two sets of scores: their figures are those of the JSON, and what is from outside is text."""

from __future__ import annotations

import json

from jql_engine.certificate import REFERENCE_BF16
from jql_engine.decision.comparison import CUTS, compare
from jql_engine.decision.report import comparison
from jql_engine.decision.report.comparison import certificate_page, comparison_page
from tests.decision.report.certificates import HEADS, certificate
from tests.decision.report.reading import Page
from tests.decision.test_comparison import paired


def flips_of(slice_) -> list[float]:
    """Of the table of flips."""
    by_name = {}
    for flip in slice_["flips"]:
        by_name.setdefault((flip["what"], flip["is_rule"]), []).append(flip)
    values = [slice_["documents"]]
    for flips in by_name.values():
        assert [flip["cut"] for flip in flips] == list(CUTS)
        values += [value for flip in flips for value in (flip["share"], *flip["interval"])]
    return values


def differences_of(slice_) -> list[float]:
    values = [slice_["documents"]]
    for one in slice_["differences"]:
        correlation = [] if one["spearman"] is None else [one["spearman"]]  # of a single document there is none
        values += [*one["quantiles"], one["greatest"], *correlation]
    return values


def test_figures_of_a_comparison_are_those_of_its_json():
    found = compare(paired())
    slices = json.loads(json.dumps(found.to_json()))["slices"]
    page = Page(comparison_page(found, "a", "b"))
    assert page.numbers.pop("") == [found.compared, found.documents, found.only_first, found.only_second]
    kinds = {
        "all": [slices[0]],
        "groups": [one for one in slices if one["has_group"] and one["tokens"] is None],
        "lengths": [one for one in slices if not one["has_group"] and one["tokens"]],
        "both": [one for one in slices if one["has_group"] and one["tokens"]],
    }
    assert page.numbers.keys() == kinds.keys() and [len(one) for one in kinds.values()][:3] == [1, 4, 4]
    for name, own in kinds.items():
        expected = [v for one in own for v in flips_of(one)] + [v for one in own for v in differences_of(one)]
        assert page.numbers[name] == expected, name


def test_only_the_largest_groups_are_listed(monkeypatch):
    monkeypatch.setattr(comparison, "MOST_LISTED", 2)
    found = compare(paired())
    read = Page(comparison_page(found, "a", "b"))
    sizes = sorted((one.documents for one in found.slices if one.has_group and one.tokens is None), reverse=True)
    listed = {value for value in read.numbers["groups"] if value > 30}
    assert listed == set(sizes[:2])
    assert any("The 2 groups with the most documents are listed." in text for text in read.texts)


def test_figures_of_a_certificate_are_those_of_its_json():
    content = json.loads(json.dumps(certificate()))
    page = Page(certificate_page(content))
    compared = [content["reference_bf16"], *content["variants"].values()]
    overview = []
    for found in compared:
        whole = found["comparison"]["slices"][0]
        at_cut = [flip for flip in whole["flips"] if flip["cut"] == content["cut"]]
        assert {flip["what"]: flip["share"] for flip in at_cut}.items() >= {
            flip["what"]: flip["share"] for flip in found["flips"]
        }.items()
        overview += [value for flip in at_cut for value in (flip["share"], *flip["interval"])]
        overview += [one[name] for name in ("greatest", "spearman") for one in whole["differences"]]
    assert page.numbers["overview"] == overview
    for number, found in enumerate(compared):
        slices = found["comparison"]["slices"]
        expected = [v for one in slices for v in differences_of(one)] + [v for one in slices for v in flips_of(one)]
        assert page.numbers[f"variant-{number}"] == expected
    assert [text for text in page.texts if text in (REFERENCE_BF16, "cpu-fp32", "openvino-bf16")][:3] == [
        REFERENCE_BF16, "cpu-fp32", "openvino-bf16",
    ]  # fmt: skip


def test_names_are_escaped_and_secrets_are_not_shown():
    for page in (
        certificate_page(certificate()),
        comparison_page(compare(paired()), "s3://key:secret@bucket/<b>x</b>", "<script>"),
    ):
        read = Page(page)
        assert "secret" not in page and not read.of("script") and not read.of("b") and not read.of("prose")


def test_the_same_comparison_gives_the_same_page():
    assert certificate_page(certificate()) == certificate_page(certificate())
    assert HEADS[1] in Page(certificate_page(certificate())).texts
