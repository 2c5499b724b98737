"""Closed-loop runs as tables and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from focus_ray.benchmarks.report_file import write_json
from focus_ray.benchmarks.throughput_rows import Comparison, Distribution, Row

COLUMNS = (
    *("mode", "conc.", "tok/s", "req/s", "TTFT p50", "TPOT p50", "p50", "p90", "p99"),
    *("tok/step", "proc.", "ret.", "step ms", "host ms", "busy", "GiB", "exact match"),
)
NOTE = (
    "Steady stretch of each run (rows with *: the whole run, too short for one). TTFT, TPOT in ms, "
    "latencies p50 to p99 in s; tok/step: decoded per sequence and step; proc., ret.: tokens "
    "processed, and retained, per decoded token; host: its own work per step; busy: GPU; GiB: peak."
)


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """One line per run."""
    table = Table(title="Closed loop", caption=NOTE, caption_justify="left", pad_edge=False)
    for name in COLUMNS:
        left = name == "mode"
        table.add_column(
            name, justify="left" if left else "right", overflow="fold", no_wrap=not left
        )
    concurrency = rows[0].concurrency if rows else 0
    for row in rows:
        if row.concurrency != concurrency:
            table.add_section()
            concurrency = row.concurrency
        table.add_row(*_cells(row))
    console.print(table)


def print_comparisons(console: Console, comparisons: Sequence[Comparison]) -> None:
    """What eviction saves in tokens, and what of it arrives as time."""
    if not comparisons:
        return
    table = Table(
        title="Against block at the same threshold and prompts",
        caption="speed: output tokens/s over block's. processed, computed: block's tokens per "
        "output token over this one's, entering layer 0, and in all layers with prefill. "
        "reached: speed over computed.",
        caption_justify="left",
        pad_edge=False,
    )
    for name in ("mode", "baseline", "conc.", "speed", "processed", "computed", "reached"):
        table.add_column(name, justify="left" if name in ("mode", "baseline") else "right")
    for each in comparisons:
        ratios = (each.speed, each.processed, each.computed)
        table.add_row(
            each.mode,
            each.baseline,
            str(each.concurrency),
            *(f"{ratio:.2f}" for ratio in ratios),
            f"{each.reached:.0%}",
        )
    console.print(table)


def write_report(
    path: Path, facts: Mapping[str, Any], rows: Sequence[Row], comparisons: Sequence[Comparison]
) -> None:
    """All numbers. ``facts`` say what was run on what; folders are made."""
    report = {
        **facts,
        "rows": [row.as_json() for row in rows],
        "comparisons": [each.as_json() for each in comparisons],
    }
    write_json(path, report)


def _cells(row: Row) -> list[str]:
    shown = row.shown
    score = row.exact_match.get("all")
    return [
        row.mode + ("" if row.steady else " *"),
        str(row.concurrency),
        f"{shown.output_tokens_per_s:.0f}",
        f"{shown.requests_per_s:.2f}",
        _median_ms(shown.first_token),
        _median_ms(shown.per_token),
        *(
            "-" if shown.latency is None else f"{getattr(shown.latency, name):.2f}"
            for name in ("p50", "p90", "p99")
        ),
        f"{shown.tokens_per_step:.2f}",
        f"{shown.processed_per_decoded:.2f}",
        f"{shown.retained_per_decoded:.2f}",
        f"{shown.step_s * 1e3:.2f}",
        f"{shown.host_s_per_step * 1e3:.2f}",
        "-" if row.profile is None else f"{row.profile.busy_share:.1%}",
        "-" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**30:.1f}",
        "-" if score is None else f"{score.num_right}/{score.num_problems}",
    ]


def _median_ms(times: Distribution | None) -> str:
    return "-" if times is None else f"{times.p50 * 1e3:.1f}"
