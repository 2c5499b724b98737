"""What an endpoint is asked: the prompts of ``workload.py`` as request bodies."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from focus_ray.benchmarks.prompt_source import prompts_from
from focus_ray.benchmarks.serving_client import CHAT
from focus_ray.benchmarks.workload import Prompt
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
    return prompts_from(args, spec, path, tokenizer_name, args.num_prompts, longest)


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
