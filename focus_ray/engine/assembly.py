"""From a configuration to the parts of an engine that fit the checkpoint and the memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from focus_ray.config import DEFAULT_CONFIDENCE_THRESHOLD, EngineConfig
from focus_ray.engine.admission import RequestLimits
from focus_ray.engine.block_state import BlockState
from focus_ray.engine.memory import count_pages
from focus_ray.engine.pages import PagePool
from focus_ray.engine.plan import PrefillChunk, StepPlan, StepResult
from focus_ray.engine.policy import make_policy
from focus_ray.engine.runner import Runner
from focus_ray.engine.scheduler import Scheduler, SchedulerLimits
from focus_ray.engine.sizes import fit_context, resolve_sizes
from focus_ray.engine.tokenizer import Tokenizer
from focus_ray.models.checkpoint import resolve_checkpoint
from focus_ray.models.kv_cache import KVCache, bytes_per_page
from focus_ray.models.loading import load_model
from focus_ray.models.spec import ModelSpec
from focus_ray.sampling import MAX_LOGPROBS, MAX_STOP_TOKEN_IDS, SamplingParams


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
    sizes = resolve_sizes(config, spec, device.type)

    policy = make_policy(config, loaded.dtype)
    diagnose_every = config.diagnose_recall_every if config.decoding == "focus" else 0

    def make_runner(num_pages: int, max_model_len: int) -> Runner:
        cache = KVCache(
            num_layers=spec.num_layers,
            num_pages=num_pages,
            page_size=sizes.page_size,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            dtype=loaded.dtype,
            device=device,
        )
        pages_per_seq = -(-max_model_len // sizes.page_size)
        state = BlockState(
            config.max_num_seqs,
            spec.block_length,
            pages_per_seq,
            spec.mask_token_id,
            MAX_STOP_TOKEN_IDS + len(spec.stop_token_ids),
            device,
        )
        return Runner(loaded.model, spec.vocab_size, cache, state, policy, diagnose_every)

    num_pages = count_pages(
        config,
        bytes_per_page=bytes_per_page(
            num_layers=spec.num_layers,
            page_size=sizes.page_size,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            dtype=loaded.dtype,
        ),
        device=device,
        run_largest_step=lambda: _rehearse(
            make_runner(1, sizes.longest), sizes.max_num_batched_tokens, sizes.longest
        ),
    )
    max_model_len = fit_context(config, sizes, num_pages)
    tokenizer_path = resolve_checkpoint(config.tokenizer) if config.tokenizer else loaded.path
    return EngineParts(
        scheduler=Scheduler(
            SchedulerLimits(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=sizes.max_num_batched_tokens,
                block_length=spec.block_length,
                mask_token_id=spec.mask_token_id,
                record_trace=config.record_trace,
            ),
            PagePool(num_pages, sizes.page_size, config.enable_prefix_caching),
        ),
        runner=make_runner(num_pages, max_model_len),
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


def _rehearse(runner: Runner, max_batched: int, longest: int) -> None:
    """Run a step with every slot decoding and the rest of the token budget in prefill.

    Every slot draws, filters and reports alternatives, which takes several times the memory of the
    logits, and has decoded so much per step that nothing is evicted. All page tables point at one
    page: the values mean nothing, the memory in use does.
    """
    block_length = runner.state.block_length
    slots_N = np.arange(len(runner.state.block_start_M), dtype=np.int64)
    blocks_left = max(max_batched // block_length - len(slots_N), 1)
    chunk_blocks = max(longest // block_length, 1)
    chunks = [
        PrefillChunk(0, 0, np.zeros(min(chunk_blocks, blocks_left - done) * block_length, np.int32))
        for done in range(0, blocks_left, chunk_blocks)
    ]
    runner.state.temperature_M.fill_(1.0)
    runner.state.decoded_sum_M.fill_(block_length)
    runner.run(
        StepPlan(
            decode_slots_N=slots_N,
            prefill=chunks,
            max_kv_len=longest,
            num_top_logprobs=MAX_LOGPROBS,
            any_sampled=True,
            any_filtered=True,
            any_suppressed=True,
        )
    )


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
    )
