"""docs/throughput.svg, the chart of the README, from results/cpu-zen5-2-cores.json.

    python -m benchmarks.chart

Bars are tokens per second of one run, medians; a row of the reference and the rows of this engine stand side by side.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "cpu-zen5-2-cores.json"
CHART = Path(__file__).parents[1] / "docs" / "throughput.svg"
# What people run, and what this engine makes of the same graph precision.
BARS = (
    ("transformers, sorted and padded to 8,192 tokens", "fp32", "transformers fp32, padded batches"),
    ("transformers, one at a time", "fp32", "transformers fp32, one at a time"),
    ("jql-engine, parquet to parquet", "cpu-fp32", "jql-run fp32, parquet to parquet"),
    ("transformers, sorted and padded to 8,192 tokens", "bf16", "transformers bf16, padded batches"),
    ("transformers, one at a time", "bf16", "transformers bf16, one at a time"),
    ("jql-engine, parquet to parquet", "openvino-bf16", "jql-run bf16, parquet to parquet"),
)
WIDTH, LABEL, ROW = 720, 270, 30


def draw(results: dict[str, object]) -> str:
    """The chart as SVG, readable on a light and on a dark page."""
    speeds = {(row["name"], row["variant"]): row["tokens_per_second"] for row in results["rows"]}  # type: ignore[attr-defined]
    values = [(label, float(speeds[name, variant])) for name, variant, label in BARS]
    longest = max(value for _, value in values)
    lines = []
    for i, (label, value) in enumerate(values):
        y, width = 34 + i * ROW, (WIDTH - LABEL - 80) * value / longest
        color = "#1a7f5a" if label.startswith("jql") else "#8a8f98"
        lines.append(f'<text x="{LABEL - 8}" y="{y + 15}" text-anchor="end">{escape(label)}</text>')
        lines.append(f'<rect x="{LABEL}" y="{y}" width="{width:.0f}" height="20" rx="2" fill="{color}"/>')
        lines.append(f'<text x="{LABEL + width + 6:.0f}" y="{y + 15}">{value:,.0f}</text>')
    height = 34 + len(values) * ROW + 6
    title = "Tokens per second on two CPU cores (Zen 5), Snowflake's shape, 48 real documents, one run"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title}">',
            "<style>text{font:13px sans-serif;fill:#24292f}",
            "@media(prefers-color-scheme:dark){text{fill:#e6edf3}}</style>",
            f'<text x="0" y="18" font-weight="bold">{title}</text>',
            *lines,
            "</svg>",
            "",
        ]
    )


def main() -> None:
    """Write the chart."""
    CHART.write_text(draw(json.loads(RESULTS.read_text())), encoding="utf-8")


if __name__ == "__main__":
    main()
