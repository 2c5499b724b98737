"""What the device keeps about every running sequence: fixed slots, vectorised changes.

M slots (``max_num_seqs``), B block length, N slots of a step, P pages per sequence, K stop ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from focus_ray.engine.decoding import STRATEGY_CODES
from focus_ray.engine.delayed import after_step
from focus_ray.engine.plan import PageUpdate, SlotStart


class BlockState:
    """Arrays over slots: the current block, its progress, and the request's parameters.

    ``max_stop_token_ids`` is room for a request's own stop ids and the checkpoint's.

    A slot's row means something from ``start`` until the host stops naming the slot; nothing is
    cleared in between.
    """

    def __init__(
        self,
        max_num_seqs: int,
        block_length: int,
        pages_per_seq: int,
        mask_token_id: int,
        max_stop_token_ids: int,
        device: torch.device,
    ) -> None:
        self.block_length = block_length
        self.mask_token_id = mask_token_id
        self.device = device

        def full(shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        m = max_num_seqs
        self.token_ids_MB = full((m, block_length), mask_token_id, torch.int64)
        self.decoded_MB = full((m, block_length), False, torch.bool)
        self.block_start_M = full((m,), 0, torch.int64)
        self.denoising_step_M = full((m,), 0, torch.int64)
        self.uncached_MB = full((m, block_length), True, torch.bool)
        self.warm_up_M = full((m,), True, torch.bool)
        self.progress_M = full((m,), -1, torch.int64)
        self.decoded_sum_M = full((m,), 0, torch.float32)
        self.productive_steps_M = full((m,), 0, torch.int64)
        self.page_table_MP = full((m, pages_per_seq), 0, torch.int32)

        self.strategy_M = full((m,), 0, torch.int64)
        self.threshold_M = full((m,), 0, torch.float32)
        self.denoising_steps_M = full((m,), 1, torch.int64)
        self.temperature_M = full((m,), 0, torch.float32)
        self.top_p_M = full((m,), 1, torch.float32)
        self.top_k_M = full((m,), 0, torch.int64)
        self.min_p_M = full((m,), 0, torch.float32)
        self.seed_M = full((m,), 0, torch.int64)
        self.suppress_before_M = full((m,), 0, torch.int64)
        self.suppressed_MK = full((m, max_stop_token_ids), mask_token_id, torch.int64)

    def start(self, starts: Sequence[SlotStart]) -> None:
        """Sequences take slots; one copy per array, however many start."""
        if not starts:
            return
        slots_N = self._tensor([s.slot for s in starts], torch.int64)
        params = [s.params for s in starts]

        def put(array: Tensor, values: object) -> None:
            array[slots_N] = self._tensor(values, array.dtype)

        put(self.token_ids_MB, np.stack([s.block.token_ids_B for s in starts]))
        put(self.decoded_MB, np.stack([s.block.decoded_B for s in starts]))
        put(self.block_start_M, [s.block_start for s in starts])
        put(self.denoising_step_M, [s.block.denoising_step for s in starts])
        # the KV of a block in progress is not in the pages, whatever was decoded of it
        self.uncached_MB[slots_N] = True
        self.warm_up_M[slots_N] = True
        self.progress_M[slots_N] = -1
        self.decoded_sum_M[slots_N] = 0.0
        self.productive_steps_M[slots_N] = 0
        put(self.strategy_M, [STRATEGY_CODES[p.unmasking] for p in params if p.unmasking])
        put(self.threshold_M, [p.confidence_threshold for p in params])
        put(self.denoising_steps_M, [p.denoising_steps for p in params])
        put(self.temperature_M, [p.temperature for p in params])
        put(self.top_p_M, [p.top_p for p in params])
        put(self.top_k_M, [max(p.top_k or 0, 0) for p in params])
        put(self.min_p_M, [p.min_p for p in params])
        put(self.seed_M, [s.seed for s in starts])
        put(self.suppress_before_M, [s.prompt_len + s.params.min_tokens for s in starts])
        suppressed = np.full((len(starts), self.suppressed_MK.shape[1]), self.mask_token_id)
        for row, start in zip(suppressed, starts, strict=True):
            row[: len(start.stop_token_ids)] = start.stop_token_ids
        put(self.suppressed_MK, suppressed)

    def update_pages(self, updates: Sequence[PageUpdate]) -> None:
        """Write new entries of page tables, in one scatter."""
        if not updates:
            return
        rows = [update.slot for update in updates for _ in update.pages]
        columns = [update.first + i for update in updates for i in range(len(update.pages))]
        pages = [page for update in updates for page in update.pages]
        where = (self._tensor(rows, torch.int64), self._tensor(columns, torch.int64))
        self.page_table_MP[where] = self._tensor(pages, torch.int32)

    def advance(
        self, slots_N: Tensor, token_ids_NB: Tensor, decoded_NB: Tensor, kept_NB: Tensor
    ) -> None:
        """Store the blocks after a step; a block that was wholly decoded before it is committed.

        A committed block makes place for the next one, all masked and nothing of it computed.

        Args:
            kept_NB: bool, the tokens that went through all layers.
        """
        before_NB = self.decoded_MB[slots_N]
        committed_N = before_NB.all(1)
        committed_N1 = committed_N[:, None]
        self.token_ids_MB[slots_N] = token_ids_NB.masked_fill(committed_N1, self.mask_token_id)
        self.decoded_MB[slots_N] = decoded_NB & ~committed_N1
        self.block_start_M[slots_N] += committed_N * self.block_length
        step_N = self.denoising_step_M[slots_N] + 1
        self.denoising_step_M[slots_N] = step_N.masked_fill(committed_N, 0)

        uncached_NB = after_step(self.uncached_MB[slots_N], before_NB)
        self.uncached_MB[slots_N] = uncached_NB | committed_N1
        self.warm_up_M[slots_N] = committed_N
        position_B = torch.arange(self.block_length, device=self.device)
        rightmost_N = torch.where(kept_NB, position_B, -1).amax(1)
        progress_N = torch.maximum(self.progress_M[slots_N], rightmost_N)
        self.progress_M[slots_N] = progress_N.masked_fill(committed_N, -1)
        num_decoded_N = (decoded_NB & ~before_NB).sum(1)
        sum_N = self.decoded_sum_M[slots_N] + num_decoded_N
        self.decoded_sum_M[slots_N] = sum_N.masked_fill(committed_N, 0.0)
        productive_N = self.productive_steps_M[slots_N] + (num_decoded_N > 0)
        self.productive_steps_M[slots_N] = productive_N.masked_fill(committed_N, 0)

    def _tensor(self, values: object, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(np.asarray(values)).to(device=self.device, dtype=dtype)
