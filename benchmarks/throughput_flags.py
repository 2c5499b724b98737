"""The command line of ``throughput.py``; names follow ``vllm bench`` where both mean the same."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from focus_ray.benchmarks.report_file import refuse_folder
from focus_ray.benchmarks.request_flags import (
    add_request_flags,
    complete_requests,
    flag_of,
    require_at_least,
)
from focus_ray.benchmarks.settings import FIELD_OF_NAME, engine_config, engine_fields
from focus_ray.config import DEFAULT_MODEL, EngineConfig
from focus_ray.models.shapes import SHAPES

CONCURRENCIES = (1, 8, 32, 64, 128, 256, 512)
MODES = (
    "block@0.9",
    "block@0.8",
    "delayed@0.8",
    "focus@0.8",
    "focus@0.8,alpha=1.2,policy=leftmost,adaptive=off",
)
STATIC_MODES = ("block", "delayed", "focus")
"""Where a threshold has no meaning."""

LEAST_PROMPTS = 12
OUTPUT_LEN, FIXED_OUTPUT_LEN = 512, 256

LEAST = {
    **dict.fromkeys(("num_prompts", "max_num_seqs"), 1),
    **dict.fromkeys(("rounds", "num_warmups", "profile"), 0),
}

ENGINE_FLAGS = (
    *(
        "device",
        "dtype",
        "tensor_parallel_size",
        "block_length",
        "max_model_len",
        "max_num_batched_tokens",
    ),
    *("gpu_memory_utilization", "kv_cache_memory_bytes", "unmasking", "denoising_steps"),
)
"""Fields of ``EngineConfig`` for all modes; a flag that is not given leaves its default."""


def parse_arguments(arguments: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """Flags, with what depends on others filled in. Exits with 2 where they do not fit."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("model").add_argument
    add("--model", default=DEFAULT_MODEL, help="bundled name, directory or hub id")
    add("--shape", choices=SHAPES, help="expand the model to this shape; computes the same")
    add("--random-weights", action="store_true", help="random weights of --shape, and prompts")

    add = parser.add_argument_group("runs").add_argument
    names = ", ".join(FIELD_OF_NAME)
    add(
        *("--mode", "--setting"),
        dest="modes",
        action="append",
        metavar="MODE",
        help=f"as focus@0.8,alpha=1.5, with any of {names}; may be repeated; "
        f"default: {' '.join(MODES)}, or with another unmasking {' '.join(STATIC_MODES)}",
    )
    add(
        *("--max-concurrency", "--concurrency"),
        dest="concurrencies",
        type=int,
        nargs="+",
        default=list(CONCURRENCIES),
        help="requests in flight, one run for each; default: %(default)s",
    )
    add("--num-prompts", type=int, help="requests of a run; default: --rounds x concurrency")
    add("--rounds", type=float, default=4.0, help=f"default 4; at least {LEAST_PROMPTS} requests")
    add("--num-warmups", type=int, default=4, help="requests before the clock starts")
    add("--profile", type=int, default=20, metavar="STEPS", help="GPU: profiled steps; 0: none")

    requests = add_request_flags(
        parser,
        output_len=None,
        output_len_help=f"most tokens of an answer; default {OUTPUT_LEN}, {FIXED_OUTPUT_LEN} if it "
        "never ends",
    )
    requests.add_argument(
        "--stop-repetition", action="store_true", help="end answers that repeat themselves"
    )

    add = parser.add_argument_group("engine").add_argument
    add(
        "--max-num-seqs",
        type=int,
        help="one engine per mode with so many places; default: one per run, places = concurrency",
    )
    for name in ENGINE_FLAGS:
        field = EngineConfig.model_fields[name]
        add(flag_of(name), help=(field.description or "").replace("%", "%%"))
    add("--enforce-eager", action="store_true", help="GPU: no CUDA graphs")
    add("--enable-prefix-caching", action="store_true", help="off here unless given")

    add = parser.add_argument_group("results").add_argument
    add("--json", type=Path, help="all numbers, written after every run")
    add("--plot", type=Path, help="SVG of throughput against concurrency")

    args = parser.parse_args(arguments)
    try:
        _complete(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def shared_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of ``EngineConfig`` that hold for all modes."""
    given = {name: value for name in ENGINE_FLAGS if (value := getattr(args, name)) is not None}
    return {
        **given,
        "model": args.model,
        "seed": args.seed,
        "enforce_eager": args.enforce_eager,
        "enable_prefix_caching": args.enable_prefix_caching,
    }


def _complete(args: argparse.Namespace) -> None:
    """Fill in what depends on other flags; a mistake in the last mode costs no run of the first.

    Raises:
        ValueError: names the flag.
    """
    require_at_least(args, LEAST)
    complete_requests(args, "random" if args.random_weights else "bundled")
    is_static = args.unmasking not in (None, "low_confidence_dynamic")
    args.modes = list(dict.fromkeys(args.modes or (STATIC_MODES if is_static else MODES)))
    for mode in args.modes:
        try:
            engine_config(**{**shared_fields(args), **engine_fields(mode)})
        except ValueError as error:
            raise ValueError(f"--mode {mode}: {error}") from None
    shared = engine_config(**shared_fields(args))
    if shared.tensor_parallel_size > 1 and args.shape:
        raise ValueError(
            "--tensor-parallel-size needs a folder that every rank can read: write the shape with "
            "benchmarks/expand.py --output DIR, and give --model DIR in place of --shape"
        )
    if args.random_weights and not args.shape:
        raise ValueError("--random-weights needs --shape")
    if min(args.concurrencies) < 1:
        raise ValueError(f"--max-concurrency must be at least 1, got {min(args.concurrencies)}")
    if args.output_len is None:
        args.output_len = FIXED_OUTPUT_LEN if args.ignore_eos else OUTPUT_LEN
    if args.plot is not None and args.plot.suffix.lower() != ".svg":
        raise ValueError(f"--plot draws SVG: give a file name that ends in .svg, not {args.plot}")
    for flag, path in (("--json", args.json), ("--plot", args.plot)):
        refuse_folder(flag, path)
    if args.max_num_seqs is not None and args.max_num_seqs < max(args.concurrencies):
        raise ValueError(
            f"--max-num-seqs {args.max_num_seqs} is below the concurrency {max(args.concurrencies)}"
        )
