"""From a configuration to the parts of an engine that fit the checkpoint and the memory."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from focus_ray.config import EngineConfig
from focus_ray.engine.admission import RequestLimits
from focus_ray.engine.block_state import BlockState
from focus_ray.engine.memory import count_pages
from focus_ray.engine.pages import PagePool
from focus_ray.engine.plan import PrefillChunk, StepPlan, StepResult
from focus_ray.engine.runner import Runner
from focus_ray.engine.scheduler import Scheduler, SchedulerLimits
from focus_ray.engine.tokenizer import Tokenizer
from focus_ray.models.checkpoint import resolve_checkpoint
from focus_ray.models.kv_cache import KVCache, bytes_per_page
from focus_ray.models.loading import LoadedModel, load_model
from focus_ray.models.spec import ModelSpec
from focus_ray.sampling import SamplingParams

logger = logging.getLogger(__name__)

BATCHED_TOKENS = {"cuda": 8192, "cpu": 1024}
"""Default tokens of a step: enough to fill a GPU; on a CPU, a step of about a second at most."""


class StepRunner(Protocol):
    """What runs a plan: the device, or a fake of a few lines in a test."""

    def run(self, plan: StepPlan) -> StepResult: ...


@dataclass(frozen=True)
class EngineParts:
    """What an engine is made of."""

    scheduler: Scheduler
    runner: StepRunner
    limits: RequestLimits
    stop_token_ids: frozenset[int]
    tokenizer: Tokenizer | None


def assemble(config: EngineConfig) -> EngineParts:
    """Load the model and size everything around it.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
        ValueError: the configuration does not fit the checkpoint, the device or the memory.
    """
    device = _device(config)
    loaded = load_model(
        config.model,
        device=device,
        dtype=_dtype(config, device),
        block_length=config.block_length,
        revision=config.revision,
    )
    spec = loaded.spec
    dtype = _dtype(config, device) or spec.dtype
    _check_blocks(config, spec)
    max_batched = config.max_num_batched_tokens or BATCHED_TOKENS[device.type]
    longest = _context(config, spec)
    num_pages = count_pages(
        config,
        bytes_per_page=bytes_per_page(
            num_layers=spec.num_layers,
            page_size=config.page_size,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            dtype=dtype,
        ),
        device=device,
        run_largest_step=lambda: _rehearse(
            _runner(config, loaded, dtype, device, longest, num_pages=1), max_batched, longest
        ),
    )
    max_model_len = _fit_context(config, spec, longest, num_pages)
    tokenizer_path = resolve_checkpoint(config.tokenizer) if config.tokenizer else loaded.path
    return EngineParts(
        scheduler=Scheduler(
            SchedulerLimits(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=max_batched,
                block_length=spec.block_length,
                mask_token_id=spec.mask_token_id,
                record_trace=config.record_trace,
            ),
            PagePool(num_pages, config.page_size, config.enable_prefix_caching),
        ),
        runner=_runner(config, loaded, dtype, device, max_model_len, num_pages),
        limits=RequestLimits(
            vocab_size=spec.vocab_size,
            mask_token_id=spec.mask_token_id,
            max_model_len=max_model_len,
            block_length=spec.block_length,
            max_completions=config.max_num_seqs + config.max_num_waiting,
            defaults=_default_params(config, spec),
        ),
        stop_token_ids=frozenset(spec.stop_token_ids),
        tokenizer=Tokenizer.from_path(tokenizer_path),
    )


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


def _check_blocks(config: EngineConfig, spec: ModelSpec) -> None:
    if config.page_size % spec.block_length:
        raise ValueError(
            f"page_size {config.page_size} is not a multiple of the model's block length "
            f"{spec.block_length}; set page_size or block_length"
        )
    if config.denoising_steps is not None and config.denoising_steps > spec.block_length:
        raise ValueError(
            f"denoising_steps {config.denoising_steps} is above the block length "
            f"{spec.block_length}; each step decodes at least one token"
        )


def _context(config: EngineConfig, spec: ModelSpec) -> int:
    """Longest prompt plus output; the last block it touches must have positions."""
    limit = spec.max_position_embeddings
    wanted = config.max_model_len or limit
    if wanted > limit:
        raise ValueError(
            f"max_model_len {wanted} is above the {limit} positions this model was made for"
        )
    whole_blocks = limit // spec.block_length * spec.block_length
    if whole_blocks == 0:
        raise ValueError(f"block_length {spec.block_length} is above the model's {limit} positions")
    return min(wanted, whole_blocks)


def _fit_context(config: EngineConfig, spec: ModelSpec, longest: int, num_pages: int) -> int:
    """One sequence must fit the pool alone, or nothing could ever finish."""
    room = num_pages * config.page_size
    if longest <= room:
        return longest
    if config.max_model_len is not None:
        raise ValueError(
            f"max_model_len {longest} needs more than the {num_pages} KV pages of "
            f"{config.page_size} tokens; lower it to {room} or raise kv_cache_memory_bytes"
        )
    logger.warning("max_model_len is lowered from %d to the %d tokens of KV", longest, room)
    return room


def _runner(
    config: EngineConfig,
    loaded: LoadedModel,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
    num_pages: int,
) -> Runner:
    spec = loaded.spec
    cache = KVCache(
        num_layers=spec.num_layers,
        num_pages=num_pages,
        page_size=config.page_size,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=dtype,
        device=device,
    )
    state = BlockState(
        config.max_num_seqs,
        spec.block_length,
        -(-max_model_len // config.page_size),
        spec.mask_token_id,
        device,
    )
    return Runner(loaded.model, spec.vocab_size, cache, state)


def _rehearse(runner: Runner, max_batched: int, longest: int) -> None:
    """Run a step with every slot decoding and the rest of the token budget in prefill.

    All page tables point at one page: the values mean nothing, the memory in use does.
    """
    block_length = runner.state.block_length
    slots_N = np.arange(len(runner.state.block_start_M), dtype=np.int64)
    blocks_left = max(max_batched // block_length - len(slots_N), 1)
    chunk_blocks = max(longest // block_length, 1)
    chunks = [
        PrefillChunk(0, 0, np.zeros(min(chunk_blocks, blocks_left - done) * block_length, np.int32))
        for done in range(0, blocks_left, chunk_blocks)
    ]
    runner.run(StepPlan(decode_slots_N=slots_N, prefill=chunks, max_kv_len=longest))


def _default_params(config: EngineConfig, spec: ModelSpec) -> SamplingParams:
    return SamplingParams(
        temperature=spec.sampling.temperature,
        top_p=spec.sampling.top_p,
        top_k=spec.sampling.top_k,
        unmasking=config.unmasking,
        confidence_threshold=config.confidence_threshold,
        denoising_steps=config.denoising_steps or spec.block_length,
    )
