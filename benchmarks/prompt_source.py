"""Which prompts the flags ask for: those of ``workload.py`` from bundled, random or given texts."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from focus_ray.benchmarks.conversations import read_file, read_hub
from focus_ray.benchmarks.workload import (
    Lengths,
    Prompt,
    bundled_prompts,
    chat_prompts,
    choose,
    random_prompts,
)
from focus_ray.engine.tokenizer import Tokenizer
from focus_ray.models.spec import ModelSpec


def lengths_of(args: argparse.Namespace) -> tuple[Lengths, Lengths]:
    """Of prompts and of answers."""
    return (
        Lengths(args.input_len, args.range_ratio),
        Lengths(args.output_len, args.output_range_ratio),
    )


def prompts_from(
    args: argparse.Namespace, spec: ModelSpec, path: Path, name: str, number: int, longest: int
) -> list[Prompt]:
    """So many requests, in their order.

    Args:
        path: the model's files.
        name: of the model, for messages.
        longest: context in tokens.

    Raises:
        ValueError: the source cannot be read, or its prompts do not fit the model.
    """
    prompt_len, output_len = lengths_of(args)
    source: Iterable[Prompt]
    if args.dataset_name == "random":
        forbidden = {spec.mask_token_id, *spec.stop_token_ids}
        source = random_prompts(spec.vocab_size, forbidden, prompt_len, output_len, args.seed)
        return choose(source, number, longest)
    tokenizer = Tokenizer.from_path(path)
    if tokenizer is None:
        raise ValueError(f"{name} has no tokenizer; take --dataset-name random")
    if args.dataset_name == "bundled":
        source = bundled_prompts(tokenizer, prompt_len, output_len, args.seed)
    else:
        found = (
            read_file(Path(args.dataset_path))
            if args.dataset_name == "file"
            else read_hub(args.dataset_path, args.hf_subset, args.hf_split)
        )
        source = chat_prompts(tokenizer, found, output_len, args.seed)
    return choose(source, number, longest)
