"""How soon does a running endpoint answer, and how many tokens per second does it give?

    focus-ray bench serving --request-rate 4                     # open loop, Poisson arrivals
    focus-ray bench serving --request-rate 4 --burstiness 0.25   # in bursts
    focus-ray bench serving --max-concurrency 64                 # closed loop
    focus-ray bench serving                                      # all at once

Streams from any OpenAI-compatible server, and counts tokens by the usage chunk that it sends at
the end. In an open loop every latency counts from when the request should have been sent.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import math
import shlex
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import aiohttp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from focus_ray import __version__
from focus_ray.benchmarks.arrivals import arrival_times
from focus_ray.benchmarks.report_file import write_json
from focus_ray.benchmarks.serving_client import Client, Sent
from focus_ray.benchmarks.serving_flags import parse_arguments
from focus_ray.benchmarks.serving_load import send_all
from focus_ray.benchmarks.serving_prompts import bodies_of, make_prompts
from focus_ray.benchmarks.serving_report import print_figures
from focus_ray.benchmarks.serving_rows import figures_of
from focus_ray.errors import FocusRayError

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments, __doc__)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    command = sys.argv[1:] if arguments is None else list(arguments)
    try:
        sent, model = asyncio.run(run(args, console))
    except (FocusRayError, OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    figures = figures_of(sent)
    print_figures(console, figures, args.max_concurrency is not None)
    if args.json is not None:
        facts = {
            "command": shlex.join(["focus-ray", "bench", "serving", *_without_key(command)]),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "version": __version__,
            "base_url": args.base_url,
            "endpoint": args.endpoint,
            "model": model,
            "request_rate": None if math.isinf(args.request_rate) else args.request_rate,
            "burstiness": args.burstiness,
            "max_concurrency": args.max_concurrency,
        }
        write_json(args.json, {**facts, **asdict(figures)})
        console.print(f"written to {args.json}")
    if not figures.completed:
        raise SystemExit(1)


async def run(args: argparse.Namespace, console: Console) -> tuple[list[Sent], str]:
    """The whole run, and the name of the model.

    Raises:
        ValueError: the server does not answer as such a server does, or prompts do not fit.
    """
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    timeout = aiohttp.ClientTimeout(total=args.timeout_s)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        model, longest = await served(session, args, headers)
        with console.status("drawing prompts"):
            prompts = make_prompts(args, args.tokenizer or model, longest)
        shared = {"model": model, "temperature": args.temperature}
        if args.ignore_eos:
            shared["ignore_eos"] = True
        bodies = bodies_of(prompts, args.endpoint, shared)
        client = Client(session, args.base_url + args.endpoint, headers)
        with console.status("warming up"):
            for body in bodies[: args.num_warmups]:
                first = await client.ask(body, client.clock())
                if first.error is not None:
                    raise ValueError(f"the first request failed: {first.error}: {first.message}")
        arrivals = arrival_times(len(bodies), args.request_rate, args.burstiness, args.seed)
        return await with_progress(client, bodies, arrivals, args.max_concurrency, console), model


async def with_progress(
    client: Client,
    bodies: Sequence[dict[str, Any]],
    arrivals: Sequence[float],
    max_concurrency: int | None,
    console: Console,
) -> list[Sent]:
    """``send_all`` with a bar: requests that ended, tokens per second of late, failures."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        shown = bar.add_task("", total=len(bodies))
        lately: deque[Sent] = deque(maxlen=100)
        num_failed = 0

        def on_end(sent: Sent) -> None:
            nonlocal num_failed
            lately.append(sent)
            num_failed += sent.error is not None
            span_s = lately[-1].finished_s - min(each.sent_s for each in lately)
            rate = sum(each.output_tokens for each in lately) / max(span_s, 1e-9)
            text = f"{rate:.0f} tok/s" + (f", {num_failed} failed" if num_failed else "")
            bar.update(shown, advance=1, description=text)

        return await send_all(client, bodies, arrivals, max_concurrency, on_end)


async def served(
    session: aiohttp.ClientSession, args: argparse.Namespace, headers: dict[str, str]
) -> tuple[str, int | None]:
    """Name of the model to ask for, and its context in tokens where the server tells.

    Raises:
        ValueError: nobody answers, or without a list of models.
    """
    url = f"{args.base_url}/v1/models"
    try:
        async with session.get(url, headers=headers) as response:
            reply = await response.json(content_type=None)
            models = {entry["id"]: entry.get("max_model_len") for entry in reply["data"]}
    except aiohttp.ClientError as error:
        raise ValueError(f"{url}: {error}; start 'focus-ray serve', or give --base-url") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{url} answered {response.status} and no list of models") from error
    name = args.model or next(iter(models), None)
    if name is None:
        raise ValueError(f"{url} lists no model; give --model")
    return name, models.get(name)


def _without_key(command: Sequence[str]) -> list[str]:
    """The command, fit to be published."""
    hidden = ["--api-key=..." if word.startswith("--api-key=") else word for word in command]
    for place, word in enumerate(hidden[:-1]):
        if word == "--api-key":
            hidden[place + 1] = "..."
    return hidden


if __name__ == "__main__":
    main()
