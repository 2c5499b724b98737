"""Does routing by occupancy make answers come sooner? Many replicas, simulated.

    python benchmarks/routing.py --run throughput.json --json FILE
    python benchmarks/routing.py --num-replicas 256 --num-routers 8 --load skewed --seeds 3

The code that chooses is the one that serves; replicas are simulated step by step, with step times
fitted to a recorded run of ``bench throughput``. Several routers see loads that are some 0.2 s old.
All ways of choosing get the same requests, seed by seed, so differences are paired. Under the loads
``skewed`` and ``conversations`` some replicas are slowed down.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import mean, quantiles
from typing import Any

from rich.console import Console
from rich.table import Table

from focus_ray.benchmarks.report_file import write_json
from focus_ray.benchmarks.routing_cluster import Cluster, Outcome, SimulatedReplica
from focus_ray.benchmarks.routing_load import ARRIVALS, LOADS, Load, Request
from focus_ray.benchmarks.routing_rivals import ROUTERS
from focus_ray.benchmarks.step_times import StepTimes

H100_SDAR_8B = StepTimes(floor_s=6.39e-3, fixed_s=2.67e-3, per_token_s=23.7e-6)
"""Fitted to ``2026-11-22-throughput-h100.json``."""

DEFAULT = "power_of_two"
"""Ray Serve's own, which others are compared with."""

WARM_UP = 0.2
"""Share of the time after which latencies count."""

SAMPLE = Load("", "poisson", requests_per_s=2000.0, duration_s=10.0, num_routers=1)


@dataclass(frozen=True)
class Run:
    """One way of choosing, one load, one seed. Latencies are end to end; choosing is CPU time."""

    load: str
    arrivals: str
    router: str
    seed: int
    num_requests: int
    mean_s: float
    p50_s: float
    p99_s: float
    choosing_p50_ms: float
    choosing_p99_ms: float
    slow_share: float


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--router", nargs="+", choices=ROUTERS, default=[*ROUTERS])
    parser.add_argument("--load", nargs="+", choices=LOADS, default=[*LOADS])
    parser.add_argument("--arrivals", nargs="+", choices=ARRIVALS, default=[*ARRIVALS])
    parser.add_argument("--num-replicas", type=int, default=64)
    parser.add_argument("--num-routers", type=int, default=4, help="each sees its own requests")
    parser.add_argument("--num-slow", type=int, default=1, help="replicas that are slowed down")
    parser.add_argument(
        "--slowness", type=float, default=3.0, help="how many times their steps take"
    )
    parser.add_argument(
        "--utilization",
        type=float,
        default=0.7,
        help="work that arrives over what replicas can do, prefix caching left out",
    )
    parser.add_argument(
        "--duration", type=float, default=60.0, help="seconds in which requests arrive"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--run", type=Path, help="JSON of bench throughput, to fit step times to")
    parser.add_argument("--json", type=Path, help="where the numbers are written")
    args = parser.parse_args(arguments)
    for name in ("num_replicas", "num_routers", "slowness", "utilization", "duration", "seeds"):
        if getattr(args, name) <= 0:
            flag = name.replace("_", "-")
            parser.error(f"--{flag} must be more than 0, got {getattr(args, name)}")
    if not 0 <= args.num_slow <= args.num_replicas:
        parser.error(f"--num-slow must be 0 to {args.num_replicas}, got {args.num_slow}")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    command = sys.argv[1:] if arguments is None else list(arguments)
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        times = StepTimes.read(args.run) if args.run else H100_SDAR_8B
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    console.print(
        f"a step takes {times.fixed_s * 1e3:.2f} ms and {times.per_token_s * 1e6:.1f} µs a token, "
        f"at least {times.floor_s * 1e3:.2f} ms; saturated at {times.saturation_tokens:.0f} tokens"
    )
    runs: list[Run] = []
    for run in simulate_all(args, times):
        runs.append(run)
        console.print(
            f"{run.load}, {run.arrivals}, seed {run.seed}: {run.router} p99 {run.p99_s:.2f} s"
        )
    print_runs(console, runs)
    if args.json:
        facts = {
            "command": shlex.join(["python", "benchmarks/routing.py", *command]),
            "date": datetime.date.today().isoformat(),
            "python": platform.python_version(),
            "arguments": {k: v for k, v in vars(args).items() if k not in ("run", "json")},
            "step_times": {**asdict(times), "saturation_tokens": times.saturation_tokens},
        }
        rows = [asdict(run) for run in runs]
        write_json(args.json, {**facts, "comparisons": compare(runs), "runs": rows})
        console.print(f"written to {args.json}")


def simulate_all(args: argparse.Namespace, times: StepTimes) -> Iterator[Run]:
    """Every load and seed with every way of choosing; each run as soon as it is known."""
    for kind in args.load:
        num_slow = 0 if kind == "uniform" else args.num_slow
        slowness = [args.slowness] * num_slow + [1.0] * (args.num_replicas - num_slow)
        rate = rate_for(kind, args.utilization, slowness, times)
        for arrivals in args.arrivals:
            load = Load(kind, arrivals, rate, args.duration, args.num_routers)
            for seed in range(args.seeds):
                requests = load.draw(seed)
                for router in args.router:
                    outcome = simulate(requests, router, slowness, times, args.num_routers, seed)
                    yield figures_of(load, router, seed, requests, outcome, num_slow)


def rate_for(kind: str, utilization: float, slowness: Sequence[float], times: StepTimes) -> float:
    """Requests per second that keep the replicas so busy, at their best tokens per second."""
    sample = Load(kind, SAMPLE.arrivals, SAMPLE.requests_per_s, SAMPLE.duration_s, 1).draw(0)
    work = mean(request.total_work for request in sample)
    return utilization * sum(1.0 / each for each in slowness) / (times.per_token_s * work)


def simulate(
    requests: Sequence[Request],
    router: str,
    slowness: Sequence[float],
    times: StepTimes,
    num_routers: int,
    seed: int,
) -> Outcome:
    """One run; replicas are called by their numbers, the slow ones first."""
    names = [f"{number}" for number in range(len(slowness))]
    replicas = [
        SimulatedReplica(name, times, factor) for name, factor in zip(names, slowness, strict=True)
    ]
    routers = [ROUTERS[router](names, Random(f"{seed} {n}")) for n in range(num_routers)]
    return Cluster(replicas, routers, Random(seed)).run(requests)


def figures_of(
    load: Load, router: str, seed: int, requests: Sequence[Request], outcome: Outcome, num_slow: int
) -> Run:
    """Latencies of what arrived after the warm-up."""
    latencies = [
        outcome.latencies_s[request.name]
        for request in requests
        if request.arrives_s >= WARM_UP * load.duration_s
    ]
    cuts = quantiles(latencies, n=100)
    choosing = quantiles(outcome.choosing_s, n=100)
    at_slow = sum(outcome.requests_at[f"{number}"] for number in range(num_slow))
    return Run(
        load=load.kind,
        arrivals=load.arrivals,
        router=router,
        seed=seed,
        num_requests=len(latencies),
        mean_s=mean(latencies),
        p50_s=cuts[49],
        p99_s=cuts[98],
        choosing_p50_ms=choosing[49] * 1e3,
        choosing_p99_ms=choosing[98] * 1e3,
        slow_share=at_slow / len(requests),
    )


def compare(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each way of choosing against Serve's default, seed by seed: by how much its p99 is lower."""
    base = {(run.load, run.arrivals, run.seed): run for run in runs if run.router == DEFAULT}
    found: list[dict[str, Any]] = []
    for key in dict.fromkeys((run.load, run.arrivals, run.router) for run in runs):
        group = [run for run in runs if (run.load, run.arrivals, run.router) == key]
        pairs = [
            (run, base[run.load, run.arrivals, run.seed])
            for run in group
            if (run.load, run.arrivals, run.seed) in base
        ]
        lower = [1.0 - run.p99_s / other.p99_s for run, other in pairs]
        found.append(
            {
                **dict(zip(("load", "arrivals", "router"), key, strict=True)),
                "p50_s": mean(run.p50_s for run in group),
                "p99_s": mean(run.p99_s for run in group),
                "choosing_p99_ms": max(run.choosing_p99_ms for run in group),
                "slow_share": mean(run.slow_share for run in group),
                "p99_lower_by": mean(lower) if lower else None,
                "p99_lower_by_least": min(lower, default=None),
                "p99_lower_by_most": max(lower, default=None),
            }
        )
    return found


def print_runs(console: Console, runs: Sequence[Run]) -> None:
    """One line for each load and way of choosing, over all seeds."""
    table = Table(
        title="End-to-end latency",
        caption=f"p50, p99: means over seeds. lower: p99 against {DEFAULT}'s at the same seed, "
        "mean and range. slow: share of requests at replicas that are slowed down. choosing: p99 "
        "of the CPU time to choose, the worst seed.",
        caption_justify="left",
    )
    for name in ("load", "arrivals", "router"):
        table.add_column(name)
    for name in ("p50 s", "p99 s", "lower", "range", "slow", "choosing ms"):
        table.add_column(name, justify="right")
    last = None
    for row in compare(runs):
        if last not in (None, (row["load"], row["arrivals"])):
            table.add_section()
        last = (row["load"], row["arrivals"])
        lower = row["p99_lower_by"]
        least, most = row["p99_lower_by_least"], row["p99_lower_by_most"]
        table.add_row(
            *(row["load"], row["arrivals"], row["router"]),
            f"{row['p50_s']:.3f}",
            f"{row['p99_s']:.3f}",
            "" if lower is None else f"{lower:.1%}",
            "" if lower is None else f"{least:.1%} to {most:.1%}",
            f"{row['slow_share']:.2%}",
            f"{row['choosing_p99_ms']:.2f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
