"""What the device keeps about every running sequence, and how the host's changes reach it.

M slots (``max_num_seqs``), B block length, W words per slot, F prefill rows, P pages per sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from focus_ray.engine.plan import PageUpdate, PrefillChunk, SlotStart, StepPlan
from focus_ray.kernels.slot_words import STRATEGIES, SlotLayout, SlotWords


class BlockState:
    """Words of all slots, their page tables, and the rows that the next step prefills.

    The host changes it between two steps, with one copy per kind of change; what a step decides
    changes it on the device. Copies are queued behind the steps that were launched before.
    """

    def __init__(
        self,
        layout: SlotLayout,
        num_slots: int,
        pages_per_seq: int,
        num_prefill_rows: int,
        mask_token_id: int,
        device: torch.device,
    ) -> None:
        self.layout = layout
        self.mask_token_id = mask_token_id
        self.device = device
        self.words = SlotWords.allocate(layout, num_slots, device)
        self.page_table_MP = torch.zeros(num_slots, pages_per_seq, dtype=torch.int32, device=device)
        # count, slots, starts and ids of the prefill rows side by side: one copy brings all
        sizes = [1, num_prefill_rows, num_prefill_rows, num_prefill_rows * layout.block_length]
        self._prefill = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        self._host_prefill = torch.zeros(
            sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda"
        )
        self.num_prefill_1, self.prefill_slot_F, self.prefill_start_F, ids = self._prefill.split(
            sizes
        )
        self.prefill_ids_FB = ids.view(num_prefill_rows, layout.block_length)

    @property
    def num_slots(self) -> int:
        return self.words.num_slots

    @property
    def block_length(self) -> int:
        return self.layout.block_length

    def take(self, plan: StepPlan) -> None:
        """Make the changes that a step begins with."""
        if plan.stops:
            slots_N = self._to_device(np.array(plan.stops, np.int64))
            self.words.scalar("active")[slots_N] = 0
        if plan.starts:
            slots_N = self._to_device(np.array([start.slot for start in plan.starts], np.int64))
            words_NW = self._to_device(pack_starts(self.layout, plan.starts, self.mask_token_id))
            self.words.words_MW.index_copy_(0, slots_N, words_NW)
        self._update_pages(plan.page_updates)
        self._take_prefill(plan.prefill)

    def _update_pages(self, updates: Sequence[PageUpdate]) -> None:
        if not updates:
            return
        width = self.page_table_MP.shape[1]
        where = [u.slot * width + u.first + i for u in updates for i in range(len(u.pages))]
        pages = [page for update in updates for page in update.pages]
        changed_2N = self._to_device(np.array([where, pages], np.int64))
        self.page_table_MP.view(-1).index_copy_(0, changed_2N[0], changed_2N[1].int())

    def _take_prefill(self, chunks: Sequence[PrefillChunk]) -> None:
        host, num_rows = self._host_prefill.numpy(), len(self.prefill_slot_F)
        if not chunks and not host[0]:
            return  # as it was
        length = self.block_length
        blocks = [len(chunk.token_ids) // length for chunk in chunks]
        count = sum(blocks)
        host[0] = count
        if chunks:
            host[1 : 1 + count] = np.repeat([chunk.slot for chunk in chunks], blocks)
            host[1 + num_rows : 1 + num_rows + count] = np.concatenate(
                [np.arange(c.start, c.start + len(c.token_ids), length) for c in chunks]
            )
            first = 1 + 2 * num_rows
            host[first : first + count * length] = np.concatenate([c.token_ids for c in chunks])
        self._prefill.copy_(self._host_prefill, non_blocking=True)

    def _to_device(self, values: NDArray[np.generic]) -> Tensor:
        tensor = torch.from_numpy(values)
        if self.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)


def pack_starts(
    layout: SlotLayout, starts: Sequence[SlotStart], mask_token_id: int
) -> NDArray[np.int32]:
    """``[N, W]``: the words of sequences that begin to decode.

    The KV of a block in progress is not in the pages, whatever was decoded of it, so it begins
    like a new one.
    """
    words_NW = np.zeros((len(starts), layout.num_words), np.int32)
    floats_NW = words_NW.view(np.float32)
    words_NW[:, layout.array("uncached")] = 1
    words_NW[:, layout.stop_ids] = mask_token_id
    for row, start in enumerate(starts):
        params = start.params
        assert params.unmasking and params.denoising_steps, "parameters are resolved at admission"
        words_NW[row, layout.array("token_ids")] = start.block.token_ids_B
        words_NW[row, layout.array("decoded")] = start.block.decoded_B
        floats_NW[row, layout.array("logprobs")] = start.block.logprobs_B
        first_stop = layout.stop_ids.start
        words_NW[row, first_stop : first_stop + len(start.stop_token_ids)] = start.stop_token_ids
        seed = start.seed & 0xFFFFFFFFFFFFFFFF
        integers = {
            "active": 1,
            "block_start": start.block_start,
            "denoising_step": start.block.denoising_step,
            "warm_up": 1,
            "progress": -1,
            "prompt_len": start.prompt_len,
            "limit": start.prompt_len + (params.max_tokens or 0),
            "strategy": STRATEGIES.index(params.unmasking),
            "num_steps": params.denoising_steps,
            "top_k": max(params.top_k or 0, 0),
            "seed_low": _signed(seed & 0xFFFFFFFF),
            "seed_high": _signed(seed >> 32),
            "suppress_before": start.prompt_len + params.min_tokens,
        }
        floats = {
            "threshold": params.confidence_threshold,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "min_p": params.min_p,
        }
        for name, integer in integers.items():
            words_NW[row, layout.word(name)] = integer
        for name, number in floats.items():
            floats_NW[row, layout.word(name)] = number
    return words_NW


def _signed(word: int) -> int:
    """Of 32 bits, as int32 reads them."""
    return word - (1 << 32) if word >> 31 else word
