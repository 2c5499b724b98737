"""A run against an endpoint as tables."""

from __future__ import annotations

from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from focus_ray.benchmarks.serving_rows import ServingFigures

LATE_S = 0.01
"""A client that sends so late at the 99th percentile is a part of what it measures."""

NOTE = (
    "TTFT: time to the first text; TPOT: per token after the first; ITL: between events with text, "
    "which may bring several tokens; E2E: to the end. All from when a request was due."
)


def print_figures(console: Console, figures: ServingFigures, is_limited: bool) -> None:
    """Two tables, and what went wrong.

    Args:
        is_limited: requests may have waited for a place, so that lateness says nothing of the
            client.
    """
    counts = Table(title="Requests and tokens", show_header=False)
    counts.add_column()
    counts.add_column(justify="right")
    for name, value in _counts(figures):
        counts.add_row(name, value)
    console.print(counts)
    times = Table(title="Latency, ms", caption=NOTE, caption_justify="left")
    times.add_column("")
    for name in ("mean", "median", "p90", "p99"):
        times.add_column(name, justify="right")
    for name in ("ttft", "tpot", "itl", "e2e"):
        if (spread := getattr(figures, name)) is not None:
            cells = [f"{value * 1e3:.2f}" for value in asdict(spread).values()]
            times.add_row(name.upper(), *cells)
    if times.row_count:
        console.print(times)
    for kind, count in figures.errors.items():
        console.print(f"[red]{count} x {kind}:[/]", end=" ")
        console.print(figures.messages[kind], markup=False, soft_wrap=True)
    if not is_limited and figures.lateness is not None and figures.lateness.p99 > LATE_S:
        console.print(
            f"[yellow]requests were sent late, by {figures.lateness.p99 * 1e3:.0f} ms at the 99th "
            "percentile:[/] this client is at its limit; run it on other cores, or several of it"
        )


def _counts(figures: ServingFigures) -> list[tuple[str, str]]:
    rows = [
        ("successful requests", f"{figures.completed}"),
        ("failed requests", f"{figures.failed}"),
        ("duration, s", f"{figures.duration_s:.2f}"),
        ("prompt tokens", f"{figures.prompt_tokens}"),
        ("output tokens", f"{figures.output_tokens}"),
        ("requests/s", f"{figures.request_throughput:.2f}"),
        ("output tokens/s", f"{figures.output_throughput:.1f}"),
        ("total tokens/s", f"{figures.total_token_throughput:.1f}"),
        ("events with text/s", f"{figures.num_events / figures.duration_s:.1f}"),
    ]
    ratios = (
        ("tokens per step", figures.tokens_per_step),
        ("processed per decoded token", figures.processed_per_decoded),
        ("retained per decoded token", figures.retained_per_decoded),
    )
    return rows + [(name, f"{value:.2f}") for name, value in ratios if value is not None]
