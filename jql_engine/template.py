"""A document that is put together from several columns of the input: `{url} {text}`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter

import pyarrow as pa

TEXT = "text"  # the field that stands for the documents, whatever their column is called


@dataclass(frozen=True, slots=True)
class Template:
    """Literal text and fields in braces, as in Python's format strings; `{{` and `}}` are braces themselves."""

    source: str

    def __post_init__(self) -> None:
        """Raises ValueError where it is no template, or one without `{text}`."""
        try:
            pieces = list(Formatter().parse(self.source))
        except ValueError as error:
            raise ValueError(f"template {self.source!r} is malformed: {error}; write {{{{ for a brace") from error
        for _, field, spec, conversion in pieces:
            if field is not None and (not field or spec or conversion):
                raise ValueError(f"template {self.source!r}: expected names of columns in braces, and nothing else")
        if TEXT not in [field for _, field, _, _ in pieces]:
            raise ValueError(f"template {self.source!r} has no {{{TEXT}}}, which stands for the documents")

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields besides `{text}`, each once."""
        fields = (field for _, field, _, _ in Formatter().parse(self.source))
        return tuple(dict.fromkeys(field for field in fields if field not in (None, TEXT)))

    def fill(self, columns: Mapping[str, pa.Array]) -> pa.LargeStringArray:
        """The documents [N] of `columns`, large_string [N] by field; null where any of them is."""
        import pyarrow.compute as pc  # a quarter of the package's import time, and rarely needed

        pieces: list[pa.Array | pa.Scalar] = []
        for literal, field, _, _ in Formatter().parse(self.source):
            pieces += [pa.scalar(literal, pa.large_string())] if literal else []
            pieces += [] if field is None else [columns[field]]
        return pc.binary_join_element_wise(*pieces, pa.scalar("", pa.large_string()), null_handling="emit_null")
