"""jql-report and jql-compare as commands."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from jql_engine.certificate import CERTIFICATE
from jql_engine.cli import compare, report
from tests.cli.command import Result, run_command
from tests.decision.report.certificates import certificate
from tests.decision.report.made import Made, make
from tests.decision.report.reading import Page
from tests.decision.score_files import columns_of, write, write_many


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture
def call(monkeypatch, capfd):
    def run(module, *arguments: object) -> Result:
        return run_command(module.main, "jql", arguments, monkeypatch, capfd)

    return run


def test_a_report_is_a_page_and_figures_and_the_last_line_is_json(call, made, tmp_path):
    code, out, _ = call(
        report, made.scores, "--group-column", "lang", "--corpus", made.corpus, "--metrics", made.metrics,
        "--min-group", 100, "--weight", "tokens", "--html", tmp_path / "r.html", "--json", tmp_path / "r.json",
    )  # fmt: skip
    summary = json.loads(out.splitlines()[-1])
    figures = json.loads((tmp_path / "r.json").read_text("utf-8"))
    assert code == 0 and summary["documents"] == figures["whole"]["documents"] == 2_000
    assert summary["groups"] == 4 and summary["files"] == 2 and figures["weight"] == "tokens"
    kept = {one["rule"]: one["document_share"] for one in figures["whole"]["kept"] if one["quantile"] == 0.6}
    assert summary["kept_at_0.6"] == kept
    assert (tmp_path / "r.html").read_text("utf-8").startswith("<!DOCTYPE html>")


def test_a_report_of_nothing_to_write_is_misuse(call, made):
    code, _, err = call(report, made.scores)
    assert code == 2 and "--html" in err and "--json" in err


def test_a_column_that_is_not_there_is_an_error_and_nothing_is_written(call, made, tmp_path):
    code, _, err = call(report, made.scores, "--group-column", "language", "--html", tmp_path / "r.html")
    assert code == 1 and "no column 'language'" in err and not list(tmp_path.iterdir())


def test_the_bundle_must_be_the_one_that_computed_the_scores(call, made, bundles, tmp_path):
    code, _, err = call(report, made.scores, "--bundle", bundles["bert"].path, "--json", tmp_path / "r.json")
    assert code == 1 and "the scores were computed with bundle abababababab" in err and bundles["bert"].hash[:12] in err


def test_a_comparison_is_a_page_and_figures(call, made, tmp_path):
    out_files = ("--html", tmp_path / "c.html", "--json", tmp_path / "c.json")
    code, out, err = call(compare, made.scores, made.scores, "--group-column", "lang", "--min-group", 100, *out_files)
    assert "without --group-column" not in err
    summary, figures = json.loads(out.splitlines()[-1]), json.loads((tmp_path / "c.json").read_text("utf-8"))
    assert code == 0 and summary["compared"] == figures["compared"] == 1_993
    assert all(flip["documents"] == 0 for flip in figures["slices"][0]["flips"])
    assert "Two sets of scores" in (page := (tmp_path / "c.html").read_text("utf-8"))
    groups = [one for one in figures["slices"] if one["has_group"] and one["tokens"] is None]
    pooled = [one["group"] for one in groups if one["is_pooled"]]
    assert pooled == [one["group"] for one in groups if one["documents"] < 100] and pooled
    assert f"{len(pooled)} of {len(groups)} groups have fewer than 100 documents" in err
    assert page.count("(pooled)") >= len(pooled)


def test_figures_and_page_are_two_files(call, made, tmp_path):
    for module in (report, compare):
        inputs = [made.scores] * (2 if module is compare else 1)
        code, _, err = call(module, *inputs, "--html", tmp_path / "x", "--json", tmp_path / "a/../x")
        assert code == 2 and "give each a file of its own" in err
    assert not list(tmp_path.iterdir())


def test_groups_that_are_not_listed_are_pooled_aloud(call, tmp_path):
    """250 groups, of which 200 are listed: the small ones are the others."""
    langs = [f"g{n}" for n in range(200) for _ in range(5)] + [f"h{n}" for n in range(50)]
    columns = columns_of([np.arange(1_050, dtype=np.float32)], np.full(1_050, 9), langs)
    write_many(tmp_path / "scores", columns, 1)
    page = tmp_path / "r.html"
    options = ("--group-column", "lang", "--min-group", 5, "--html", page, "--json", tmp_path / "r.json")
    code, _, err = call(report, tmp_path / "scores", *options)
    assert code == 0 and "50 of 250 groups have fewer than 5 documents" in err
    assert "50 of 250 groups have fewer than 5 documents" in page.read_text("utf-8")
    assert json.loads((tmp_path / "r.json").read_text())["pooled_groups"] == 50


def test_scores_without_rows_are_named(call, tmp_path):
    write_many(tmp_path / "scores", columns_of([np.zeros(0, np.float32)], np.zeros(0)), 1)
    code, _, err = call(report, tmp_path / "scores", "--json", tmp_path / "r.json")
    assert code == 1 and "none of the 0 documents has a score" in err


def test_a_head_may_have_the_name_of_a_rule(call, tmp_path):
    rng = np.random.default_rng(0)
    for place in ("a", "b"):
        columns = {f"score_{name}": rng.random(500).astype(np.float32) for name in ("mean", "edu")}
        write(tmp_path / place / "0.parquet", {**columns, "n_tokens": np.ones(500, np.int32)})
    code, out, _ = call(compare, tmp_path / "a", tmp_path / "b", "--json", tmp_path / "c.json")
    summary, figures = json.loads(out.splitlines()[-1]), json.loads((tmp_path / "c.json").read_text("utf-8"))
    flips = {(one["what"], one["is_rule"]): one["share"] for one in figures["slices"][0]["flips"] if one["cut"] == 0.6}
    assert code == 0 and flips["mean", True] != flips["mean", False]
    assert summary["flips_at_0.6"]["mean"][0] == flips["mean", False]
    assert summary["flips_by_rule_at_0.6"]["mean"][0] == flips["mean", True]


def test_the_certificate_of_the_bundle_is_shown(call, made, bundles, tmp_path):
    bundle = shutil.copytree(bundles["bert"].path, tmp_path / "bundle")
    content = certificate() | {"bundle": bundles["bert"].hash}
    (bundle / CERTIFICATE).write_text(json.dumps(content), encoding="utf-8")
    table = pq.read_table(made.scores / "a/0.parquet")
    settings = json.loads(table.schema.metadata[b"jql_engine"]) | {"bundle": bundles["bert"].hash}
    pq.write_table(table.replace_schema_metadata({"jql_engine": json.dumps(settings)}), tmp_path / "s.parquet")
    out_files = ("--html", tmp_path / "r.html", "--json", tmp_path / "r.json")
    assert call(report, tmp_path / "s.parquet", "--bundle", bundle, *out_files)[0] == 0
    shown = json.loads((tmp_path / "r.json").read_text("utf-8"))["provenance"]["certificate"]
    assert shown["variants"]["cpu-fp32"] == {"flips": content["variants"]["cpu-fp32"]["flips"]}
    read = Page((tmp_path / "r.html").read_text("utf-8"))
    flips = [content["reference_bf16"], *content["variants"].values()]
    expected = [value for one in flips for flip in one["flips"] for value in (flip["share"], flip["upper"])]
    assert read.numbers["provenance"][2:] == expected
    assert {"PyTorch in bf16", "cpu-fp32 (computed these scores)", "openvino-bf16"} <= set(read.texts)
    # Of other windows it says nothing about these scores.
    settings |= {"windows": "all", "aggregate": "max"}
    pq.write_table(table.replace_schema_metadata({"jql_engine": json.dumps(settings)}), tmp_path / "s.parquet")
    assert call(report, tmp_path / "s.parquet", "--bundle", bundle, *out_files)[0] == 0
    assert "computed these scores" not in (tmp_path / "r.html").read_text("utf-8")
    del content["reference_bf16"]
    (bundle / CERTIFICATE).write_text(json.dumps(content), encoding="utf-8")
    code, _, err = call(report, tmp_path / "s.parquet", "--bundle", bundle, *out_files)
    assert code == 1 and "certificate.json is damaged: certificate lacks reference_bf16" in err
