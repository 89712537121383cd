"""Speed and bottleneck from the lines of --metrics."""

from __future__ import annotations

import pytest

from jql_engine.decision.report.metrics import read_speed
from jql_engine.errors import InputError


def test_speed_over_time_adds_up_to_the_lines(made):
    found = read_speed(made.metrics)
    assert (found.chunks, found.documents, found.tokens) == (40, 2_000, 40_780)
    assert (found.failures, found.memory_bytes, found.damaged_lines) == (1, 139 << 20, 1)
    assert found.began == "2026-01-01T00:00:00+00:00" and found.ended == "2026-01-01T00:19:32+00:00"
    assert len(found.moments) == 10
    seconds = 60 * found.minutes / 10
    assert sum(one.documents_per_second for one in found.moments) * seconds == pytest.approx(2_000)
    assert sum(one.tokens_per_second for one in found.moments) * seconds == pytest.approx(40_780)


def test_the_bottleneck_is_the_stage_that_worked_longest_at_the_time(made):
    found = read_speed(made.metrics)
    assert found.bottleneck == "execute"
    assert [one.bottleneck for one in found.moments] == ["execute"] * 5 + ["write"] * 5
    assert found.moments[0].busy["execute"] == pytest.approx(1.5 / 2.1)
    assert all(sum(one.busy.values()) == pytest.approx(1) for one in found.moments)


def test_a_file_of_something_else_is_an_error(tmp_path):
    file = tmp_path / "m.jsonl"
    for content in ("", "{}\n", '{"time": "yesterday", "rows": 1, "tokens": 1, "seconds": {}}\n'):
        file.write_text(content)
        with pytest.raises(InputError, match="none of the lines that jql-run --metrics writes"):
            read_speed(file)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_speed(tmp_path / "gone")
