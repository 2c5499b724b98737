"""Does routing by occupancy make answers come sooner? Real engines behind a real Ray Serve.

    python benchmarks/routing_served.py --json FILE
    python benchmarks/routing_served.py --load uniform --requests-per-s 12 --rounds 10

One application serves the model twice, each with engines of its own: once behind the router by
occupancy, once behind Serve's choice of two. Both get the same requests at the same times, one
after the other and in turns, so differences are paired. Under the load ``skewed`` few answers among
many short ones are very long, and one engine of each is slowed down: its process is stopped for a
share of every few milliseconds, as by a neighbour who takes its cores.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import os
import platform
import shlex
import signal
import statistics
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import numpy as np
from rich.console import Console
from rich.table import Table

from focus_ray.benchmarks.arrivals import arrival_times
from focus_ray.benchmarks.report_file import write_json
from focus_ray.benchmarks.serving_client import COMPLETIONS, Client
from focus_ray.benchmarks.serving_load import send_all
from focus_ray.benchmarks.serving_rows import figures_of
from focus_ray.config import DEFAULT_MODEL, EngineConfig
from focus_ray.errors import FocusRayError
from focus_ray.serve.args import ServeArgs
from focus_ray.serve.local import LocalServer
from focus_ray.serve.model_args import ModelArgs, RouterName

OURS: RouterName = "occupancy"
SERVES: RouterName = "power_of_two"
STOP_PERIOD_S = 0.03
NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class Load:
    """Answers of a run.

    Args:
        short, long: least and greatest number of tokens.
        long_share: of requests that ask for a long one.
        stopped: share of the time in which one engine stands still.
    """

    short: tuple[int, int]
    long: tuple[int, int]
    long_share: float
    stopped: float


LOADS = {
    "skewed": Load(short=(16, 64), long=(150, 250), long_share=0.05, stopped=0.67),
    "uniform": Load(short=(32, 96), long=(32, 96), long_share=0.0, stopped=0.0),
}


@dataclass(frozen=True)
class Round:
    """Both ways of choosing under one load and one seed. Latencies are end to end, in seconds."""

    load: str
    seed: int
    first: str
    num_requests: int
    failed: dict[str, int]
    output_tokens: dict[str, int]
    p50_s: dict[str, float]
    p99_s: dict[str, float]

    @property
    def p99_ratio(self) -> float:
        return self.p99_s[OURS] / self.p99_s[SERVES]


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    rounds: list[Round] = []
    try:
        measure(args, console, rounds)
    except (FocusRayError, OSError) as error:
        raise SystemExit(str(error)) from error
    except KeyboardInterrupt:
        console.print("interrupted; these are the rounds that were done")
    if not rounds:
        raise SystemExit(1)
    print_rounds(console, rounds)
    if args.json is not None:
        command = sys.argv[1:] if arguments is None else list(arguments)
        report = {
            "command": shlex.join(["python", "benchmarks/routing_served.py", *command]),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "model": args.model,
            "num_replicas": args.num_replicas,
            "requests_per_s": args.requests_per_s,
            "rounds": [{**asdict(each), "p99_ratio": each.p99_ratio} for each in rounds],
        }
        write_json(args.json, report)
        console.print(f"written to {args.json}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, help="bundled name, directory or hub id")
    add("--num-replicas", type=int, default=3, help="engines behind each router")
    add("--max-num-seqs", type=int, default=16, help="places of an engine")
    add("--load", choices=LOADS, action="append", help="may be repeated; default: all")
    add("--requests-per-s", type=float, default=2.0, help="mean rate of a Poisson process")
    add("--num-requests", type=int, default=60, help="of a round, for each router")
    add("--rounds", type=int, default=6, help="of each load")
    add("--port", type=int, default=8000, help="of the server")
    add("--json", type=Path, metavar="FILE", help="all numbers")
    args = parser.parse_args(arguments)
    for name in ("num_replicas", "max_num_seqs", "requests_per_s", "num_requests", "rounds"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {getattr(args, name)}")
    return args


def measure(args: argparse.Namespace, console: Console, rounds: list[Round]) -> None:
    """Append all rounds of all loads; who is first changes from one to the next."""
    num_cpus = 0.9 * (os.cpu_count() or 1) / (2 * args.num_replicas)
    engine = EngineConfig(model=args.model, max_num_seqs=args.max_num_seqs)
    models = tuple(
        ModelArgs(
            engine=engine,
            served_model_name=(router,),
            router=router,
            num_replicas=args.num_replicas,
            num_cpus=num_cpus,
        )
        for router in (OURS, SERVES)
    )
    server = LocalServer(
        ServeArgs(models=models, num_ingress_replicas=1),
        "127.0.0.1",
        args.port,
        tell=lambda stage: console.print(stage, style="dim"),
    )
    with server:
        for load in args.load or LOADS:
            with slowed(LOADS[load].stopped):
                asyncio.run(one_round(args, server.url, load, -1, OURS))  # warms up
                for seed in range(args.rounds):
                    first = (OURS, SERVES)[seed % 2]
                    rounds.append(asyncio.run(one_round(args, server.url, load, seed, first)))
                    console.print(
                        f"{load}, round {seed + 1} of {args.rounds}: p99 is "
                        f"{rounds[-1].p99_ratio:.2f} of Serve's"
                    )


async def one_round(
    args: argparse.Namespace, url: str, load: str, seed: int, first: RouterName
) -> Round:
    """The same requests for one, and when all are answered for the other."""
    bodies = requests(LOADS[load], args.num_requests, seed)
    arrivals = arrival_times(len(bodies), args.requests_per_s, 1.0, seed)
    figures = {}
    timeout = aiohttp.ClientTimeout(total=600)
    for router in (first, SERVES if first == OURS else OURS):
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            client = Client(session, url + COMPLETIONS, {})
            asked = [{**body, "model": router} for body in bodies]
            sent = await send_all(client, asked, arrivals, None)
        figures[router] = figures_of(sent), np.asarray([x.finished_s - x.due_s for x in sent])
    return Round(
        load=load,
        seed=seed,
        first=first,
        num_requests=len(bodies),
        failed={name: found.failed for name, (found, _) in figures.items()},
        output_tokens={name: found.output_tokens for name, (found, _) in figures.items()},
        p50_s={name: float(np.percentile(times, 50)) for name, (_, times) in figures.items()},
        p99_s={name: float(np.percentile(times, 99)) for name, (_, times) in figures.items()},
    )


def requests(load: Load, number: int, seed: int) -> list[dict[str, Any]]:
    """Completions of exactly so many tokens, behind prompts that share nothing."""
    rng = Random(f"{seed}/requests")
    bodies = []
    for _ in range(number):
        tokens = rng.randint(*(load.long if rng.random() < load.long_share else load.short))
        numbers = " ".join(str(rng.randrange(1000)) for _ in range(12))
        bodies.append(
            {
                "prompt": f"{numbers}: tell me what these numbers have in common.",
                "max_tokens": tokens,
                "ignore_eos": True,
                "temperature": 0.0,
            }
        )
    return bodies


@contextlib.contextmanager
def slowed(share: float) -> Iterator[None]:
    """One engine of each model stands still for a share of the time."""
    if not share:
        yield
        return
    processes = [one_engine(f"engine-{router}") for router in (OURS, SERVES)]
    ended = threading.Event()

    def strike() -> None:
        while not ended.is_set():
            for number, seconds in ((signal.SIGSTOP, share), (signal.SIGCONT, 1.0 - share)):
                for process in processes:
                    os.kill(process, number)
                ended.wait(seconds * STOP_PERIOD_S)
        for process in processes:
            os.kill(process, signal.SIGCONT)

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def one_engine(deployment: str) -> int:
    """Process of one engine of a deployment, below this process.

    Raises:
        ValueError: there is none.
    """
    name = f"ray::ServeReplica:focus-ray:{deployment}"
    for entry in sorted(Path("/proc").glob("[0-9]*")):
        with contextlib.suppress(OSError):
            if (entry / "cmdline").read_bytes().decode(errors="replace").startswith(name):
                return int(entry.name)
    raise ValueError(f"no process is called {name}")


def print_rounds(console: Console, rounds: Sequence[Round]) -> None:
    """Medians of the rounds of each load, and how sure their ratio is."""
    table = Table("load", "rounds", "router", "p50 s", "p99 s", "p99 against Serve's", "failed")
    for load in dict.fromkeys(each.load for each in rounds):
        of_load = [each for each in rounds if each.load == load]
        low, high = interval([each.p99_ratio for each in of_load])
        middle = statistics.median(each.p99_ratio for each in of_load)
        for router in (SERVES, OURS):
            table.add_row(
                load,
                str(len(of_load)),
                router,
                f"{statistics.median(each.p50_s[router] for each in of_load):.2f}",
                f"{statistics.median(each.p99_s[router] for each in of_load):.2f}",
                f"{middle:.2f} ({low:.2f} to {high:.2f})" if router == OURS else "",
                str(sum(each.failed[router] for each in of_load)),
            )
    console.print(table)


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Where the median lies, 95 times of 100, by drawing rounds anew."""
    drawn = np.random.default_rng(0).choice(np.asarray(ratios), (NUM_RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(low), float(high)


if __name__ == "__main__":
    main()
