"""One rank of an engine: its device, its shard of the model, its KV pages, its runner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from focus_ray.config import EngineConfig
from focus_ray.engine.build_runner import EVERY_WISH, build_runner, make_ready
from focus_ray.engine.memory import count_pages
from focus_ray.engine.runner import Runner
from focus_ray.engine.sizes import EngineSizes, fit_context, resolve_sizes
from focus_ray.models.kv_cache import bytes_per_page
from focus_ray.models.loading import LoadedModel, load_model
from focus_ray.models.parallel import WHOLE, Shards


@dataclass(frozen=True)
class Rank:
    """A rank that is ready for its first step; its numbers are those of all ranks.

    ``saturation_tokens`` of a step are enough: larger ones are hardly faster.
    """

    loaded: LoadedModel
    sizes: EngineSizes
    num_pages: int
    max_model_len: int
    saturation_tokens: int
    runner: Runner


def make_rank(
    config: EngineConfig,
    device: torch.device,
    shards: Shards = WHOLE,
    loaded: LoadedModel | None = None,
) -> Rank:
    """Load a rank's shard and size everything around it; all ranks do so at the same time.

    Args:
        loaded: a model that is on the device already, in place of ``config.model``.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
        ValueError: the configuration does not fit the checkpoint, the device or the memory.
    """
    if loaded is None:
        loaded = load_model(
            config.model,
            device=device,
            dtype=_dtype(config, device),
            block_length=config.block_length,
            revision=config.revision,
            shards=shards,
        )
    spec = loaded.spec
    sizes = resolve_sizes(config, spec, device.type)
    num_kv_heads, head_dim = loaded.model.kv_shape

    def rehearse() -> Iterator[Callable[[], None]]:
        runner = build_runner(
            config, loaded, sizes, device, num_pages=1, max_model_len=sizes.longest
        )
        yield runner.rehearse_passes
        yield lambda: runner.rehearse_choice(EVERY_WISH)

    num_pages = count_pages(
        config,
        bytes_per_page=bytes_per_page(
            num_layers=spec.num_layers,
            page_size=sizes.page_size,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=loaded.dtype,
        ),
        device=device,
        rehearse=rehearse,
    )
    num_pages = shards.least(num_pages)
    max_model_len = fit_context(config, sizes, num_pages)
    runner = build_runner(
        config, loaded, sizes, device, num_pages=num_pages, max_model_len=max_model_len
    )
    saturation_tokens = make_ready(config, runner, loaded)
    return Rank(loaded, sizes, num_pages, max_model_len, saturation_tokens, runner)


def choose_device(config: EngineConfig, gpu: int = 0) -> torch.device:
    """Where a rank computes, from now on also by default for CUDA calls of this process.

    Args:
        gpu: which of the GPUs that this process sees.

    Raises:
        ValueError: a GPU is asked for that is not there.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.device == "cuda" and not available:
        raise ValueError("device is cuda, but torch sees no GPU here; use device=cpu or auto")
    if not available or config.device == "cpu":
        return torch.device("cpu")
    if gpu >= available:
        raise ValueError(
            f"tensor_parallel_size {config.tensor_parallel_size} needs a GPU for every rank, and "
            f"there are {available} here; lower it"
        )
    if config.tensor_parallel_size == 1:
        return torch.device("cuda")
    torch.cuda.set_device(gpu)
    return torch.device("cuda", gpu)


def _dtype(config: EngineConfig, device: torch.device) -> torch.dtype | None:
    """None: as the checkpoint stores it."""
    if config.dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.dtype)
        return dtype
    return torch.float32 if device.type == "cpu" else None
