"""Sizes an engine works with, from its configuration and the checkpoint's facts. Pure."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from focus_ray.config import MAX_BLOCK_LENGTH, EngineConfig
from focus_ray.models.spec import ModelSpec

logger = logging.getLogger(__name__)

LEAST_PAGE_SIZE = 32
BATCHED_TOKENS = {"cuda": 8192, "cpu": 1024}
"""Default tokens of a step: enough to fill a GPU; on a CPU, a step of about a second at most."""

LEAST_PREFILL_TOKENS = {"cuda": 2048, "cpu": 0}
"""Room for prefill, by default, beside as many decoding sequences as there can be."""


@dataclass(frozen=True)
class EngineSizes:
    """All in tokens.

    Args:
        max_num_batched_tokens: what a step aims at; prefill takes what decoding leaves.
        max_step_tokens: what a step can hold: whatever it aims at, every sequence decodes in it,
            with room for what an eighth of them have left over from their last block.
        max_prefill_rows: blocks; two more, of one sequence, still fit into the step.
        longest: prompt plus output of one sequence, before it is known how many pages there are.
    """

    block_length: int
    page_size: int
    max_num_batched_tokens: int
    max_step_tokens: int
    max_prefill_rows: int
    longest: int


def resolve_sizes(config: EngineConfig, spec: ModelSpec, device_type: str) -> EngineSizes:
    """Fill in what the configuration leaves open.

    Raises:
        ValueError: the configuration does not fit the checkpoint.
    """
    block_length = spec.block_length
    if block_length > MAX_BLOCK_LENGTH:
        raise ValueError(
            f"the checkpoint's block length {block_length} is above {MAX_BLOCK_LENGTH}, the most "
            "that this engine decodes; set block_length"
        )
    page_size = config.page_size or -(-LEAST_PAGE_SIZE // block_length) * block_length
    if page_size % block_length:
        raise ValueError(
            f"page_size {page_size} is not a multiple of the model's block length {block_length}; "
            "set page_size or block_length"
        )
    if config.denoising_steps is not None and config.denoising_steps > block_length:
        raise ValueError(
            f"denoising_steps {config.denoising_steps} is above the block length {block_length}; "
            "each step decodes at least one token"
        )
    compares = config.decoding == "focus" and config.eviction_policy == "delta"
    if compares and spec.num_layers < 2:
        raise ValueError(
            f"eviction policy delta compares layers 0 and 1, this model has {spec.num_layers}; use "
            "leftmost, or decoding delayed or block"
        )
    decoding = config.max_num_seqs * block_length
    decoding += -(-config.max_num_seqs // 8) * block_length
    batched = config.max_num_batched_tokens or max(
        BATCHED_TOKENS[device_type], decoding + LEAST_PREFILL_TOKENS[device_type]
    )
    blocks = -(-max(batched, decoding + block_length, 3 * block_length) // block_length)
    return EngineSizes(
        block_length=block_length,
        page_size=page_size,
        max_num_batched_tokens=batched,
        max_step_tokens=blocks * block_length,
        max_prefill_rows=blocks - 2,
        longest=_longest(config, spec),
    )


def _longest(config: EngineConfig, spec: ModelSpec) -> int:
    """The last block a sequence touches must have positions to the end."""
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


def fit_context(config: EngineConfig, sizes: EngineSizes, num_pages: int) -> int:
    """Longest sequence, tokens: one must fit the pool alone, or nothing could ever finish.

    Raises:
        ValueError: the configured length does not fit.
    """
    room = num_pages * sizes.page_size
    if sizes.longest <= room:
        return sizes.longest
    if config.max_model_len is not None:
        raise ValueError(
            f"max_model_len {sizes.longest} needs more than the {num_pages} KV pages of "
            f"{sizes.page_size} tokens; lower it to {room} or raise kv_cache_memory_bytes"
        )
    logger.warning("max_model_len is lowered from %d to the %d tokens of KV", sizes.longest, room)
    return room
