"""Leaving masked tokens out of a forward pass after layer 1 (FOCUS, arXiv 2601.23278).

Shared by all model families: importance in layers 0 and 1, their difference, the choice, and what
the later layers need to know of it. S rows of the step, each of one block of B positions; T tokens
of the step, R retained ones; D hidden size, H query heads, K KV heads, d head size: of heads, what
the rank holds.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from focus_ray.kernels.compact import Compacted, compact
from focus_ray.kernels.importance import importance
from focus_ray.kernels.retain import Retained, retain
from focus_ray.kernels.rows import Rows
from focus_ray.models.parallel import WHOLE, Shards
from focus_ray.models.step import StepTensors


class Eviction:
    """Decides the eviction of one forward pass, on buffers that it is given.

    Nothing here waits for the device, and everything it does can be recorded into a CUDA graph.
    Ranks add up the importances of both layers at once, and all choose the same.
    The buffers hold as many rows as the largest step; a step uses the first of them, as many as it
    has itself.

    Args:
        rows: of the step.
        retained: where the choice goes.
        compacted: where the retained tokens go.
        trash_slot: KV slot that nobody reads, for padding.
        importance_dtype: what importances are rounded to before they are compared.
        attend_cached: tokens see decoded ones to the right of all retained ones too.
        shards: over whose ranks the heads are divided.
    """

    def __init__(
        self,
        rows: Rows,
        retained: Retained,
        compacted: Compacted,
        *,
        trash_slot: int,
        importance_dtype: torch.dtype,
        attend_cached: bool,
        shards: Shards = WHOLE,
    ) -> None:
        self._rows = rows
        self._retained = retained
        self._compacted = compacted
        self._trash_slot = trash_slot
        self._importance_dtype = importance_dtype
        self._attend_cached = attend_cached
        self._shards = shards
        self._first_SB: Tensor | None = None

    def observe(self, q_THd: Tensor, k_TKd: Tensor, step: StepTensors) -> None:
        """Take the importance in layer 0, from queries and keys as attention uses them."""
        self._first_SB = self._importance(q_THd, k_TKd, step)

    def choose(self, q_THd: Tensor, k_TKd: Tensor, step: StepTensors) -> None:
        """Choose by the change of importance in layer 1; the choice is in ``retained`` then."""
        first_SB, self._first_SB = self._first_SB, None
        assert first_SB is not None, "layer 0 was not observed"
        num_rows = len(first_SB)
        second_SB = self._importance(q_THd, k_TKd, step)
        if self._shards.size > 1:
            # In float32: what is rounded is the sum over all heads, as on one rank.
            both_2SB = self._shards.add_up(torch.stack((first_SB, second_SB)))
            first_SB, second_SB = both_2SB.unbind()
        retain(
            first_SB,
            second_SB,
            self._rows.processed_SB[:num_rows],
            self._rows.masked_SB[:num_rows],
            self._rows.target_S[:num_rows],
            self._rows.progress_S[:num_rows],
            importance_dtype=self._importance_dtype,
            attend_cached=self._attend_cached,
            out=self._retained,
        )

    def compact(
        self, x_TD: Tensor, q_THd: Tensor, step: StepTensors
    ) -> tuple[Tensor, Tensor, StepTensors]:
        """Leave out what was not chosen.

        Returns:
            Residual stream and queries of the R retained tokens and of T - R that are padding, and
            what the later layers know of them: views of the buffers. No token ids: the embedding
            is past, and nobody else asks for them.
        """
        rows, num_rows, num_tokens = self._rows, len(step.row_table_S), len(x_TD)
        num_slots, block_length = len(rows.row_of_slot_M), rows.masked_SB.shape[1]
        out = self._compacted.first(num_tokens, num_rows)
        compact(
            x_TD,
            q_THd,
            step.positions_T,
            step.slot_T,
            step.row_offsets_S1,
            rows.row_slot_S[:num_rows],
            rows.row_start_S[:num_rows],
            rows.processed_SB[:num_rows],
            rows.masked_SB[:num_rows],
            self._retained.first_rows(num_rows),
            trash_slot=self._trash_slot,
            trash_place=num_slots * block_length,
            out=out,
        )
        kept_step = replace(
            step,
            token_ids_T=step.token_ids_T[:0],
            positions_T=out.positions_R,
            kv_limit_T=out.kv_limit_R,
            slot_T=out.slot_R,
            row_offsets_S1=out.row_offsets_S1,
        )
        return out.x_RD, out.q_RHd, kept_step

    def _importance(self, q_THd: Tensor, k_TKd: Tensor, step: StepTensors) -> Tensor:
        num_rows = len(step.row_table_S)
        return importance(
            q_THd,
            k_TKd,
            step.row_offsets_S1,
            self._rows.processed_SB[:num_rows],
            self._rows.masked_SB[:num_rows],
            self._rows.target_S[:num_rows],
        )
