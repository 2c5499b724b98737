"""Layouts under load as a table, as JSON and as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from focus_ray.benchmarks.line_chart import Line, Words, draw_lines
from focus_ray.benchmarks.report_file import write_json
from focus_ray.benchmarks.scaling_rows import Comparison, Row, compare
from focus_ray.benchmarks.serving_rows import Spread

COLUMNS = (
    *("layout", "each", "tok/s", "speed", "effic.", "step ms", "step", "TTFT p50", "p50", "p90"),
    *("p99", "tok/step", "proc.", "events/s", "exact match", "differ"),
)
NOTE = (
    "Steady stretch. layout: engines x ranks of each; each: requests in flight for each engine; "
    "speed, effic.: output tokens/s over those of 1x1, and that over the number of devices; step: "
    "of 1x1 over this one's; TTFT in ms, latencies p50 to p99 in s; tok/step: decoded per sequence "
    "and step; proc.: processed per decoded token; differ: of answers, from the first ones given "
    "to the same prompts."
)


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """A table for each model, a line for each run."""
    for model in dict.fromkeys(row.model for row in rows):
        table = Table(title=model, caption=NOTE, caption_justify="left", pad_edge=False)
        for name in COLUMNS:
            table.add_column(name, justify="right", no_wrap=name not in ("exact match", "differ"))
        for row in _of(rows, model):
            table.add_row(*_cells(row, compare(row, rows)))
        console.print(table)


def write_report(
    path: Path, facts: Mapping[str, Any], rows: Sequence[Row], skipped: Sequence[str]
) -> None:
    """All numbers. ``facts`` say what was run on what; ``skipped`` what there was no time for."""
    found = []
    for row in rows:
        comparison = compare(row, rows)
        against = None if comparison is None else asdict(comparison)
        found.append({**row.as_json(), "against_one": against})
    write_json(path, {**facts, "rows": found, "skipped": list(skipped)})


def draw(rows: Sequence[Row], title: str) -> str:
    """Speed against devices: a line for each model, kind of layout and concurrency.

    Raises:
        ValueError: there is nothing to draw, for no row has one to be compared with.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if (comparison := compare(row, rows)) is None:
            continue
        for kind in _kinds(row):
            name = f"{row.model}, {kind}, {row.concurrency} each"
            points.setdefault(name, []).append((row.layout.num_devices, comparison.speed))
    lines = [Line(name, found) for name, found in points.items() if len(found) > 1]
    most = max((x for line in lines for x, _ in line.points), default=1.0)
    ideal = Line("as many times as devices", [(1, 1), (most, most)], is_guide=True)
    subtitle = "over HTTP, steady stretch, requests in flight for each engine"
    return draw_lines([*lines, ideal], Words(title, subtitle, "devices", "times one device"))


def _kinds(row: Row) -> tuple[str, ...]:
    """The lines that a row is a point of; one device is the first point of every one."""
    layout = row.layout
    engines, ranks, both = "engines", "ranks of one engine", f"engines of {layout.num_ranks} ranks"
    if layout.num_devices == 1:
        return engines, ranks
    return (engines if layout.num_ranks == 1 else ranks if layout.num_replicas == 1 else both,)


def _of(rows: Sequence[Row], model: str) -> list[Row]:
    found = [row for row in rows if row.model == model]
    return sorted(found, key=lambda row: (row.layout.num_ranks, row.layout, row.concurrency))


def _cells(row: Row, comparison: Comparison | None) -> list[str]:
    figures, score = row.figures, row.exact_match
    ratios: list[float | None] = [None, None, None]
    if comparison is not None:
        ratios = [comparison.speed, comparison.efficiency, comparison.step_speed]
    speed, efficiency, step_speed = ratios
    e2e = None if figures is None else figures.e2e
    return [
        str(row.layout),
        str(row.concurrency),
        f"{row.tokens_per_s:.0f}",
        _number(speed),
        "-" if efficiency is None else f"{efficiency:.1%}",
        f"{row.step_s * 1e3:.2f}",
        _number(step_speed),
        _median_ms(None if figures is None else figures.ttft),
        *(_number(None if e2e is None else getattr(e2e, p)) for p in ("median", "p90", "p99")),
        _number(None if figures is None else figures.tokens_per_step),
        _number(None if figures is None else figures.processed_per_decoded),
        f"{row.events_per_s:.0f}",
        "-" if score is None else f"{score.num_right}/{score.num_problems}",
        f"{row.num_different}/{row.num_compared}",
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _median_ms(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.median * 1e3:.1f}"
