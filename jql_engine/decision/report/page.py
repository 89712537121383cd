"""HTML pages that stand alone: no network, no script; every word from outside is shown as text.

A page is made of Html, which is markup already. Any other string that is put into an element is escaped. Numbers are
written as <data value="0.25">25.00 %</data>: rounded for a reader, and exact for a program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal, TypeAlias

from jql_engine.decision.report.style import STYLE

NO_VALUE = "–"


class Html(str):
    """Markup; whoever makes one answers for what is in it."""

    __slots__ = ()


Content: TypeAlias = Html | str | int | None
Attributes: TypeAlias = Mapping[str, str]


def element(tag: str, content: Sequence[Content], attributes: Attributes | None = None) -> Html:
    """An element; content that is not Html is escaped, None is left out."""
    given = "".join(f' {name}="{escape(printable(value))}"' for name, value in (attributes or {}).items())
    return Html(f"<{tag}{given}>{join(content)}</{tag}>")


def join(content: Sequence[Content]) -> Html:
    """Several pieces after one another; what is not Html is escaped."""
    return Html("".join(_markup(one) for one in content if one is not None))


def paragraph(*content: Content) -> Html:
    """A paragraph."""
    return element("p", content)


def number(value: float | None, shown: str) -> Html:
    """A number as it is and as it is shown; a dash for none."""
    return text(NO_VALUE) if value is None else element("data", [shown], {"value": repr(value)})


def count(value: int | None) -> Html:
    """A number of documents or tokens."""
    return number(value, "" if value is None else f"{value:,}")


def score(value: float | None) -> Html:
    """A score, to four significant digits."""
    return number(value, "" if value is None else f"{value:.4g}")


def share(value: float | None) -> Html:
    """A share, in percent."""
    return number(value, "" if value is None else percent(value))


def percent(value: float) -> str:
    """A share, as it is shown."""
    return f"{100 * value:.2f}\N{NO-BREAK SPACE}%"


def text(content: str) -> Html:
    """Any string as markup that shows it."""
    return Html(escape(printable(content)))


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: numbers stand at the right, texts at the left; an excerpt gets room."""

    title: Content
    kind: Literal["number", "text", "excerpt"] = "number"

    @property
    def attributes(self) -> Attributes:
        """Of its cells. Texts may run from right to left."""
        if self.kind == "number":
            return {}
        return {"class": "text" if self.kind == "text" else "text excerpt", "dir": "auto"}


@dataclass(frozen=True, slots=True)
class Table:
    """A table, in blocks of rows; the first `n_names` cells of a row say what it is about.

    A cell that is None is covered by the one above it, in the same block.
    """

    caption: Content
    columns: Sequence[Column]
    blocks: Sequence[Sequence[Sequence[Content]]]
    n_names: int = 1
    spans: Sequence[tuple[str, int]] = field(default_factory=tuple)  # titles over several columns, and of how many

    def to_html(self) -> Html:
        """In a box of its own, which scrolls where the window is too narrow."""
        head = [self._titles()] if not self.spans else [self._spanning(), self._titles()]
        bodies = [element("tbody", [self._row(block, i) for i in range(len(block))]) for block in self.blocks]
        inner = [element("caption", [self.caption]), element("thead", head), *bodies]
        # A box that scrolls can be reached by the keyboard, and has a name for it.
        return element("div", [element("table", inner)], {"class": "wide", "tabindex": "0"})

    def _titles(self) -> Html:
        titles = [element("th", [one.title], {"scope": "col", **one.attributes}) for one in self.columns]
        return element("tr", titles)

    def _spanning(self) -> Html:
        titles = [
            element("th", [title], {"scope": "colgroup", "colspan": str(width)}) if title else _empty(width)
            for title, width in self.spans
        ]
        return element("tr", titles)

    def _row(self, block: Sequence[Sequence[Content]], at: int) -> Html:
        cells = []
        for i, (cell, column) in enumerate(zip(block[at], self.columns, strict=True)):
            if cell is None:
                continue
            if i >= self.n_names:
                cells.append(element("td", [cell], column.attributes))
                continue
            rows = 1 + next((k for k, row in enumerate(block[at + 1 :]) if row[i] is not None), len(block) - at - 1)
            over = {"scope": "rowgroup", "rowspan": str(rows)} if rows > 1 else {"scope": "row"}
            cells.append(element("th", [cell], {**column.attributes, **over}))
        return element("tr", cells)


def _empty(width: int) -> Html:
    return element("td", [], {"colspan": str(width)})


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page, which its contents link to."""

    name: str  # of the link: letters and dashes
    title: str
    content: Sequence[Html]


def side_by_side(plots: Sequence[tuple[Html, Content]]) -> Html:
    """Plots with their captions, as many beside one another as there is room for."""
    inner = [element("figure", [plot, element("figcaption", [caption])]) for plot, caption in plots]
    return element("div", inner, {"class": "figures"})


def page(title: str, lead: Sequence[Html], sections: Sequence[Section]) -> str:
    """A whole document."""
    links = [element("li", [element("a", [one.title], {"href": f"#{one.name}"})]) for one in sections]
    body = [
        element("a", ["Skip to the contents"], {"class": "skip", "href": "#main"}),
        element("header", [element("h1", [title]), *lead]),
        element("nav", [element("ul", links)], {"aria-label": "Contents"}),
        element("main", [_section(one) for one in sections], {"id": "main", "tabindex": "-1"}),
    ]
    head = [
        Html('<meta charset="utf-8">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark">'),
        Html('<link rel="icon" href="data:,">'),  # or the browser asks a server for one
        element("title", [title]),
        Html(f"<style>{STYLE}</style>"),
    ]
    return f"<!DOCTYPE html>\n{element('html', [element('head', head), element('body', body)], {'lang': 'en'})}\n"


def _section(section: Section) -> Html:
    title = element("h2", [section.title], {"id": f"{section.name}-title"})
    return element(
        "section", [title, *section.content], {"id": section.name, "aria-labelledby": f"{section.name}-title"}
    )


def _markup(content: Html | str | int) -> str:
    return content if isinstance(content, Html) else text(str(content))


def printable(content: str) -> str:
    """Control characters and lone surrogates, which HTML has no place for, as replacement characters."""
    if content.isprintable():
        return content
    return "".join("\ufffd" if _is_control(one) else one for one in content)


def _is_control(one: str) -> bool:
    return (one < " " and one not in "\n\t") or "\x7f" <= one <= "\x9f" or "\ud800" <= one <= "\udfff"
