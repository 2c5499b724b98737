"""Tables of limits, and of runs beside them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from focus_ray.benchmarks.roofline_bound import Ceilings, Roofline

SHOWN_ROWS = (1, 16, 64, 256, 1024, 4096)


def print_ceilings(
    console: Console, device: str, square_flops_per_s: float, ceilings: Ceilings
) -> None:
    console.print(
        f"{device}: copy {ceilings.copy_bytes_per_s / 1e9:.0f} GB/s, weights read at up to "
        f"{ceilings.bytes_per_s / 1e9:.0f} GB/s, large square product "
        f"{square_flops_per_s / 1e12:.3g} TFLOP/s"
    )
    table = Table(title="Products of the model: best rate, and µs by rows (padded where faster)")
    for name in ("product", "weight MB", "best TFLOP/s", "weights GB/s", *map(str, SHOWN_ROWS)):
        table.add_column(name, justify="left" if name == "product" else "right")
    for name, times in ceilings.products.items():
        table.add_row(
            name,
            f"{times.product.weight_bytes(ceilings.itemsize) / 1e6:.1f}",
            f"{times.flops_per_s / 1e12:.3g}",
            f"{times.weights_per_s(ceilings.itemsize) / 1e9:.0f}",
            *(f"{times.seconds(rows) * 1e6:.1f}" for rows in SHOWN_ROWS),
        )
    console.print(table)


def print_rooflines(console: Console, rooflines: Sequence[Roofline]) -> None:
    table = Table(title="Mean step of each run, ms, and its share at the ceiling")
    names = ("run", "measured", "layers", "head", "keys, values", "ceiling", "fraction", "own")
    for name in (*names, "of reading weights"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for each in rooflines:
        parts = (each.step_s, each.layers_s, each.head_s, each.kv_s, each.ceiling_s)
        table.add_row(
            each.label,
            *(f"{seconds * 1e3:.3f}" for seconds in parts),
            f"{each.fraction:.1%}",
            f"{each.own_fraction:.1%}",
            f"{each.step_per_weights:.2f} x",
        )
    console.print(table)
    for each in rooflines:
        if each.assumed:
            console.print(f"{each.label}: not recorded, so {'; '.join(each.assumed)}.")
