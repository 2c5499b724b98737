"""``focus-ray bench``: the face of ``focus_ray.benchmarks``, whose files have the flags."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

import typer

bench = typer.Typer(
    help="Measure speed: of decoding, of kernels, against the limits of the GPU.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

COMMANDS = {
    "throughput": ("throughput", "Output tokens/s by way of decoding and requests in flight."),
    "serving": ("serving", "How soon a running endpoint answers, under load."),
    "http": ("http_overhead", "What the way over HTTP costs, against the bare engine."),
    "kernels": ("kernels", "Every GPU kernel, at the shapes of SDAR-8B."),
    "moe": ("moe", "A mixture of experts, at the shapes of LLaDA2.0 and SDAR-30B-A3B."),
    "roofline": ("roofline", "The limits of the GPU, and how near to them a recorded run came."),
    "batch": ("batch", "What an offline job keeps of the engine's speed."),
    "scaling": ("scaling", "How many times faster several GPUs answer than one."),
    "routing": ("routing", "How soon many replicas answer, by the way requests find theirs."),
    "profile": ("profile_step", "Where the time of one steady step goes."),
}
"""Module and help of each command."""


def _command(name: str, module: str) -> Callable[[typer.Context], None]:
    def run(ctx: typer.Context) -> None:
        found = importlib.import_module(f"focus_ray.benchmarks.{module}")
        sys.argv[0] = f"focus-ray bench {name}"  # what the parser's help calls itself
        found.main(ctx.args)

    return run


for _name, (_module, _help) in COMMANDS.items():
    bench.command(
        _name,
        help=_help,
        add_help_option=False,  # passed on: the benchmark's own help has its flags
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(_command(_name, _module))
