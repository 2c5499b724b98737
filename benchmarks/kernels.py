"""How fast is each kernel, measured against what the GPU can do, and what does FOCUS itself cost?

    python benchmarks/kernels.py --json FILE

Shapes are those of SDAR-8B. Ceilings are measured in the same run. A step of the whole model is
added up from its parts: embedding, layers at the processed count (0, and 1 up to its keys and
values), layers at the retained count (the rest of 1, and all further ones), head and confidence of
the retained masked tokens, importance twice, retain, compact. It leaves out the host.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

# transformers looks for a package named kernels, and finds this file when another script of this
# folder runs: it asks for a version, and importing must cost nothing and need nothing.
__version__ = "0"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes on the CPU, to see the script work"
    )
    parser.add_argument("--json", type=Path, help="where the numbers are written")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    import torch
    import triton
    from rich.console import Console

    from focus_ray.benchmarks.kernel_tables import print_report
    from focus_ray.benchmarks.kernel_times import measure
    from focus_ray.benchmarks.report_file import write_json
    from focus_ray.benchmarks.run_facts import run_facts
    from focus_ray.benchmarks.sdar_step import QUICK_CONFIG, QUICK_SHAPES, SHAPES, Step
    from focus_ray.benchmarks.timing import Timer
    from focus_ray.models.shapes import SDAR_8B

    args = parse_arguments(arguments)
    command = sys.argv[1:] if arguments is None else list(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120)
    if args.quick:
        timer = Timer(torch.device("cpu"), budget_s=0.002)
        config, shapes, largest = QUICK_CONFIG, QUICK_SHAPES, (1 << 20, 64)
    elif torch.cuda.is_available():
        timer = Timer(torch.device("cuda"))
        config, shapes, largest = SDAR_8B, SHAPES, (1 << 30, 8192)
    else:
        raise SystemExit("SDAR-8B's shapes need a GPU; --quick takes tiny ones on the CPU")
    with torch.inference_mode():
        report = measure(timer, config, shapes, largest)
    print_report(console, report)
    if args.json:
        found = {
            "command": shlex.join(["python", "benchmarks/kernels.py", *command]),
            **run_facts(timer.device.type == "cuda"),
            "triton": triton.__version__,
            "model": config.model_dump(),
            "assumptions": " ".join((Step.__doc__ or "").split()),
            **report.as_json(),
        }
        write_json(args.json, found)
        console.print(f"written to {args.json}")


if __name__ == "__main__":
    main()
