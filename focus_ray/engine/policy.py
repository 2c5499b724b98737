"""Which tokens of its block a sequence processes in a step, and which go past layer 1.

N decoding slots, B block length. Everything is read from the block state; nothing is kept here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from focus_ray.config import Decoding
from focus_ray.engine.block_state import BlockState
from focus_ray.engine.delayed import processing_set
from focus_ray.kernels.retain import eviction_target
from focus_ray.models.eviction import Eviction


@dataclass(frozen=True)
class DecodingPolicy:
    """How much of each block is computed.

    Args:
        decoding: "block": the whole block in every step. "delayed": decoded tokens leave once
            their KV is final. "focus": that, and masked tokens that are unlikely to be decoded
            are left out after layer 1.
        alpha: "focus": masked tokens to retain, relative to the mean decoded per step; at least 1.
    """

    decoding: Decoding
    alpha: float

    def processing_set(self, state: BlockState, slots_N: Tensor) -> Tensor:
        """``[N, B]`` bool: the tokens that the step takes up; no row is empty."""
        if self.decoding == "block":
            return torch.ones_like(state.decoded_MB[slots_N])
        return processing_set(state.uncached_MB[slots_N], state.warm_up_M[slots_N])

    def eviction(
        self,
        state: BlockState,
        slots_N: Tensor,
        processed_NB: Tensor,
        importance_dtype: torch.dtype,
    ) -> Eviction | None:
        """What decides eviction in the step; None where nothing is ever evicted."""
        if self.decoding != "focus":
            return None
        masked_NB = ~state.decoded_MB[slots_N]
        mean_N = state.decoded_sum_M[slots_N] / state.productive_steps_M[slots_N].clamp_min(1)
        return Eviction(
            processed_NB=processed_NB,
            masked_NB=masked_NB,
            target_N=eviction_target(masked_NB.sum(1), mean_N, torch.full_like(mean_N, self.alpha)),
            progress_N=state.progress_M[slots_N],
            block_start_N=state.block_start_M[slots_N],
            importance_dtype=importance_dtype,
            attend_cached=False,
        )
