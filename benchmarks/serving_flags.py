"""The command line of ``serving.py``; names follow ``vllm bench serve``."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path

from focus_ray.benchmarks.report_file import refuse_folder
from focus_ray.benchmarks.request_flags import (
    add_request_flags,
    complete_requests,
    require_above_zero,
    require_at_least,
)
from focus_ray.benchmarks.serving_client import CHAT, COMPLETIONS

LEAST = {"num_prompts": 1, "max_concurrency": 1, "num_warmups": 0}
POSITIVE = ("request_rate", "burstiness", "timeout_s")
OUTPUT_LEN = 256


def parse_arguments(arguments: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """Flags, with what depends on others filled in. Exits with 2 where they do not fit."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("server").add_argument
    add("--base-url", default="http://127.0.0.1:8000", help="without /v1; default: %(default)s")
    add(
        "--endpoint",
        choices=(CHAT, COMPLETIONS),
        help=f"default: {CHAT}; {COMPLETIONS}, with token ids, for random prompts",
    )
    add("--model", help="name in the API; default: the first one the server lists")
    add(
        "--api-key",
        default=os.environ.get("OPENAI_API_KEY"),
        help="bearer token; default: $OPENAI_API_KEY",
    )
    add("--timeout-s", type=float, default=3600.0, help="of one request; default: %(default)s")

    add = parser.add_argument_group("arrivals").add_argument
    add("--num-prompts", type=int, default=200, help="requests; default: %(default)s")
    add(
        "--request-rate",
        type=float,
        default=math.inf,
        help="open loop: requests per second on average; default: inf, all at once",
    )
    add(
        "--burstiness",
        type=float,
        default=1.0,
        help="shape of the gamma distribution of gaps: 1 Poisson, less in bursts, more even",
    )
    add("--max-concurrency", type=int, help="closed loop: most requests in flight")
    add("--num-warmups", type=int, default=1, help="requests before the clock starts; default 1")

    requests = add_request_flags(
        parser, output_len=OUTPUT_LEN, output_len_help="mean of max_tokens; default: %(default)s"
    )
    requests.add_argument(
        "--tokenizer",
        help="bundled name, directory or hub id of the model, to count prompt tokens by; "
        "default: --model",
    )

    add = parser.add_argument_group("results").add_argument
    add("--json", "--save-result", type=Path, metavar="FILE", help="all numbers")

    args = parser.parse_args(arguments)
    try:
        _complete(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def _complete(args: argparse.Namespace) -> None:
    """Fill in what depends on other flags.

    Raises:
        ValueError: names the flag.
    """
    require_at_least(args, LEAST)
    require_above_zero(args, POSITIVE)
    complete_requests(args)
    is_random = args.dataset_name == "random"
    if args.endpoint is None:
        args.endpoint = COMPLETIONS if is_random else CHAT
    if is_random and args.endpoint == CHAT:
        raise ValueError(f"random prompts are token ids: give --endpoint {COMPLETIONS}")
    refuse_folder("--json", args.json)
    args.base_url = args.base_url.rstrip("/").removesuffix("/v1")
