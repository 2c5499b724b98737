"""The engine's and the sampler's flags, and what a model name on the command line means."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer
from pydantic import Field
from rich.console import Console

from focus_ray.cli.options import flags_of
from focus_ray.config import EngineConfig
from focus_ray.errors import FocusRayError
from focus_ray.sampling import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterator

# For analysis in Python, where the trace can be read.
NOT_FLAGS = {"model", "record_trace"}
SAMPLING_FLAGS = (
    *("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed"),
    *("stop", "ignore_eos", "unmasking", "confidence_threshold", "denoising_steps"),
    *("editing_threshold", "max_post_steps"),
)


class CommandSampling(SamplingParams):
    """Sampling of the one request of a command."""

    max_tokens: int | None = Field(
        None, ge=1, description="Most tokens to emit; default: what is left of the context."
    )


engine_flags = flags_of(
    EngineConfig,
    "engine",
    [name for name in EngineConfig.model_fields if name not in NOT_FLAGS],
)
# Chat and generate have the unmasking flags once, as the request's: there is one request.
light_engine_flags = flags_of(
    EngineConfig,
    "engine",
    [
        name
        for name in EngineConfig.model_fields
        if name not in NOT_FLAGS and name not in SamplingParams.model_fields
    ],
)
sampling_flags = flags_of(CommandSampling, "sampling", SAMPLING_FLAGS)

errors = Console(stderr=True)


def located(engine: EngineConfig, model: str | None) -> EngineConfig:
    """``engine`` for a model of this name, found now rather than in another process later.

    A hub id is downloaded here, where the progress can be seen.

    Raises:
        CheckpointError: there is no such model.
    """
    from focus_ray.models.checkpoint import resolve_checkpoint

    name = model or engine.model
    found = {"model": _anywhere(name)}
    resolve_checkpoint(found["model"], engine.revision)
    if engine.tokenizer is not None:
        found["tokenizer"] = _anywhere(engine.tokenizer)
        resolve_checkpoint(found["tokenizer"])
    return engine.model_copy(update=found)


@contextmanager
def errors_in_words() -> Iterator[None]:
    """Say what went wrong in one red line, and exit with 1."""
    try:
        yield
    except (FocusRayError, ValueError) as error:
        errors.print("[bold red]error:[/] ", end="")
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


def _anywhere(name: str) -> str:
    """A directory by its absolute path, since engines run in other working directories."""
    from focus_ray.models.checkpoint import bundled_models

    folder = os.path.expanduser(name)
    is_folder = os.path.isdir(folder) and name not in bundled_models()
    return os.path.abspath(folder) if is_folder else name
