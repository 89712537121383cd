from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jql_engine.errors import UnsafeNameError
from jql_engine.names import RelativeName


@pytest.mark.parametrize("text", ["a", "a/b.parquet", "...", "..a/b..", "a b/ü", "-", "~", "s3:", "C:\\x", "%2e%2e/x"])
def test_plain_segments_stay_what_they_are(text):
    name = RelativeName(text)
    assert str(name) == text and "/".join(name.segments) == text
    assert name.below(Path("/out")) == Path("/out") / text


@pytest.mark.parametrize(
    "text",
    ["", "/", "/tmp/x", "a//b", "a/", ".", "..", "./a", "../a", "a/../../b", "a/..", "a/./b", "a\0b", "a/\udcff"],
)
def test_whatever_could_lead_elsewhere_is_refused_by_name(text):
    with pytest.raises(UnsafeNameError) as raised:
        RelativeName(text)
    assert repr(text) in str(raised.value) and "rename" in str(raised.value)


@given(st.lists(st.sampled_from([".", "..", "", "a", "/", "x.parquet", "\0"]), max_size=6))
def test_no_name_leads_out_of_its_folder(segments):
    text = "/".join(segments)
    try:
        name = RelativeName(text)
    except UnsafeNameError:
        return
    place = name.below(Path("/root/folder"))
    assert Path("/root/folder") in Path(*place.parts).parents and ".." not in place.parts


def test_the_folders_above_a_file():
    assert RelativeName("a/b/c.parquet").folders == ("a/b", "a")
    assert RelativeName("c.parquet").folders == ()
    assert RelativeName("a/c.jsonl").with_name("c.parquet") == RelativeName("a/c.parquet")
