"""From a configuration to the parts of an engine that fit the checkpoint and the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from focus_ray.config import DEFAULT_CONFIDENCE_THRESHOLD, EngineConfig
from focus_ray.engine.admission import RequestLimits
from focus_ray.engine.build_runner import EVERY_WISH, build_runner, make_ready
from focus_ray.engine.garbage import settle
from focus_ray.engine.memory import count_pages
from focus_ray.engine.pages import PagePool
from focus_ray.engine.plan import StepPlan, StepResult
from focus_ray.engine.scheduler import Scheduler, SchedulerLimits
from focus_ray.engine.sizes import fit_context, resolve_sizes
from focus_ray.engine.tokenizer import Tokenizer
from focus_ray.models.checkpoint import resolve_checkpoint
from focus_ray.models.kv_cache import bytes_per_page
from focus_ray.models.loading import LoadedModel, load_model
from focus_ray.models.spec import ModelSpec
from focus_ray.sampling import SamplingParams


class StepRunner(Protocol):
    """What runs plans: the device, or a fake of a few lines in a test."""

    @property
    def waited_s(self) -> float:
        """Seconds that the host has waited for the device, in total."""
        ...

    def launch(self, plan: StepPlan) -> None:
        """Queue a step behind those launched before."""
        ...

    def collect(self) -> StepResult:
        """Results of the oldest step that was launched and not collected."""
        ...


@dataclass(frozen=True)
class EngineParts:
    """What an engine is made of."""

    scheduler: Scheduler
    runner: StepRunner
    limits: RequestLimits
    stop_token_ids: frozenset[int]
    tokenizer: Tokenizer | None


def assemble(config: EngineConfig, loaded: LoadedModel | None = None) -> EngineParts:
    """Load the model and size everything around it.

    Args:
        loaded: a model that is on the device already, in place of ``config.model``.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
        ValueError: the configuration does not fit the checkpoint, the device or the memory.
    """
    device = _device(config)
    if loaded is None:
        loaded = load_model(
            config.model,
            device=device,
            dtype=_dtype(config, device),
            block_length=config.block_length,
            revision=config.revision,
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
    max_model_len = fit_context(config, sizes, num_pages)
    tokenizer_path = resolve_checkpoint(config.tokenizer) if config.tokenizer else loaded.path
    runner = build_runner(
        config, loaded, sizes, device, num_pages=num_pages, max_model_len=max_model_len
    )
    make_ready(config, runner)
    parts = EngineParts(
        scheduler=Scheduler(
            SchedulerLimits(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=sizes.max_num_batched_tokens,
                max_step_tokens=sizes.max_step_tokens,
                max_prefill_rows=sizes.max_prefill_rows,
                block_length=spec.block_length,
                mask_token_id=spec.mask_token_id,
                record_trace=config.record_trace,
            ),
            PagePool(num_pages, sizes.page_size, config.enable_prefix_caching),
        ),
        runner=runner,
        limits=RequestLimits(
            vocab_size=spec.vocab_size,
            mask_token_id=spec.mask_token_id,
            max_model_len=max_model_len,
            block_length=spec.block_length,
            whole_blocks=config.decoding == "block",
            max_completions=config.max_num_seqs + config.max_num_waiting,
            defaults=_default_params(config, spec),
        ),
        stop_token_ids=frozenset(spec.stop_token_ids),
        tokenizer=Tokenizer.from_path(tokenizer_path),
    )
    settle(runner)
    return parts


def _device(config: EngineConfig) -> torch.device:
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ValueError("device is cuda, but torch sees no GPU here; use device=cpu or auto")
    return torch.device("cuda" if available and config.device != "cpu" else "cpu")


def _dtype(config: EngineConfig, device: torch.device) -> torch.dtype | None:
    """None: as the checkpoint stores it."""
    if config.dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.dtype)
        return dtype
    return torch.float32 if device.type == "cpu" else None


def _default_params(config: EngineConfig, spec: ModelSpec) -> SamplingParams:
    return SamplingParams(
        temperature=spec.sampling.temperature,
        top_p=spec.sampling.top_p,
        top_k=spec.sampling.top_k,
        unmasking=config.unmasking,
        confidence_threshold=(
            DEFAULT_CONFIDENCE_THRESHOLD[config.decoding]
            if config.confidence_threshold is None
            else config.confidence_threshold
        ),
        denoising_steps=config.denoising_steps or spec.block_length,
        editing_threshold=config.editing_threshold,
        max_post_steps=config.max_post_steps,
    )
