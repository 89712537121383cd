"""The page of a report: its figures are those of --json, it stands alone, and what is from outside is text."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise

import pytest

from jql_engine.decision.report import plots
from jql_engine.decision.report.page import Column, Html, Table, element, join, number, share
from jql_engine.decision.report.report import Sources, report, report_page
from jql_engine.errors import EngineError
from tests.decision.report.made import SCRIPT
from tests.decision.report.reading import Page


def some(*values):
    """Numbers that a page shows: it has a dash for none."""
    return [value for value in values if value is not None]


def test_figures_of_the_page_are_those_of_the_json(sources, tmp_path):
    """All numbers of every table, in order, to the last bit."""
    report(sources, min_group=100, html=str(tmp_path / "r.html"), json_file=str(tmp_path / "r.json"))
    figures = json.loads((tmp_path / "r.json").read_text("utf-8"))
    page = Page((tmp_path / "r.html").read_text("utf-8"))
    parts = [figures["whole"], *figures["groups"]]
    counts = ("documents", "scored", "null", "nan", "infinite", "tokens", "truncated")
    of_heads = ("finite", "null", "nan", "infinite", "least", "median", "greatest")
    expected = {
        "contents": [one[name] for one in parts for name in counts]
        + [one[name] for one in figures["heads"] for name in of_heads],
        "kept": [
            kept[name]
            for part in parts
            for quantile in figures["quantiles"]
            for rule in figures["rules"]
            for kept in part["kept"]
            if (kept["rule"], kept["quantile"]) == (rule, quantile)
            for name in ("documents", "document_share", "tokens", "token_share")
        ],
        "thresholds": [t for part in parts if not part["is_pooled"] for head in part["thresholds"] for t in head],
        "histograms": [sum(one["documents"]) for head in figures["heads"] for one in head["histograms"]],
        "agreement": [one["spearman"] for one in figures["agreement"]["pairs"]],
        "lengths": [one[name] for one in figures["lengths"] for name in ("documents", "tokens", "truncated")],
        "documents": [
            value
            for number_, head in enumerate(figures["heads"])
            for name in ("best", "middle", "worst")
            for one in head[name]
            for value in (
                one["scores"][number_], *(s for i, s in enumerate(one["scores"]) if i != number_), one["n_tokens"],
                one["row"],
            )
        ],
        "speed": [
            value
            for one in figures["speed"]["moments"]
            for value in some(one["start"], one["documents_per_second"], one["tokens_per_second"],
                              one["busy"].get(one["bottleneck"]))
        ],
        "provenance": [2, 100],
    }  # fmt: skip
    assert page.numbers.keys() == expected.keys()
    for section, values in expected.items():
        assert page.numbers[section] == values, section
    assert all(len(values) > 1 for values in expected.values())


def test_markup_and_scripts_of_documents_are_shown_as_text(page, figures):
    assert any(one.excerpt.startswith(SCRIPT[:60]) for head in figures.heads for one in head.best)
    read = Page(page)
    assert "<script" not in page and not read.of("script") and not read.of("i")
    assert "&lt;script&gt;document.title = " in page and "&lt;i&gt;fr&lt;/i&gt;" in page
    assert "&lt;b&gt;&amp;amp;&lt;/b&gt;" in page
    assert "\x00" not in page and "\x1b" not in page  # HTML has no place for them
    assert "<i>fr</i>" in read.texts  # as the group is called
    cells = [one for one in read.of("td") if "excerpt" in one.get("class", "")]
    assert cells and all(one["dir"] == "auto" for one in cells)  # a text that runs the other way stays in its cell


def test_a_page_asks_for_nothing_from_anywhere(page):
    assert not re.findall(r'(?:src|href|action|data|srcset)="(?!#|data:,)[^"]*"', page)
    assert not re.findall(r"@import|url\((?!#)", page)
    read = Page(page)
    assert not {"img", "iframe", "object", "embed", "script"} & {tag for tag, _ in read.elements}


def test_a_page_can_be_read_without_seeing_it(page):
    read = Page(page)
    ids = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert len(ids) == len(set(ids)), "an id is used twice"
    links = [one["href"][1:] for one in read.of("a")]
    assert set(links) <= set(ids) and read.of("a")[0]["class"] == "skip"
    assert set(re.findall(r"(?:xlink:href=\"|url\()#([^\")]+)", page)) <= set(ids)
    assert all(one["role"] == "img" and one["aria-label"] for one in read.of("svg"))
    assert len(read.of("svg")) == len(read.of("figure")) == len(read.of("figcaption")) == 15 + 3 + 1 + 2
    assert len(read.of("table")) == len(read.of("caption")) > 9
    assert all(one.get("scope") in ("col", "row", "colgroup", "rowgroup") for one in read.of("th"))
    assert read.of("html") == [{"lang": "en"}] and len(read.of("h1")) == len(read.of("main")) == 1
    levels = [int(tag[1]) for tag, _ in read.elements if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_the_same_figures_give_the_same_page(page, figures):
    assert report_page(figures) == page


def test_plots_are_drawn_in_the_colors_of_the_page(page):
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}\b", drawn) and "var(--first)" in drawn and "var(--ink)" in drawn
    names = set(re.findall(r"var\(--([a-z]+)\)", page))
    assert all(page.count(f"--{name}: #") == 3 for name in names), "light, dark and print"
    assert "DejaVu" not in drawn and "<text" in drawn


def test_a_missing_matplotlib_names_the_extra(sources, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(EngineError, match=r"jql-engine\[report\]"):
        report(sources, html=str(tmp_path / "r.html"))
    report(sources, json_file=str(tmp_path / "r.json"))
    assert [one.name for one in tmp_path.iterdir()] == ["r.json"]


def test_sections_that_there_is_nothing_for_are_left_out(sources):
    from jql_engine.decision.report.report import take_figures

    bare = replace(sources, corpus=(), metrics=None, columns=("score_prose",), group_column=None)
    read = Page(report_page(take_figures(Sources(bare.inputs, bare.columns))))
    assert {"speed", "agreement"}.isdisjoint(read.numbers) and "lengths" in read.numbers
    assert not [one for one in read.of("td") if "excerpt" in one.get("class", "")]


def test_elements_escape_what_is_not_markup():
    assert element("p", ["<b>", Html("<b>x</b>"), 3, None], {"title": '"&'}) == (
        '<p title="&quot;&amp;">&lt;b&gt;<b>x</b>3</p>'
    )
    assert join(["a\ud800b\x9f\n"]) == "a\ufffdb\ufffd\n"
    assert share(0.12345) == '<data value="0.12345">12.35\xa0%</data>'
    assert number(None, "") == "–"


def test_cells_that_stand_for_several_rows_span_them():
    table = Table(
        "c", [Column("a", "text"), Column("b"), Column("n")], [[["x", "1", 5], [None, "2", 6]], [["y", "3", 7]]], 2
    )
    html = table.to_html()
    assert '<th class="text" dir="auto" scope="rowgroup" rowspan="2">x</th><th scope="row">1</th><td>5</td>' in html
    assert '<tr><th scope="row">2</th><td>6</td></tr>' in html and html.count("<tbody>") == 2


def test_names_with_dollar_signs_are_no_formulas():
    drawn = plots.Plots().intervals("label", [("$\\frac{$ <b>", 1.0, 0.5, 2.0)], "axis")
    assert "$\\frac{$ &lt;b&gt;" in drawn and "<b>" not in drawn
