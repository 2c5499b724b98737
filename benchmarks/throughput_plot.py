"""Output tokens per second against concurrency, one line per way of decoding."""

from __future__ import annotations

from collections.abc import Sequence

from focus_ray.benchmarks.line_chart import Line, Words, draw_lines
from focus_ray.benchmarks.throughput_rows import Row


def draw(rows: Sequence[Row], title: str, subtitle: str) -> str:
    """The SVG. Points are steady stretches, or whole runs where a run has none.

    Raises:
        ValueError: there is nothing to draw.
    """
    modes = dict.fromkeys(row.mode for row in rows)
    lines = [
        Line(
            mode,
            [(row.concurrency, row.shown.output_tokens_per_s) for row in rows if row.mode == mode],
        )
        for mode in modes
    ]
    return draw_lines(lines, Words(title, subtitle, "requests in flight", "output tokens/s"))
