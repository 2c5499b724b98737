"""The command line of ``serving.py``; names follow ``vllm bench serve``."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path

from focus_ray.benchmarks.serving_client import CHAT, COMPLETIONS

LEAST = {
    **dict.fromkeys(("num_prompts", "input_len", "output_len", "max_concurrency"), 1),
    **dict.fromkeys(("num_warmups", "temperature"), 0),
}
POSITIVE = ("request_rate", "burstiness", "timeout_s")
RATIOS = ("range_ratio", "output_range_ratio")


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

    add = parser.add_argument_group("requests").add_argument
    add(
        "--dataset-name",
        choices=("bundled", "random", "file", "hf"),
        help="default: file with --dataset-path, else bundled",
    )
    add("--dataset-path", help="file: JSON or JSON lines, as ShareGPT's; hf: id of a data set")
    add("--hf-subset", help="configuration of the data set")
    add("--hf-split", default="train")
    add(
        "--tokenizer",
        help="bundled name, directory or hub id of the model, to count prompt tokens by; "
        "default: --model",
    )
    add("--input-len", type=int, default=200, help="bundled, random: mean prompt, tokens")
    add("--range-ratio", type=float, default=0.5, help="spread of --input-len, uniform; default .5")
    add("--output-len", type=int, default=256, help="mean of max_tokens; default: %(default)s")
    add("--output-range-ratio", type=float, default=0.0, help="its spread; default 0")
    add("--ignore-eos", action="store_true", help="answers go on to --output-len (vLLM's field)")
    add("--temperature", type=float, default=0.0)
    add("--seed", type=int, default=0, help="of prompts, lengths and arrivals")

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
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and not value >= least:
            raise ValueError(f"{_flag(name)} must be at least {least}, got {value}")
    for name in POSITIVE:
        if not (value := getattr(args, name)) > 0:
            raise ValueError(f"{_flag(name)} must be above 0, got {value}")
    for name in RATIOS:
        if not 0 <= (value := getattr(args, name)) <= 1:
            raise ValueError(f"{_flag(name)} must be from 0 to 1, got {value}")
    if args.dataset_name is None:
        args.dataset_name = "file" if args.dataset_path else "bundled"
    if (args.dataset_name in ("file", "hf")) != bool(args.dataset_path):
        raise ValueError("--dataset-path goes with --dataset-name file or hf, and both need it")
    is_random = args.dataset_name == "random"
    if args.endpoint is None:
        args.endpoint = COMPLETIONS if is_random else CHAT
    if is_random and args.endpoint == CHAT:
        raise ValueError(f"random prompts are token ids: give --endpoint {COMPLETIONS}")
    if args.json is not None and args.json.is_dir():
        raise ValueError(f"--json {args.json} is a folder; give the name of a file")
    args.base_url = args.base_url.rstrip("/").removesuffix("/v1")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
