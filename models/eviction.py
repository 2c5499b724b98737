"""Leaving masked tokens out of a forward pass after layer 1 (FOCUS, arXiv 2601.23278).

Shared by all model families: importance in layers 0 and 1, their difference, the choice, and what
the later layers need to know of it. N decoding blocks of B positions, which are the first N rows of
the step (the rest is prefill and always retained); T tokens of the step, R retained ones, Q of
these masked; D hidden size, H query heads, K KV heads, d head size.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from focus_ray.kernels.compact import compact
from focus_ray.kernels.importance import importance
from focus_ray.kernels.retain import retain
from focus_ray.models.step import StepTensors


class Eviction:
    """Decides the eviction of one forward pass, and remembers what it decided.

    Args:
        processed_NB: bool, positions of each block that the step processes.
        masked_NB: bool, a subset of ``processed_NB``.
        target_N: int64, of ``focus_ray.kernels.retain.eviction_target``.
        progress_N: int64, rightmost position ever computed past layer 1 in this block; -1: none.
        block_start_N: int64, absolute position of each block's first token.
        importance_dtype: what importances are rounded to before they are compared.
        attend_cached: tokens see decoded ones to the right of all retained ones too.

    Attributes, after ``retain``:
        kept_NB: bool, positions that were retained, decoded ones of the step included.
        delta_NB: float32, change of importance from layer 0 to layer 1; 0 where not masked.
        masked_row_Q: int64, which of the R tokens are masked.
        masked_place_Q: int64, where these stand: ``n * B + position``.
    """

    kept_NB: Tensor
    delta_NB: Tensor
    masked_row_Q: Tensor
    masked_place_Q: Tensor

    def __init__(
        self,
        processed_NB: Tensor,
        masked_NB: Tensor,
        target_N: Tensor,
        progress_N: Tensor,
        block_start_N: Tensor,
        *,
        importance_dtype: torch.dtype,
        attend_cached: bool,
    ) -> None:
        self._processed_NB = processed_NB
        self._masked_NB = masked_NB
        self._target_N = target_N
        self._progress_N = progress_N
        self._block_start_N = block_start_N
        self._importance_dtype = importance_dtype
        self._attend_cached = attend_cached
        self._first_NB: Tensor | None = None

    def observe(self, q_THd: Tensor, k_TKd: Tensor, step: StepTensors) -> None:
        """Take the importance in layer 0, from queries and keys as attention uses them."""
        self._first_NB = self._importance(q_THd, k_TKd, step)

    def retain(
        self, x_TD: Tensor, q_THd: Tensor, k_TKd: Tensor, step: StepTensors
    ) -> tuple[Tensor, Tensor, StepTensors]:
        """Choose by the change of importance in layer 1, and leave out what is not retained.

        Waits for the device once, to learn how many tokens there are.

        Returns:
            Residual stream and queries of the R tokens, and what the later layers know of these.
            Its ``token_ids_T`` is empty: the embedding is past, and nobody else asks for them.
        """
        assert self._first_NB is not None, "layer 0 was not observed"
        retained = retain(
            self._first_NB,
            self._importance(q_THd, k_TKd, step),
            self._processed_NB,
            self._masked_NB,
            self._target_N,
            self._progress_N,
            importance_dtype=self._importance_dtype,
            attend_cached=self._attend_cached,
        )
        num_evicted, num_masked = retained.counts_2.tolist()
        compacted = compact(
            x_TD,
            q_THd,
            step.positions_T,
            step.slot_T,
            step.kv_limit_T,
            step.row_offsets_S1,
            self._processed_NB,
            self._masked_NB,
            retained,
            self._block_start_N,
            num_evicted=num_evicted,
            num_masked=num_masked,
        )
        self.kept_NB, self.delta_NB = retained.kept_NB, retained.delta_NB
        self.masked_row_Q = compacted.masked_row_Q
        self.masked_place_Q = compacted.masked_place_Q
        kept_step = replace(
            step,
            token_ids_T=step.token_ids_T[:0],
            positions_T=compacted.positions_R,
            kv_limit_T=compacted.kv_limit_R,
            slot_T=compacted.slot_R,
            row_offsets_S1=compacted.row_offsets_S1,
        )
        return compacted.x_RD, compacted.q_RHd, kept_step

    def _importance(self, q_THd: Tensor, k_TKd: Tensor, step: StepTensors) -> Tensor:
        return importance(q_THd, k_TKd, step.row_offsets_S1, self._processed_NB, self._masked_NB)
