"""Leaving masked tokens out of a forward pass after layer 1 (FOCUS, arXiv 2601.23278).

Shared by all model families: importance in layers 0 and 1, their difference, the choice, and what
the later layers need to know of it. N blocks that decode, B block length, D tokens of these (the
first D of the step's T; the rest is prefill and always retained), R retained tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from focus_ray.kernels.importance import importance, round_importance
from focus_ray.kernels.retain import retain
from focus_ray.models.step import StepTensors


class Eviction:
    """Decides the eviction of one forward pass, and remembers what it decided.

    Args:
        place_D: int64, ``n * B + position in block`` of each decoding token, ascending.
        masked_NB: bool, positions that are masked; each of them is among the D tokens.
        target_N: int64, of ``focus_ray.kernels.retain.eviction_target``.
        progress_N: int64, rightmost position ever computed past layer 1 in this block; -1: none.
        block_start_N: int64, absolute position of each block's first token.

    Attributes:
        rows_R: int64, the step's tokens that were retained, ascending; after ``retain``.
        kept_NB: bool, positions that were retained, decoded ones of the step included.
    """

    rows_R: Tensor
    kept_NB: Tensor

    def __init__(
        self,
        place_D: Tensor,
        masked_NB: Tensor,
        target_N: Tensor,
        progress_N: Tensor,
        block_start_N: Tensor,
    ) -> None:
        self._place_D = place_D
        self._masked_NB = masked_NB
        self._target_N = target_N
        self._progress_N = progress_N
        self._block_start_N = block_start_N
        self._first_NB: Tensor | None = None

    def observe(self, q_THd: Tensor, k_TKd: Tensor) -> None:
        """Take the importance in layer 0, from queries and keys as attention uses them."""
        self._first_NB = self._importance(q_THd, k_TKd)

    def retain(self, q_THd: Tensor, k_TKd: Tensor, step: StepTensors) -> tuple[Tensor, StepTensors]:
        """Choose by the change of importance in layer 1.

        Returns:
            ``rows_R`` and what the later layers know of these tokens: a token sees its sequence up
            to the rightmost retained position of its block.
        """
        assert self._first_NB is not None, "layer 0 was not observed"
        delta_NB = self._importance(q_THd, k_TKd) - self._first_NB
        retained_NB = retain(delta_NB, self._masked_NB, self._target_N, self._progress_N)

        num_rows, block_length = self._masked_NB.shape
        num_decoding = len(self._place_D)
        kept_D = (retained_NB | ~self._masked_NB).flatten()[self._place_D]
        kept_T = torch.cat([kept_D, kept_D.new_ones(len(step.positions_T) - num_decoding)])
        self.rows_R = kept_T.nonzero()[:, 0]
        place_K = self._place_D[kept_D]
        self.kept_NB = torch.zeros_like(self._masked_NB.flatten()).index_fill_(0, place_K, True)
        self.kept_NB = self.kept_NB.view(num_rows, block_length)

        row_len_S = step.row_offsets_S1.diff().long()
        row_len_S[:num_rows] = self.kept_NB.sum(1)
        position_B = torch.arange(block_length, device=place_K.device)
        rightmost_N = torch.where(self.kept_NB, position_B, -1).amax(1)
        limit_N = (self._block_start_N + rightmost_N + 1).to(step.kv_limit_T.dtype)
        kept_step = replace(
            step,
            token_ids_T=step.token_ids_T[self.rows_R],
            positions_T=step.positions_T[self.rows_R],
            kv_limit_T=torch.cat(
                [limit_N[place_K // block_length], step.kv_limit_T[num_decoding:]]
            ),
            slot_T=step.slot_T[self.rows_R],
            row_offsets_S1=torch.cat([row_len_S.new_zeros(1), row_len_S.cumsum(0)]).int(),
        )
        return self.rows_R, kept_step

    def _importance(self, q_THd: Tensor, k_TKd: Tensor) -> Tensor:
        """Rounded to the model's dtype, as the published rule compares it."""
        q_NBHd, k_NBKd = self._dense(q_THd), self._dense(k_TKd)
        return round_importance(importance(q_NBHd, k_NBKd, self._masked_NB), q_THd.dtype)

    def _dense(self, x_THd: Tensor) -> Tensor:
        num_rows, block_length = self._masked_NB.shape
        dense = x_THd.new_zeros(num_rows * block_length, *x_THd.shape[1:])
        dense.index_copy_(0, self._place_D, x_THd[: len(self._place_D)])
        return dense.view(num_rows, block_length, *x_THd.shape[1:])
