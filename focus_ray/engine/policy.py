"""Which tokens of its block a sequence processes in a step, and which go past layer 1.

One class per way of decoding, behind one interface. N decoding slots, B block length. Everything is
read from the block state; nothing is kept here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from focus_ray.config import EngineConfig
from focus_ray.engine.block_state import BlockState
from focus_ray.engine.delayed import processing_set
from focus_ray.kernels.retain import eviction_target
from focus_ray.models.eviction import Eviction


class DecodingPolicy(Protocol):
    """How much of each block is computed."""

    @property
    def attend_cached(self) -> bool:
        """Whether a token sees decoded tokens right of everything its block still processes."""
        ...

    def processing_set(self, state: BlockState, slots_N: Tensor) -> Tensor:
        """``[N, B]`` bool: the tokens that the step takes up; no row is empty."""
        ...

    def eviction(self, state: BlockState, slots_N: Tensor, processed_NB: Tensor) -> Eviction | None:
        """What decides, within the pass, who goes past layer 1; None: everybody does."""
        ...


@dataclass(frozen=True)
class WholeBlocks:
    """Plain block diffusion: the whole block in every step."""

    attend_cached: bool = False

    def processing_set(self, state: BlockState, slots_N: Tensor) -> Tensor:
        return torch.ones_like(state.decoded_MB[slots_N])

    def eviction(self, state: BlockState, slots_N: Tensor, processed_NB: Tensor) -> Eviction | None:
        return None


@dataclass(frozen=True)
class DelayedCache:
    """Decoded tokens leave once their KV is final."""

    attend_cached: bool

    def processing_set(self, state: BlockState, slots_N: Tensor) -> Tensor:
        return processing_set(state.uncached_MB[slots_N], state.warm_up_M[slots_N])

    def eviction(self, state: BlockState, slots_N: Tensor, processed_NB: Tensor) -> Eviction | None:
        return None


@dataclass(frozen=True)
class RetainByDelta(DelayedCache):
    """FOCUS as published: masked tokens whose importance grew least leave after layer 1.

    Args:
        alpha: masked tokens to retain, relative to the mean decoded per step; at least 1.
        importance_dtype: importances are rounded to it before they are compared.
    """

    alpha: float
    importance_dtype: torch.dtype

    def eviction(self, state: BlockState, slots_N: Tensor, processed_NB: Tensor) -> Eviction | None:
        masked_NB = ~state.decoded_MB[slots_N]
        return Eviction(
            processed_NB=processed_NB,
            masked_NB=masked_NB,
            target_N=_target(state, slots_N, masked_NB, self.alpha),
            progress_N=state.progress_M[slots_N],
            block_start_N=state.block_start_M[slots_N],
            importance_dtype=self.importance_dtype,
            attend_cached=self.attend_cached,
        )


@dataclass(frozen=True)
class RetainLeftmost(DelayedCache):
    """The same number of masked tokens, the leftmost ones; the others are not computed at all.

    Needs no importance, and knows before the step how many tokens it takes. A step takes every
    masked token left of its rightmost one, so whatever stands left of a decoded token went through
    some step at least once, and nobody reads KV that was never computed.

    Args:
        alpha: as in ``RetainByDelta``.
    """

    alpha: float

    def processing_set(self, state: BlockState, slots_N: Tensor) -> Tensor:
        processed_NB = super().processing_set(state, slots_N)
        masked_NB = ~state.decoded_MB[slots_N]
        target_N = _target(state, slots_N, masked_NB, self.alpha)
        return processed_NB & ~(masked_NB & (masked_NB.cumsum(1) > target_N[:, None]))


def make_policy(config: EngineConfig, dtype: torch.dtype) -> DecodingPolicy:
    """The policy that a configuration asks for; ``dtype`` is the model's."""
    if config.decoding == "block":
        return WholeBlocks()
    if config.decoding == "delayed":
        return DelayedCache(config.attend_cached)
    if config.eviction_policy == "leftmost":
        return RetainLeftmost(config.attend_cached, config.focus_alpha)
    importance_dtype = dtype if config.round_importance else torch.float32
    return RetainByDelta(config.attend_cached, config.focus_alpha, importance_dtype)


def _target(state: BlockState, slots_N: Tensor, masked_NB: Tensor, alpha: float) -> Tensor:
    """Masked tokens to retain; all of them where later layers would else read what is not there.

    That is the first step of a block which is taken up again after preemption: its decoded tokens
    are known, but the KV of none of its tokens is, masked ones between decoded ones included.
    """
    num_masked_N = masked_NB.sum(1)
    mean_N = state.decoded_sum_M[slots_N] / state.productive_steps_M[slots_N].clamp_min(1)
    target_N = eviction_target(num_masked_N, mean_N, torch.full_like(mean_N, alpha))
    behind_a_mask_NB = ~masked_NB & (masked_NB.cumsum(1) > 0)
    taken_up_again_N = state.warm_up_M[slots_N] & behind_a_mask_NB.any(1)
    return torch.where(taken_up_again_N, num_masked_N, target_N)
