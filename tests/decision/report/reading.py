"""What is in a page, for tests: sections, tables, exact numbers, attributes."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """Reads a page, and makes sure that every element is closed in its place."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str]]] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.numbers: dict[str, list[float]] = {}  # by section
        self.texts: list[str] = []
        self._section = ""
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        attributes = {name: value or "" for name, value in attrs}
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self.open.append((tag, attributes))
        if tag == "section":
            self._section = attributes["id"]
        if tag == "data":
            self.numbers.setdefault(self._section, []).append(float(attributes["value"]))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag, tag

    def handle_data(self, data):
        self.texts.append(data)

    def of(self, tag: str) -> list[dict[str, str]]:
        """Attributes of the elements with this tag."""
        return [attributes for name, attributes in self.elements if name == tag]
