"""Tables of a kernel report."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from focus_ray.benchmarks.kernel_times import KernelReport, KernelTime, ProductTime, StepTime

EVICTION_TARGET = 0.02
ATTENTION_TARGET = 0.7


def print_report(console: Console, report: KernelReport) -> None:
    ceilings = report.ceilings
    console.print(
        f"Ceilings: copy {ceilings.copy_bytes_per_s / 1e9:.0f} GB/s, product "
        f"{ceilings.matmul_flops_per_s / 1e12:.3g} TFLOP/s"
    )
    print_kernels(console, "Kernels", report.kernels)
    title = f"Attention with few queries; target: {ATTENTION_TARGET:.0%} of a copy's bandwidth"
    print_kernels(console, title, report.attention_few_queries)
    print_products(console, report.products)
    print_steps(console, report.steps)


def print_kernels(console: Console, title: str, rows: Sequence[KernelTime]) -> None:
    table = Table(title=title)
    names = ("kernel", "sequences x block", "µs", "GB/s", "TFLOP/s", "of ceiling", "definition µs")
    for name in names:
        table.add_column(name, justify="left" if name == "kernel" else "right")
    for row in rows:
        table.add_row(
            row.name,
            row.shape,
            f"{row.kernel_s * 1e6:.1f}",
            f"{row.bytes_per_s / 1e9:.0f}",
            f"{row.flops_per_s / 1e12:.1f}" if row.flops_per_s else "",
            f"{row.share_of_ceiling:.0%}",
            f"{row.definition_s * 1e6:.0f}",
        )
    console.print(table)


def print_products(console: Console, products: Sequence[ProductTime]) -> None:
    table = Table(title="Products of the model")
    for name in ("product", "rows", "inner", "columns", "µs", "TFLOP/s", "GB/s"):
        table.add_column(name, justify="left" if name == "product" else "right")
    for p in products:
        sizes = (str(p.rows), str(p.inner), str(p.columns))
        rates = (f"{p.flops_per_s / 1e12:.1f}", f"{p.bytes_per_s / 1e9:.0f}")
        table.add_row(p.name, *sizes, f"{p.seconds * 1e6:.1f}", *rates)
    console.print(table)


def print_steps(console: Console, steps: Sequence[StepTime]) -> None:
    table = Table(title="One step of the model, ms; its eviction: importance x2, retain, compact")
    names = ("sequences x block", "tokens in", "retained", "masked", "layers 0-1", "others")
    for name in (*names, "head", "eviction", "all", "share of eviction"):
        table.add_column(name, justify="right")
    for step in steps:
        counts = (step.num_processed, step.num_retained, step.num_retained_masked)
        parts = (step.first_layers_s, step.other_layers_s, step.head_s, step.eviction_s)
        times = (f"{part * 1e3:.3f}" for part in (*parts, step.total_s))
        share = f"{step.eviction_share:.2%}"
        table.add_row(step.shape, *map(str, counts), *times, share)
    console.print(table)
    console.print(f"Target: a share of at most {EVICTION_TARGET:.0%}.")
