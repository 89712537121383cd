from __future__ import annotations

import pyarrow as pa
import pytest

from jql_engine.template import Template


def fill(source: str, **columns: list[str | None]) -> list[str | None]:
    return Template(source).fill({n: pa.array(v, pa.large_string()) for n, v in columns.items()}).to_pylist()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{url}\n\n{text}", ["a\n\nx", None, None, "\n\n"]),
        ("passage: {text}", ["passage: x", "passage: y", None, "passage: "]),
        ("{text}{text}{{{url}}}", ["xx{a}", None, None, "{}"]),
        ("{text}", ["x", "y", None, ""]),
    ],
)
def test_a_template_is_filled_row_by_row_and_null_stays_null(source, expected):
    assert fill(source, text=["x", "y", None, ""], url=["a", None, "c", ""]) == expected


def test_the_columns_are_the_fields_beside_the_text():
    assert Template("{url} {text} {page title} {url}").columns == ("url", "page title")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{url}", "has no {text}, which stands for the documents"),
        ("", "has no {text}"),
        ("{text", "is malformed: expected '}' before end of string; write {{ for a brace"),
        ("{text}}", "is malformed"),
        ("{} {text}", "expected names of columns in braces, and nothing else"),
        ("{text!r}", "and nothing else"),
        ("{text:>9}", "and nothing else"),
    ],
)
def test_what_is_no_template_is_an_error(source, message):
    with pytest.raises(ValueError, match="template") as error:
        Template(source)
    assert message in str(error.value)
