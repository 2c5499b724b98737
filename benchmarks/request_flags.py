"""The flags that say what is asked, of every benchmark that asks something; as ``vllm bench``'s."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

LENGTHS = ("input_len", "output_len")
RATIOS = ("range_ratio", "output_range_ratio")


def add_request_flags(
    parser: argparse.ArgumentParser, *, output_len: int | None, output_len_help: str
) -> argparse._ArgumentGroup:
    """The group of these flags, for those that a benchmark has besides.

    Args:
        output_len: default of the flag.
        output_len_help: what it means.
    """
    group = parser.add_argument_group("requests")
    add = group.add_argument
    add(
        "--dataset-name",
        choices=("bundled", "random", "file", "hf"),
        help="default: file with --dataset-path, else bundled",
    )
    add("--dataset-path", help="file: JSON or JSON lines, as ShareGPT's; hf: id of a data set")
    add("--hf-subset", help="configuration of the data set")
    add("--hf-split", default="train")
    add("--input-len", type=int, default=200, help="bundled, random: mean prompt, tokens")
    add("--range-ratio", type=float, default=0.5, help="spread of --input-len, uniform; default .5")
    add("--output-len", type=int, default=output_len, help=output_len_help)
    add("--output-range-ratio", type=float, default=0.0, help="its spread; default 0")
    add("--ignore-eos", action="store_true", help="answers go on to --output-len")
    add("--temperature", type=float, default=0.0)
    add("--seed", type=int, default=0, help="of all that is drawn: prompts, lengths and so on")
    return group


def complete_requests(args: argparse.Namespace, otherwise: str = "bundled") -> None:
    """Check these flags, and fill in where prompts come from.

    Args:
        otherwise: the source if none is given.

    Raises:
        ValueError: names flag, bound and value.
    """
    require_at_least(args, dict.fromkeys(LENGTHS, 1) | {"temperature": 0})
    for name in RATIOS:
        if not 0 <= (value := getattr(args, name)) <= 1:
            raise ValueError(f"{flag_of(name)} must be from 0 to 1, got {value}")
    if args.dataset_name is None:
        args.dataset_name = "file" if args.dataset_path else otherwise
    if (args.dataset_name in ("file", "hf")) != bool(args.dataset_path):
        raise ValueError("--dataset-path goes with --dataset-name file or hf, and both need it")


def require_at_least(args: argparse.Namespace, least: dict[str, int]) -> None:
    """Refuse numbers that no run can have; those that were not given may be None.

    Raises:
        ValueError: names flag, bound and value.
    """
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and not value >= bound:
            raise ValueError(f"{flag_of(name)} must be at least {bound}, got {value}")


def require_above_zero(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Refuse durations and rates that are none.

    Raises:
        ValueError: names flag and value.
    """
    for name in names:
        if not (value := getattr(args, name)) > 0:
            raise ValueError(f"{flag_of(name)} must be above 0, got {value}")


def flag_of(name: str) -> str:
    """How a field of the arguments is written on the command line."""
    return "--" + name.replace("_", "-")
