"""The benchmark of windows, on a tiny model."""

from __future__ import annotations

import json

from benchmarks import table, windows


def test_every_row_has_times_memory_and_ratios(monkeypatch, tmp_path, capsys):
    tiny = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 3}
    monkeypatch.setattr(windows, "SHAPES", {"base": tiny})
    monkeypatch.setattr(windows, "LENGTHS", (128, 512))
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    windows.main("tiny", ["base"], ["cpu-fp32", "openvino-fp32"], rounds=2)
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "tiny.json")
    result = json.loads((tmp_path / "tiny.json").read_text())
    assert len(result["rows"]) == 2 * 2 * 2
    assert all(len(row["seconds"]) == 2 and row["tokens"] == 512 for row in result["rows"])
    assert all(row["peak_memory_mib"] > 20 for row in result["rows"])
    ratios = result["settings"]["ratios"]
    assert ratios["base, six layers with windows, cpu-fp32"]["flop_ratio"] == 1.242  # keys of 192 tokens and 128
    assert ratios["base, cpu-fp32"]["flop_ratio"] > 1.3
