"""What would a run have cost at the limit of the GPU?

    python benchmarks/roofline.py --shape sdar-8b --json roofline.json
    python benchmarks/roofline.py --shape sdar-8b --run throughput.json --ceilings roofline.json

First the limits: the products of the model with random data at 1 to 16384 rows, and the bandwidth
of a copy. Then, for every row of a throughput report, the time that its tokens would have taken at
them. The *roofline fraction* is that time over the measured one:

- layer 0, and layer 1 up to its keys and values, at the processed tokens of the mean step; all the
  rest at the retained ones; prefill at both; the head at the rows that needed logits;
- each product at the best rows per second that it reaches at any size, or, where that is slower,
  in the time to read its weights once;
- of experts, the weights of those that the mean step's tokens go through: as many as were counted
  for the report, or as chance says;
- keys and values read once per layer and row. Everything else is free.

The *own fraction* takes each product as fast as the library runs it at that size instead. What is
missing from the first is partly the library's; what is missing from the second is ours.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from rich.console import Console

from focus_ray.benchmarks.report_file import write_json
from focus_ray.benchmarks.roofline_bound import Ceilings, Roofline, roofline_of
from focus_ray.benchmarks.roofline_counts import Recorded, read_json, read_runs
from focus_ray.benchmarks.roofline_layers import Product, products_of
from focus_ray.benchmarks.roofline_products import ProductTimes, measure_products
from focus_ray.benchmarks.roofline_tables import print_ceilings, print_rooflines
from focus_ray.benchmarks.run_facts import device_name
from focus_ray.benchmarks.sdar_step import QUICK_CONFIG
from focus_ray.benchmarks.timing import Timer, measure_ceilings
from focus_ray.errors import FocusRayError
from focus_ray.models.decoder import DecoderConfig
from focus_ray.models.registry import model_class
from focus_ray.models.shapes import SHAPES

COPY_BYTES, MATMUL_SIZE = 1 << 30, 8192
QUICK_ROWS = (1, 4, 16)


@dataclass(frozen=True)
class Measured:
    """The limits of a device, and a large square product for comparison."""

    device: str
    square_flops_per_s: float
    ceilings: Ceilings

    def as_json(self) -> dict[str, object]:
        ceilings = self.ceilings
        return {
            "device": self.device,
            "square_flops_per_s": self.square_flops_per_s,
            "copy_bytes_per_s": ceilings.copy_bytes_per_s,
            "bytes_per_s": ceilings.bytes_per_s,
            "itemsize": ceilings.itemsize,
            "products": [
                {
                    **asdict(times.product),
                    "flops_per_s": times.flops_per_s,
                    "points": [list(point) for point in times.points],
                }
                for times in ceilings.products.values()
            ],
        }


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape",
        default="sdar-8b",
        help=f"{', '.join(SHAPES)}, or a config.json; default sdar-8b",
    )
    parser.add_argument("--run", type=Path, help="JSON of throughput.py to be judged")
    parser.add_argument(
        "--ceilings", type=Path, help="JSON of an earlier call, instead of measuring again"
    )
    parser.add_argument("--json", type=Path, help="where the numbers are written")
    parser.add_argument(
        "--quick", action="store_true", help="tiny products on the CPU, to see the script work"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        config = QUICK_CONFIG if args.quick else shape_config(args.shape)
        recorded = read_runs(args.run) if args.run else None
        if args.ceilings:
            measured = read_ceilings(args.ceilings, config)
        elif args.quick or torch.cuda.is_available():
            measured = measure(config, quick=args.quick)
        else:
            raise ValueError("limits are those of a GPU, and there is none; give --ceilings FILE")
        if recorded is not None and not args.quick:
            require_same(recorded, args.shape, measured.device)
    except (FocusRayError, OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    runs = recorded.runs if recorded is not None else []
    rooflines = [roofline_of(run, config, measured.ceilings) for run in runs]
    print_ceilings(console, measured.device, measured.square_flops_per_s, measured.ceilings)
    if rooflines:
        print_rooflines(console, rooflines)
    if args.json:
        command = sys.argv[1:] if arguments is None else list(arguments)
        found = {
            "command": shlex.join(["python", "benchmarks/roofline.py", *command]),
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "model": config.model_dump(),
            **measured.as_json(),
            "runs": [as_json(roofline) for roofline in rooflines],
        }
        write_json(args.json, found)
        console.print(f"written to {args.json}")


def shape_config(name: str) -> DecoderConfig:
    """One of ``SHAPES``, or what a file says.

    Raises:
        ValueError: it is neither.
        CheckpointError: the file is of an architecture that is not supported.
    """
    if name.lower() in SHAPES:
        return SHAPES[name.lower()]
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"--shape {name} is neither one of {', '.join(SHAPES)} nor a config.json")
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"--shape {name} holds no object; give a config.json")
    _, model_cls = model_class(found.get("architectures"))
    config = model_cls.config_class.from_published(found)
    assert isinstance(config, DecoderConfig)
    return config


def require_same(recorded: Recorded, shape: str, device: str) -> None:
    """Refuse runs of another model or device, as far as their report says what they ran on.

    Raises:
        ValueError: names what differs.
    """
    known = shape.lower() in SHAPES
    if recorded.shape is not None and known and recorded.shape != shape.lower():
        raise ValueError(f"the runs are of {recorded.shape}, not {shape}; give --shape")
    if recorded.device is not None and recorded.device != device:
        raise ValueError(
            f"the runs are of {recorded.device}, the limits of {device}; measure both on one"
        )


@torch.inference_mode()
def measure(config: DecoderConfig, *, quick: bool = False) -> Measured:
    """Take the limits of this device, in bfloat16; ``quick``: tiny ones of the CPU."""
    products = products_of(config)
    if quick:
        device = torch.device("cpu")
        general = measure_ceilings(Timer(device, budget_s=0.002), 1 << 20, 64)
        times = measure_products(
            products, device, torch.float32, rows=QUICK_ROWS, rounds=2, flush_bytes=1
        )
        name, itemsize = device_name(on_gpu=False), torch.float32.itemsize
    else:
        device = torch.device("cuda")
        general = measure_ceilings(Timer(device), COPY_BYTES, MATMUL_SIZE)
        times = measure_products(products, device, torch.bfloat16)
        name, itemsize = torch.cuda.get_device_name(), torch.bfloat16.itemsize
    by_name = {each.product.name: each for each in times}
    ceilings = Ceilings(general.copy_bytes_per_s, by_name, itemsize)
    return Measured(name, general.matmul_flops_per_s, ceilings)


def read_ceilings(path: Path, config: DecoderConfig) -> Measured:
    """What an earlier call wrote.

    Raises:
        ValueError: the file does not hold the products of this model.
    """
    found = read_json(path)
    try:
        times = {
            each["name"]: ProductTimes(
                Product(**{f.name: each[f.name] for f in fields(Product) if f.name in each}),
                tuple((int(rows), float(seconds)) for rows, seconds in each["points"]),
            )
            for each in found["products"]
        }
        ceilings = Ceilings(float(found["copy_bytes_per_s"]), times, int(found["itemsize"]))
        measured = Measured(found["device"], float(found["square_flops_per_s"]), ceilings)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a report of roofline.py: {error!r}") from error
    if [each.product for each in times.values()] != products_of(config):
        raise ValueError(f"{path} was measured for another shape; measure without --ceilings")
    return measured


def as_json(roofline: Roofline) -> dict[str, object]:
    """Everything that is in it, sums and shares included."""
    names = ("ceiling_s", "fraction", "own_fraction", "step_per_weights")
    return {**asdict(roofline), **{name: getattr(roofline, name) for name in names}}


if __name__ == "__main__":
    main()
