"""Plots as inline SVG, drawn by matplotlib: text stays text, colors are the page's, and the same figures give the
same bytes.

matplotlib knows colors as numbers alone. So plots are drawn in colors that stand for the page's, and these are put in
their place: a plot is light on a light page and dark on a dark one.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jql_engine.decision.report.page import Html, element, printable
from jql_engine.errors import EngineError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What matplotlib draws in, and the page's color for it; no two of them, and none of them black or white.
INK, FAINT, LINE = "#010203", "#010204", "#010205"
SERIES = ("#010206", "#010207", "#010208", "#010209", "#01020a", "#01020b")
COLORS = dict(
    zip(
        (INK, FAINT, LINE, *SERIES),
        ("ink", "faint", "line", "first", "second", "third", "fourth", "fifth", "sixth"),
        strict=True,
    )
)
HEIGHT = 1.5  # inches of a small plot; 96 pixels each on a page
WIDTH = 2.6
NARROWEST = 560  # pixels
PIXELS = 96 / 72  # of a page, a point of matplotlib's
METADATA = dict.fromkeys(("Date", "Creator", "Type", "Format"))  # none: two days would give two files
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "jql-engine",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9 / PIXELS * 1.25,
    "axes.edgecolor": LINE,
    "axes.labelcolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "text.color": INK,
    "text.parse_math": False,  # names may have a dollar sign
}


def check_matplotlib() -> None:
    """Raise EngineError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise EngineError(
            "a page has plots, and matplotlib, which draws them, is not installed: pip install 'jql-engine[report]'"
        ) from error


@dataclass(slots=True)
class Plots:
    """Draws the plots of one page, and numbers them: their ids must differ."""

    n_drawn: int = field(default=0)

    def histogram(self, label: str, edges: Sequence[float], shares: Sequence[float], of_all: Sequence[float]) -> Html:
        """Shares of documents by score as an area, and those of all documents as a line."""

        def draw(axes: Axes) -> None:
            axes.stairs(shares, edges, fill=True, color=SERIES[0], alpha=0.55, linewidth=0)
            axes.stairs(of_all, edges, color=INK, linewidth=0.9)
            axes.set_ylim(0, 1.05 * max(*shares, *of_all, 1e-9))
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
            axes.locator_params(axis="x", nbins=4)

        return self._drawn(label, draw, WIDTH, HEIGHT)

    def bars(self, label: str, names: Sequence[str], shares: Sequence[float], axis: str) -> Html:
        """A bar for each name."""

        def draw(axes: Axes) -> None:
            axes.bar(range(len(names)), [100 * share for share in shares], color=SERIES[0], width=0.8)
            axes.set_xticks(range(len(names)), names)
            axes.set_ylabel(axis)

        return self._drawn(label, draw, 6.2, 2.4)

    def hexagons(
        self, label: str, centres: NDArray[np.float64], counts: NDArray[np.int64], step: tuple[float, float]
    ) -> Html:
        """Counts in hexagons around `centres` [n, 2]: the darker, the more."""

        def draw(axes: Axes) -> None:
            from matplotlib.collections import PolyCollection

            width, height = step
            corners = np.array([(0.5, -1 / 6), (0.5, 1 / 6), (0, 1 / 3), (-0.5, 1 / 6), (-0.5, -1 / 6), (0, -1 / 3)])
            shapes = centres[:, None, :] + corners * (width, height)
            strength = 0.12 + 0.88 * np.log1p(counts) / np.log1p(counts.max(initial=1))
            for level in np.unique(levels := np.round(strength, 1)):  # one style for each level keeps the page small
                chosen = PolyCollection(shapes[levels == level], facecolors=[SERIES[0]], linewidths=0, alpha=level)
                axes.add_collection(chosen)
            axes.autoscale_view()
            axes.locator_params(nbins=5)

        return self._drawn(label, draw, 2.9, 2.7)

    def lines(self, label: str, times: Sequence[float], series: Sequence[tuple[str, Sequence[float]]]) -> Html:
        """Values over time, one below the other, in steps; a `times` more than values: their edges."""

        def draw(axes: Sequence[Axes]) -> None:
            for one, (name, values), color in zip(axes, series, SERIES, strict=False):
                one.fill_between(times, [*values, values[-1]], step="post", color=color, alpha=0.3, linewidth=0)
                one.step(times, [*values, values[-1]], where="post", color=color, linewidth=1.2)
                one.set_ylim(0, 1.08 * max(*values, 1e-9))
                one.set_ylabel(name)
                one.locator_params(axis="y", nbins=4)
                one.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
            axes[-1].set_xlabel("minutes since the first line")

        return self._several(label, draw, 6.8, 1.7 * len(series), len(series))

    def stacked(self, label: str, times: Sequence[float], series: Sequence[tuple[str, Sequence[float]]]) -> Html:
        """Shares over time, on top of one another, with a legend."""

        def draw(axes: Axes) -> None:
            floor = np.zeros(len(times))
            for (name, values), color in zip(series, SERIES, strict=False):
                top = floor + np.array([*values, values[-1]])
                axes.fill_between(times, floor, top, step="post", color=color, linewidth=0, label=name)
                floor = top
            axes.set_ylabel("% of busy time")
            axes.set_xlabel("minutes since the first line")
            axes.set_ylim(0, 100)
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(series), frameon=False)

        return self._drawn(label, draw, 6.8, 2.5)

    def intervals(self, label: str, rows: Sequence[tuple[str, float, float, float]], axis: str) -> Html:
        """A point and its interval for each name, from top to bottom."""

        def draw(axes: Axes) -> None:
            heights = range(len(rows), 0, -1)
            for height, (_, value, low, high) in zip(heights, rows, strict=True):
                axes.plot([low, high], [height, height], color=SERIES[0], linewidth=2, solid_capstyle="butt")
                axes.plot([value], [height], marker="o", markersize=5, color=SERIES[0], clip_on=False)
            axes.set_yticks(list(heights), [name if len(name) <= 28 else f"{name[:27]}…" for name, *_ in rows])
            axes.set_ylim(0.4, len(rows) + 0.6)
            axes.set_xlim(left=0)
            axes.set_xlabel(axis)
            axes.xaxis.grid(visible=True, color=LINE, linewidth=0.5)
            axes.set_axisbelow(True)

        return self._drawn(label, draw, 6.2, 0.7 + 0.24 * len(rows))

    def _drawn(self, label: str, draw: Callable[[Axes], None], width: float, height: float) -> Html:
        return self._several(label, lambda axes: draw(axes[0]), width, height, 1)

    def _several(
        self, label: str, draw: Callable[[Sequence[Axes]], None], width: float, height: float, n_axes: int
    ) -> Html:
        """`n_axes` plots below one another that share their x axis, `width` by `height` inches."""
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        self.n_drawn += 1
        with rc_context(SETTINGS), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has fonts for names in any script
            figure = Figure(figsize=(width, height), layout="constrained")
            FigureCanvasSVG(figure)
            draw(list(figure.subplots(n_axes, 1, sharex=True, squeeze=False)[:, 0]))
            out = io.StringIO()
            figure.savefig(out, format="svg", transparent=True, metadata=METADATA)
        return _inlined(out.getvalue(), label, f"plot{self.n_drawn}", width)


def _inlined(svg: str, label: str, name: str, width: float) -> Html:
    """A whole SVG file as an element of a page: with its own ids, the page's colors, and a name for who cannot see."""
    inner = printable(svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")])
    inner = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", inner, flags=re.DOTALL)  # the page has its own
    box = re.search(r'viewBox="([^"]+)"', svg)
    assert box is not None
    inner = re.sub(r'\b(id="|href="#|url\(#)', lambda found: f"{found[0]}{name}-", inner)
    for color, page_color in COLORS.items():
        inner = inner.replace(color, f"var(--{page_color})")
    inner = re.sub(r"<[^>]+>", _shortened, inner)
    inner = re.sub(r" style=\"([^\"]*?)font-family: [^;\"]*; ?", r' style="\1', inner)
    pixels = round(width * 96)
    attributes = {"role": "img", "aria-label": label, "viewBox": box[1], "width": str(pixels)}
    attributes["style"] = f"min-width: {min(pixels, NARROWEST)}px"  # on a phone wide plots scroll, and stay readable
    return element("svg", [Html(inner)], attributes)


def _shortened(tag: re.Match[str]) -> str:
    """A tag on one line, its numbers to hundredths of a point."""
    return re.sub(r"(\.\d\d)\d+", r"\1", re.sub(r"\s*\n\s*", " ", tag[0]))
