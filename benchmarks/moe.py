"""How fast is a mixture of experts, next to reading the experts it touches or to its arithmetic?

    python benchmarks/moe.py --json FILE

Layers of LLaDA2.0-mini, SDAR-30B-A3B and LLaDA2.0-flash with random weights, in bfloat16, with cold
caches. The *bound* is the larger of two times: that to read the weights of the experts which the
routing at hand touches, at the best bandwidth found in the same run, and that of the products of
all (token, expert) pairs at the rate of a large product. *Spread* routing draws all experts alike,
*skewed* routing has popular ones.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.table import Table

from focus_ray.benchmarks.moe_work import QUICK_SHAPES, SHAPES, SKEWS, Experts, work_of
from focus_ray.benchmarks.report_file import write_json
from focus_ray.benchmarks.run_facts import run_facts
from focus_ray.benchmarks.timing import Timer, measure_ceilings
from focus_ray.kernels.launch import can_launch
from focus_ray.kernels.moe import moe, moe_reference
from focus_ray.kernels.moe_combine import launch_combine
from focus_ray.kernels.moe_placement import place
from focus_ray.kernels.moe_products import expert_product
from focus_ray.kernels.moe_tiles import moe_tiles
from focus_ray.kernels.routing import Routing

TOKENS = (1, 8, 64, 512, 2048, 8192)
QUICK_TOKENS = (1, 8)
TARGET, TARGET_TOKENS = 0.6, 64


@dataclass(frozen=True)
class Limits:
    """The best that the device does: bytes moved by a copy or a mere read, and a large product."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class MoeTime:
    """One row of the table; seconds. ``parts_s`` are of kernels alone, empty without them."""

    shape: str
    routing: str
    num_tokens: int
    touched: int
    fullest: int
    num_bytes: int
    num_flops: int
    bound_s: float
    moe_s: float
    moe_definition_s: float
    route_s: float
    route_definition_s: float
    parts_s: dict[str, float]

    @property
    def share_of_bound(self) -> float:
        return self.bound_s / self.moe_s


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", nargs="+", choices=SHAPES, default=[*SHAPES], help="layers; default all"
    )
    parser.add_argument("--tokens", nargs="+", type=int, help=f"default {TOKENS}")
    parser.add_argument("--json", type=Path, help="where the numbers are written")
    parser.add_argument(
        "--quick", action="store_true", help="tiny layers on the CPU, to see the script work"
    )
    args = parser.parse_args(arguments)
    args.tokens = args.tokens or list(QUICK_TOKENS if args.quick else TOKENS)
    if min(args.tokens) < 1:
        parser.error(f"--tokens must be at least 1, got {min(args.tokens)}")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    command = sys.argv[1:] if arguments is None else list(arguments)
    console = Console(width=None if sys.stdout.isatty() else 140)
    if args.quick:
        timer, dtype = Timer(torch.device("cpu"), budget_s=0.002), torch.float32
        layers, largest = list(QUICK_SHAPES.values()), (1 << 20, 64)
    elif torch.cuda.is_available():
        timer, dtype = Timer(torch.device("cuda")), torch.bfloat16
        layers, largest = [SHAPES[name] for name in args.shape], (1 << 30, 8192)
    else:
        raise SystemExit("these layers need a GPU; --quick takes tiny ones on the CPU")
    found: list[MoeTime] = []
    with torch.inference_mode():
        limits = measure_limits(timer, *largest)
        console.print(
            f"Limits: {limits.bytes_per_s / 1e9:.0f} GB/s, {limits.flops_per_s / 1e12:.3g} TFLOP/s"
        )
        for shape in layers:
            experts = Experts(shape, timer.device, dtype)
            rows = [
                time_moe(timer, limits, experts, num_tokens, routing)
                for num_tokens in args.tokens
                for routing in SKEWS
            ]
            print_times(console, shape.name, rows)
            found += rows
            del experts  # before the next layer's weights take their place
    console.print(f"Target: {TARGET:.0%} of the bound from {TARGET_TOKENS} tokens on.")
    if args.json:
        report = {
            "command": shlex.join(["python", "benchmarks/moe.py", *command]),
            **run_facts(timer.device.type == "cuda"),
            "triton": triton.__version__,
            "limits": asdict(limits),
            "layers": [asdict(shape) for shape in layers],
            "times": [{**asdict(row), "share_of_bound": row.share_of_bound} for row in found],
        }
        write_json(args.json, report)
        console.print(f"written to {args.json}")


def measure_limits(timer: Timer, num_bytes: int, matmul_size: int) -> Limits:
    ceilings = measure_ceilings(timer, num_bytes, matmul_size)
    words = torch.ones(num_bytes // 8, dtype=torch.int64, device=timer.device)
    read_bytes_per_s = num_bytes / timer.seconds(words.amax)
    return Limits(max(ceilings.copy_bytes_per_s, read_bytes_per_s), ceilings.matmul_flops_per_s)


def time_moe(
    timer: Timer, limits: Limits, experts: Experts, num_tokens: int, routing_name: str
) -> MoeTime:
    x_TD = experts.tokens(num_tokens)
    logits_TE = experts.logits(num_tokens, SKEWS[routing_name])
    routing = experts.route(logits_TE)
    weights = (experts.gate_up_E2ID, experts.down_EDI)
    work = work_of(experts.shape, routing, experts.dtype.itemsize)
    return MoeTime(
        experts.shape.name,
        routing_name,
        num_tokens,
        **asdict(work),
        bound_s=max(work.num_bytes / limits.bytes_per_s, work.num_flops / limits.flops_per_s),
        moe_s=timer.seconds(lambda: moe(x_TD, routing, *weights)),
        moe_definition_s=timer.seconds(
            lambda: moe_reference(x_TD, routing, *weights, None), recordable=False
        ),
        route_s=timer.seconds(lambda: experts.route(logits_TE)),
        route_definition_s=timer.seconds(lambda: experts.route_by_definition(logits_TE)),
        parts_s=time_parts(timer, x_TD, routing, experts) if can_launch(x_TD) else {},
    )


def time_parts(
    timer: Timer, x_TD: torch.Tensor, routing: Routing, experts: Experts
) -> dict[str, float]:
    """Each launch alone: they overlap a little in the whole, and find inputs in the cache."""
    expert_Tk = routing.expert_Tk
    num_experts, places = experts.shape.num_experts, experts.shape.num_chosen
    tiles = moe_tiles(x_TD.device, x_TD.dtype, expert_Tk.numel(), num_experts)
    placement = place(expert_Tk, num_experts, tiles.block_t)

    def gate_up() -> torch.Tensor:
        return expert_product(
            x_TD,
            experts.gate_up_E2ID,
            placement,
            tiles.gate_up,
            pairs_per_row=places,
            gated=True,
        )

    hidden_PI = gate_up()

    def down() -> torch.Tensor:
        return expert_product(hidden_PI, experts.down_EDI, placement, tiles.down, pairs_per_row=1)

    out_TkD = down().unflatten(0, (-1, places))
    return {
        "place": timer.seconds(lambda: place(expert_Tk, num_experts, tiles.block_t)),
        "gate_up": timer.seconds(gate_up),
        "down": timer.seconds(down),
        "combine": timer.seconds(lambda: launch_combine(out_TkD, routing, num_experts, None)),
    }


def print_times(console: Console, title: str, rows: Sequence[MoeTime]) -> None:
    table = Table(title=f"{title}; times in µs")
    parts = list(rows[0].parts_s)
    names = ("routing", "tokens", "experts", "fullest", "bound", "moe", "of bound", *parts)
    for name in (*names, "definition", "route", "its definition"):
        table.add_column(name, justify="left" if name == "routing" else "right")
    for row in rows:
        times = (*row.parts_s.values(), row.moe_definition_s, row.route_s, row.route_definition_s)
        table.add_row(
            row.routing,
            str(row.num_tokens),
            str(row.touched),
            str(row.fullest),
            f"{row.bound_s * 1e6:.1f}",
            f"{row.moe_s * 1e6:.1f}",
            f"{row.share_of_bound:.0%}",
            *(f"{seconds * 1e6:.1f}" for seconds in times),
        )
    console.print(table)


if __name__ == "__main__":
    main()
