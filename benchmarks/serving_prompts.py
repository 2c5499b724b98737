"""What an endpoint is asked: the prompts of ``workload.py`` as request bodies."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from focus_ray.benchmarks.conversations import read_file, read_hub
from focus_ray.benchmarks.serving_client import CHAT
from focus_ray.benchmarks.workload import (
    Lengths,
    Prompt,
    bundled_prompts,
    chat_prompts,
    choose,
    random_prompts,
)
from focus_ray.engine.tokenizer import Tokenizer
from focus_ray.errors import CheckpointError
from focus_ray.models.checkpoint import resolve_checkpoint
from focus_ray.models.spec import read_spec


def make_prompts(
    args: argparse.Namespace, tokenizer_name: str, longest: int | None
) -> list[Prompt]:
    """The requests of a run, in their order.

    Args:
        tokenizer_name: the model whose files count tokens.
        longest: context in tokens; None: what these files say.

    Raises:
        ValueError: the source cannot be read, or its prompts do not fit the model.
    """
    try:
        path = resolve_checkpoint(tokenizer_name)
    except CheckpointError as error:
        raise ValueError(f"--tokenizer names the model's files: {error}") from error
    spec = read_spec(path, name=tokenizer_name)
    longest = longest or spec.max_position_embeddings
    prompt_len = Lengths(args.input_len, args.range_ratio)
    output_len = Lengths(args.output_len, args.output_range_ratio)
    source: Iterable[Prompt]
    if args.dataset_name == "random":
        forbidden = {spec.mask_token_id, *spec.stop_token_ids}
        source = random_prompts(spec.vocab_size, forbidden, prompt_len, output_len, args.seed)
        return choose(source, args.num_prompts, longest)
    tokenizer = Tokenizer.from_path(path)
    if tokenizer is None:
        raise ValueError(f"{tokenizer_name} has no tokenizer; take --dataset-name random")
    if args.dataset_name == "bundled":
        source = bundled_prompts(tokenizer, prompt_len, output_len, args.seed)
    else:
        found = (
            read_file(Path(args.dataset_path))
            if args.dataset_name == "file"
            else read_hub(args.dataset_path, args.hf_subset, args.hf_split)
        )
        source = chat_prompts(tokenizer, found, output_len, args.seed)
    return choose(source, args.num_prompts, longest)


def bodies_of(
    prompts: Sequence[Prompt], endpoint: str, shared: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """A request body for each prompt: its messages for chat, else its token ids.

    Args:
        shared: fields of every body.
    """
    return [
        {**shared, "max_tokens": prompt.max_tokens, **_asked(prompt, endpoint)}
        for prompt in prompts
    ]


def _asked(prompt: Prompt, endpoint: str) -> dict[str, Any]:
    if endpoint == CHAT:
        return {"messages": list(prompt.messages)}
    return {"prompt": list(prompt.token_ids)}
