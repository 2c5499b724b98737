"""What a throughput run needs before it starts: the model, the prompts, and a record of both."""

from __future__ import annotations

import argparse
import datetime
import platform
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
import triton

from focus_ray import __version__
from focus_ray.benchmarks.expand import expand, random_model
from focus_ray.benchmarks.prompt_source import lengths_of, prompts_from
from focus_ray.benchmarks.throughput_flags import LEAST_PROMPTS, shared_fields
from focus_ray.benchmarks.workload import Prompt
from focus_ray.config import EngineConfig
from focus_ray.models.checkpoint import resolve_checkpoint
from focus_ray.models.loading import LoadedModel, find_weights, load_model
from focus_ray.models.shapes import SHAPES
from focus_ray.models.spec import read_config, read_spec


def load(args: argparse.Namespace) -> LoadedModel:
    """The one model of all runs, or of one that ranks load for themselves, its outline.

    Raises:
        CheckpointError: it cannot be loaded.
        ValueError: it cannot be expanded to the shape, or there is no such device.
    """
    config = EngineConfig(**shared_fields(args))
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no GPU here")
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    named = None if config.dtype == "auto" else getattr(torch, config.dtype)
    if args.shape is None:
        dtype = named if on_gpu or named is not None else torch.float32
        if config.tensor_parallel_size > 1:
            return outline(args.model, dtype=dtype, block_length=config.block_length)
        return load_model(args.model, device=device, dtype=dtype, block_length=config.block_length)
    dtype = named or (torch.bfloat16 if on_gpu else torch.float32)
    shape = SHAPES[args.shape]
    if args.random_weights:
        return random_model(shape, device=device, dtype=dtype, seed=args.seed, like=args.model)
    return expand(args.model, shape, device=device, dtype=dtype, seed=args.seed)


def outline(name: str, *, dtype: torch.dtype | None, block_length: int | None) -> LoadedModel:
    """A model without memory for its weights.

    Raises:
        CheckpointError: there is no such checkpoint, or it is not supported.
    """
    path = resolve_checkpoint(name)
    spec = read_spec(path, block_length=block_length, name=name)
    _, model_cls, config = read_config(path)
    dtype = dtype or spec.dtype
    with torch.device("meta"):
        model = model_cls.build(config, find_weights(path).keys(), dtype)
    return LoadedModel(model, spec, path, dtype)


def is_outline(loaded: LoadedModel) -> bool:
    """Whether a model has no memory for its weights."""
    return next(loaded.model.parameters()).is_meta


def num_prompts(args: argparse.Namespace, concurrency: int) -> int:
    """How many requests a run has."""
    number: int = args.num_prompts or max(LEAST_PROMPTS, round(args.rounds * concurrency))
    return number


def make_prompts(args: argparse.Namespace, loaded: LoadedModel, number: int) -> list[Prompt]:
    """The list that all runs take their requests from, in its order.

    Raises:
        ValueError: the source cannot be read, or its prompts do not fit the model.
    """
    spec = loaded.spec
    prompt_len, output_len = lengths_of(args)
    longest = EngineConfig(**shared_fields(args)).max_model_len or spec.max_position_embeddings
    longest = min(longest, spec.max_position_embeddings)
    if args.dataset_name in ("bundled", "random"):
        shortest = prompt_len.bounds[0] + output_len.bounds[0]
        if shortest > longest:
            raise ValueError(
                f"--input-len {args.input_len} with --output-len {args.output_len} takes at least "
                f"{shortest} tokens, and the context has {longest}; lower one of them"
            )
    return prompts_from(args, spec, loaded.path, args.model, number, longest)


def describe(
    args: argparse.Namespace, loaded: LoadedModel, prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """What was run on what, for the report."""
    config = EngineConfig(**shared_fields(args))
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    lengths = [len(prompt.token_ids) for prompt in prompts]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU ({platform.machine()})",
        "versions": {
            "focus_ray": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        },
        "model": {
            "name": args.model,
            "shape": args.shape,
            "weights": "random" if args.random_weights else "expanded" if args.shape else "own",
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "num_parameters": sum(p.numel() for p in loaded.model.parameters()),
            "num_layers": loaded.spec.num_layers,
            "block_length": loaded.spec.block_length,
            "tensor_parallel_size": config.tensor_parallel_size,
        },
        "workload": {
            "source": args.dataset_name,
            "path": args.dataset_path,
            "num_different": len({prompt.token_ids for prompt in prompts}),
            "prompt_tokens": {
                "mean": sum(lengths) / len(lengths),
                "min": min(lengths),
                "max": max(lengths),
            },
            "max_tokens": asdict(lengths_of(args)[1]),
            "ignore_eos": args.ignore_eos,
            "temperature": args.temperature,
            "stop_repetition": args.stop_repetition,
            "seed": args.seed,
        },
    }


def titles(facts: dict[str, Any]) -> tuple[str, str]:
    """Title and subtitle of the plot."""
    model, workload = facts["model"], facts["workload"]
    name = model["name"] if model["shape"] is None else model["shape"]
    what = f"{model['weights']} weights, {model['dtype']}, {workload['source']} prompts"
    return f"{name} on {facts['device']}", f"{what}, closed loop, steady stretch"
