"""The command line of ``scaling.py``."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from focus_ray.benchmarks.report_file import refuse_folder
from focus_ray.benchmarks.request_flags import (
    add_request_flags,
    complete_requests,
    require_above_zero,
    require_at_least,
)
from focus_ray.benchmarks.scaling_layouts import Layout, default_layouts
from focus_ray.benchmarks.settings import engine_fields
from focus_ray.cluster.telemetry import GpuTelemetry
from focus_ray.config import DEFAULT_MODEL
from focus_ray.models.base import ModelConfig
from focus_ray.models.checkpoint import resolve_checkpoint
from focus_ray.models.shapes import SHAPES
from focus_ray.models.shard_sizes import possible_sizes, require_possible
from focus_ray.models.spec import read_config
from focus_ray.serve.model_args import RouterName

MODE = "focus@0.8,adaptive=off"
"""A way of decoding under which a text does not depend on what else runs."""

GPU_CONCURRENCIES, CPU_CONCURRENCIES = (8, 64, 256), (4,)
STEPPED_DEVICES = 8
POSITIVE = ("window_s", "budget_s")
LEAST = {"num_prompts": 1, "num_devices": 1, "num_ingress_replicas": 1, "num_clients": 1}


def parse_arguments(arguments: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """Flags, with what depends on others and on the machine filled in. Exits with 2 where they do
    not fit.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("model").add_argument
    add("--model", default=DEFAULT_MODEL, help="bundled name, directory or hub id")
    add("--shape", dest="shapes", choices=SHAPES, nargs="+", help="expand the model to these")
    add("--checkpoints", type=Path, metavar="DIR", help="keep expanded models here, and reuse them")
    add(
        "--mode", default=MODE, help="way of decoding, as of bench throughput; default: %(default)s"
    )
    add("--step-ms", type=float, help="engines that only take so long per step, for the model")
    add("--tokens-per-step", type=float, default=3.1, help="of each of their sequences")

    add = parser.add_argument_group("runs").add_argument
    add(
        "--layout",
        dest="layouts",
        nargs="+",
        metavar="RxT",
        help="R engines of T ranks each; default: what fits of 1x1, 2x1, 4x1, ..., 1x2, 1x4 and "
        "all devices by engines of 2",
    )
    add(
        *("--concurrency", "--max-concurrency"),
        dest="concurrencies",
        type=int,
        nargs="+",
        help="requests in flight for each engine. Layouts of one engine take all, others the last; "
        "default: 8 64 256, on a CPU 4",
    )
    add("--num-devices", type=int, help="default: the GPUs found, on a CPU its cores")
    add("--window-s", type=float, default=15.0, help="of a steady stretch; default: %(default)s")
    add("--budget-s", type=float, default=math.inf, help="begin nothing that would not end by then")
    add("--num-prompts", type=int, default=1024, help="asked in turns; default: %(default)s")

    add = parser.add_argument_group("server and clients").add_argument
    add("--router", choices=get_args(RouterName), default="occupancy")
    add("--num-ingress-replicas", type=int, help="default: one for each engine of a layout")
    add("--num-clients", type=int, help="processes that ask; default: one for each engine")
    add("--port", type=int, default=8000)

    add_request_flags(parser, output_len=256, output_len_help="most tokens of an answer")

    add = parser.add_argument_group("results").add_argument
    add("--json", type=Path, metavar="FILE", help="all numbers, written after every run")
    add("--plot", type=Path, metavar="FILE", help="SVG of speed against devices")
    args = parser.parse_args(arguments)
    try:
        _complete(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def _complete(args: argparse.Namespace) -> None:
    """Fill in what depends on other flags and on the machine.

    Raises:
        ValueError: names the flag.
    """
    require_at_least(args, LEAST)
    require_above_zero(args, POSITIVE)
    is_stepped = args.step_ms is not None
    if is_stepped and not args.step_ms > 0:
        raise ValueError(f"--step-ms must be above 0, got {args.step_ms}")
    if is_stepped and args.shapes:
        raise ValueError("--step-ms has engines without a model; leave out --shape")
    complete_requests(args, "random" if is_stepped else "bundled")
    for flag, path in (("--json", args.json), ("--plot", args.plot)):
        refuse_folder(flag, path)
    try:
        engine_fields(args.mode)
    except ValueError as error:
        raise ValueError(f"--mode {args.mode}: {error}") from None

    args.gpu_names = [] if is_stepped else [gpu.name for gpu in GpuTelemetry(os.environ).read()]
    if args.num_devices is None:
        args.num_devices = len(args.gpu_names) or os.cpu_count() or 1
        if is_stepped:
            args.num_devices = STEPPED_DEVICES
    if args.concurrencies is None:
        args.concurrencies = list(GPU_CONCURRENCIES if args.gpu_names else CPU_CONCURRENCIES)
    if min(args.concurrencies) < 1:
        raise ValueError(f"--concurrency must be at least 1, got {min(args.concurrencies)}")
    args.layouts = _layouts(args)
    most_replicas = max(layout.num_replicas for layout in args.layouts)
    args.num_ingress_replicas = args.num_ingress_replicas or most_replicas
    args.num_clients = args.num_clients or most_replicas


def _layouts(args: argparse.Namespace) -> list[Layout]:
    """Those asked for, or all that fit.

    Raises:
        ValueError: one does not fit the machine, or a model.
    """
    configs: list[ModelConfig] = [SHAPES[shape] for shape in args.shapes or ()]
    if not configs:
        configs = [read_config(resolve_checkpoint(args.model))[2]]
    if args.layouts is None:
        possible = set.intersection(*(set(possible_sizes(config)) for config in configs))
        ranks = {1} if args.step_ms is not None else possible
        return default_layouts(args.num_devices, ranks)
    layouts = list(dict.fromkeys(map(Layout.parse, args.layouts)))
    for layout in layouts:
        if layout.num_devices > args.num_devices:
            raise ValueError(
                f"--layout {layout} needs {layout.num_devices} devices, and there are "
                f"{args.num_devices} here; leave it out, or give --num-devices"
            )
        if layout.num_ranks > 1 and args.step_ms is not None:
            raise ValueError(f"--layout {layout} shares a model, and --step-ms has none")
        for config in configs:
            require_possible(config, layout.num_ranks)
    return layouts
