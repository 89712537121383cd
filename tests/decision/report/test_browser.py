"""Pages as Chromium shows them: nothing on its console, every plot drawn, all texts readable, at every width."""

from __future__ import annotations

import json
import re

import pytest

from jql_engine.decision.comparison import compare
from jql_engine.decision.report.comparison import certificate_page, comparison_page
from tests.decision.report.browser import CHROMIUM, picture, show
from tests.decision.report.certificates import certificate
from tests.decision.test_comparison import paired

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")
DESKTOP, PHONE = 1_200, 375
CONTRAST = 4.5  # of WCAG 2.2, level AA, for texts of any size
SMALLEST = 8.5  # pixels of a text in a plot


@pytest.fixture(scope="module")
def pages(page) -> dict[str, str]:
    return {
        "report": page,
        "comparison": comparison_page(compare(paired()), "a/<b>", "c"),
        "certificate": certificate_page(json.loads(json.dumps(certificate()))),
    }


@pytest.mark.parametrize("name", ["report", "comparison", "certificate"])
@pytest.mark.parametrize(("width", "dark"), [(DESKTOP, False), (DESKTOP, True), (PHONE, False), (PHONE, True)])
def test_a_page_is_drawn_and_can_be_read(pages, tmp_path, name, width, dark):
    found = show(pages[name], tmp_path, width, dark=dark)
    assert found["console"] == []
    assert len(found["plots"]) == pages[name].count("<svg") > 0
    for plot in found["plots"]:
        assert plot["width"] > 100 and plot["height"] > 50 and plot["shapes"] > 1, plot
        assert plot["smallest"] >= SMALLEST, plot
    assert len(found["tables"]) == pages[name].count("<table") and min(found["tables"]) > 20
    assert found["texts"] > 100 and found["contrast"][0][0] >= CONTRAST, found["contrast"]
    assert found["overflow"] <= found["width"], "the page itself scrolls to the side"
    assert found["title"] == re.search("<title>(.*?)</title>", pages[name])[1], "a script of a document was run"
    assert (sum(found["ground"][:3]) < 150) == dark


@pytest.mark.parametrize(("width", "dark"), [(DESKTOP, False), (DESKTOP, True), (PHONE, False)])
def test_a_picture_of_a_page_has_its_ground_and_its_texts(page, tmp_path, width, dark):
    from PIL import Image

    image = (
        Image.open(picture(page, tmp_path, "shot", (width, 1_600), dark=dark)).convert("L").crop((0, 0, width, 1_600))
    )
    shades = image.histogram()
    ground, most = image.getpixel((2, 2)), max(range(256), key=lambda shade: shades[shade])
    assert ground == most and (ground < 60) == dark
    inked = sum(count for shade, count in enumerate(shades) if abs(shade - ground) > 100)
    assert 0.01 < inked / (width * 1_600) < 0.4


def test_a_page_that_could_not_be_read_would_be_noticed(page, tmp_path):
    """What is measured is what is shown: faint texts, wide contents, no plots, messages."""
    spoiled = page.replace("--faint: #535c67", "--faint: #a0a0a0").replace(
        "</main>", "<div style='width: 3000px'>x</div></main>"
    )
    spoiled = spoiled.replace("</body>", "<script>console.error('spoiled')</script></body>").replace(
        "<svg ", "<svg hidden "
    )
    spoiled = spoiled.replace("svg { display: block;", "svg[hidden] { display: none; } svg {")
    found = show(spoiled, tmp_path, DESKTOP)
    assert found["contrast"][0][0] < CONTRAST and found["overflow"] > found["width"]
    assert all(plot["width"] == 0 for plot in found["plots"]) and "spoiled" in found["console"][0]
