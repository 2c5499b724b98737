"""What does the way over HTTP cost? The server of ``focus-ray serve`` against the bare engine.

    focus-ray bench http                                            # a real model
    focus-ray bench http --step-ms 24 --max-num-seqs 64             # an engine that only takes time

Both answer the same requests with as many in flight, more than the engine has places for, so that
it is full to the end. The bare engine is stepped in a loop in this process; the server runs beside
it as users start it, and is streamed from. They take turns, and every pair gives one ratio of
output tokens per second.

Where engine and HTTP share cores, as with a real model on a CPU, the engine loses what the rest
takes. On a GPU it does not: ``--step-ms`` shows that case on any machine. Step times and tokens per
step of GPUs are in ``benchmarks/results``. Two engines on one GPU share its memory: give each less
than half of it by ``--gpu-memory-utilization``.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import torch
from rich.console import Console
from rich.table import Table

from focus_ray.benchmarks.closed_loop import ClosedLoop, LoopEngine
from focus_ray.benchmarks.report_file import write_json
from focus_ray.benchmarks.run_facts import run_facts
from focus_ray.benchmarks.serving_client import CHAT, COMPLETIONS, Client
from focus_ray.benchmarks.serving_load import send_all
from focus_ray.benchmarks.serving_prompts import bodies_of
from focus_ray.benchmarks.serving_rows import figures_of
from focus_ray.benchmarks.stepped_engine import VOCAB_SIZE, SteppedEngine, stepped_factory
from focus_ray.benchmarks.workload import Lengths, Prompt, bundled_prompts, choose, random_prompts
from focus_ray.config import DEFAULT_MODEL, EngineConfig
from focus_ray.errors import FocusRayError
from focus_ray.sampling import SamplingParams
from focus_ray.serve.args import ServeArgs
from focus_ray.serve.local import LocalServer

IN_FLIGHT = 1.25
"""Requests for each place of the engine: a place that becomes free is taken in the next step."""


@dataclass(frozen=True)
class Pair:
    """One turn of each, on the same requests. Tokens are those that clients received."""

    bare_tokens: int
    bare_tokens_per_s: float
    http_tokens: int
    http_tokens_per_s: float
    events_per_s: float

    @property
    def ratio(self) -> float:
        return self.http_tokens_per_s / self.bare_tokens_per_s


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    command = sys.argv[1:] if arguments is None else list(arguments)
    try:
        pairs = measure(args, console)
    except (FocusRayError, OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    print_pairs(console, pairs)
    if args.json is not None:
        report = {
            "command": shlex.join(["focus-ray", "bench", "http", *command]),
            **run_facts(args.step_ms is None and torch.cuda.is_available()),
            "pairs": [{**asdict(pair), "ratio": pair.ratio} for pair in pairs],
            "ratio": statistics.median(pair.ratio for pair in pairs),
        }
        write_json(args.json, report)
        console.print(f"written to {args.json}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, help="bundled name, directory or hub id")
    add("--step-ms", type=float, help="an engine that only takes so long per step, for the model")
    add("--tokens-per-step", type=float, default=3.1, help="of each of its sequences; at least 1")
    add("--max-num-seqs", type=int, default=64, help="places of the engine")
    add("--num-prompts", type=int, help="requests of a turn; default: 4 x --max-num-seqs")
    add("--output-len", type=int, default=256, help="most tokens of an answer")
    add("--pairs", type=int, default=3, help="turns of each")
    add("--gpu-memory-utilization", type=float, help="of each of the two engines")
    add("--port", type=int, default=8000, help="of the server")
    add("--seed", type=int, default=0, help="of prompts and lengths")
    add("--json", type=Path, metavar="FILE", help="all numbers")
    args = parser.parse_args(arguments)
    for name in ("max_num_seqs", "output_len", "pairs", "tokens_per_step"):
        if getattr(args, name) < 1:
            parser.error(
                f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}"
            )
    if args.step_ms is not None and args.step_ms <= 0:
        parser.error(f"--step-ms must be above 0, got {args.step_ms}")
    args.num_prompts = args.num_prompts or 4 * args.max_num_seqs
    if args.num_prompts < in_flight(args):
        parser.error(f"--num-prompts must be at least {in_flight(args)}, got {args.num_prompts}")
    return args


def in_flight(args: argparse.Namespace) -> int:
    places: int = args.max_num_seqs
    return math.ceil(IN_FLIGHT * places)


def measure(args: argparse.Namespace, console: Console) -> list[Pair]:
    """All pairs, the bare engine first in every other one."""
    fields: dict[str, Any] = {"model": args.model, "max_num_seqs": args.max_num_seqs}
    if args.gpu_memory_utilization is not None:
        fields["gpu_memory_utilization"] = args.gpu_memory_utilization
    config = EngineConfig(**fields)
    factory = None
    if args.step_ms is not None:
        factory = stepped_factory(args.step_ms / 1e3, args.tokens_per_step, args.max_num_seqs)
    engine, prompts = bare_engine(args, config)
    server = LocalServer(
        ServeArgs(engine=config, max_start_attempts=1),
        "127.0.0.1",
        args.port,
        tell=lambda stage: console.print(stage, style="dim"),
        engine_factory=factory,
    )
    pairs: list[Pair] = []
    with server:
        endpoint = CHAT if args.step_ms is None else COMPLETIONS
        bodies = bodies_of(prompts, endpoint, {"model": args.model, "temperature": 0.0})
        url = server.url + endpoint
        over_http(args, url, bodies[: in_flight(args)])  # warms up all that is on the way
        bare(args, engine, prompts[: in_flight(args)])
        for number in range(args.pairs):
            turns: list[Callable[[], tuple[float, ...]]] = [
                lambda: bare(args, engine, prompts),
                lambda: over_http(args, url, bodies),
            ]
            order = (0, 1) if number % 2 == 0 else (1, 0)
            done = {place: turns[place]() for place in order}
            bare_figures, http_figures = done[0], done[1]
            pairs.append(
                Pair(int(bare_figures[0]), bare_figures[1], int(http_figures[0]), *http_figures[1:])
            )
            console.print(f"pair {number + 1} of {args.pairs}: {pairs[-1].ratio:.1%}")
    return pairs


def bare_engine(args: argparse.Namespace, config: EngineConfig) -> tuple[LoopEngine, list[Prompt]]:
    """The engine of this process, and the requests for both."""
    output_len, prompt_len = Lengths(args.output_len), Lengths(200, 0.5)
    if args.step_ms is not None:
        source = random_prompts(
            VOCAB_SIZE, (), prompt_len, Lengths(args.output_len, 0.5), args.seed
        )
        stepped = SteppedEngine(args.step_ms / 1e3, args.tokens_per_step, args.max_num_seqs)
        return stepped, choose(source, args.num_prompts, stepped.limits.max_model_len)
    from focus_ray.engine.engine import Engine

    engine = Engine(config)
    if engine.tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer, so there is no text to stream")
    bundled = bundled_prompts(engine.tokenizer, prompt_len, output_len, args.seed)
    return engine, choose(bundled, args.num_prompts, engine.limits.max_model_len)


def bare(
    args: argparse.Namespace, engine: LoopEngine, prompts: Sequence[Prompt]
) -> tuple[int, float]:
    """Output tokens, and per second."""
    params = SamplingParams(temperature=0.0)
    requests = [prompt.request(f"{number}", params) for number, prompt in enumerate(prompts)]
    record = ClosedLoop(engine, requests, in_flight(args), lambda: None).run()
    num_tokens = sum(request.num_tokens for request in record.requests)
    return num_tokens, num_tokens / record.whole.wall_s


def over_http(
    args: argparse.Namespace, url: str, bodies: Sequence[dict[str, Any]]
) -> tuple[int, float, float]:
    """Output tokens, and per second; events per second.

    Raises:
        ValueError: a request failed.
    """

    async def run() -> tuple[int, float, float]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            client = Client(session, url, {})
            found = figures_of(await send_all(client, bodies, [0.0] * len(bodies), in_flight(args)))
        if found.failed:
            raise ValueError(f"{found.failed} requests failed: {found.messages}")
        rate = found.num_events / found.duration_s
        return found.output_tokens, found.output_throughput, rate

    return asyncio.run(run())


def print_pairs(console: Console, pairs: Sequence[Pair]) -> None:
    """One line per pair, and the median of their ratios."""
    table = Table(title="Output tokens per second")
    for name in ("bare engine", "over HTTP", "events/s", "ratio"):
        table.add_column(name, justify="right")
    for pair in pairs:
        table.add_row(
            f"{pair.bare_tokens_per_s:.0f}",
            f"{pair.http_tokens_per_s:.0f}",
            f"{pair.events_per_s:.0f}",
            f"{pair.ratio:.1%}",
        )
    console.print(table)
    console.print(f"median {statistics.median(pair.ratio for pair in pairs):.1%}")
    lost = [pair for pair in pairs if pair.bare_tokens != pair.http_tokens]
    if lost:
        console.print(
            f"[yellow]{len(lost)} pairs had different numbers of tokens:[/] "
            f"{lost[0].bare_tokens} bare, {lost[0].http_tokens} over HTTP"
        )


if __name__ == "__main__":
    main()
