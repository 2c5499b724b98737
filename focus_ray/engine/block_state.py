"""What the device keeps about every running sequence, and how the host's changes reach it.

M slots (``max_num_seqs``), B block length, W words per slot, F prefill rows, P pages per sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from focus_ray.engine.plan import PrefillChunk, SlotStart, StepPlan
from focus_ray.kernels.slot_words import STRATEGIES, SlotLayout, SlotWords
from focus_ray.sampling import SamplingParams


class BlockState:
    """Words of all slots, their page tables, and the rows that the next step prefills.

    The host changes it between two steps, with a few copies for all changes together; what a step
    decides changes it on the device. Copies are queued behind the steps that were launched before.
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
        self._message = Message(device)

    @property
    def num_slots(self) -> int:
        return self.words.num_slots

    @property
    def block_length(self) -> int:
        return self.layout.block_length

    def take(self, plan: StepPlan) -> None:
        """Make the changes that a step begins with."""
        updates, width = plan.page_updates, self.page_table_MP.shape[1]
        lists = (
            plan.stops,
            [start.slot for start in plan.starts],
            [u.slot * width + u.first + i for u in updates for i in range(len(u.pages))],
            [page for update in updates for page in update.pages],
        )
        if any(lists):
            numbers = np.array([*chain(*lists)], np.int64)
            words = pack_starts(self.layout, plan.starts, self.mask_token_id)
            sent = self._message.send(numbers.view(np.int32), words.reshape(-1))
            lengths = [len(part) for part in lists]
            indices = sent[: 2 * len(numbers)].view(torch.int64)
            stops_N, starts_N, where_N, pages_N = indices.split(lengths)
            if plan.stops:
                self.words.scalar("active").index_fill_(0, stops_N, 0)
            if plan.starts:
                words_NW = sent[2 * len(numbers) :].view(words.shape)
                self.words.words_MW.index_copy_(0, starts_N, words_NW)
            if updates:
                self.page_table_MP.view(-1).index_copy_(0, where_N, pages_N.int())
        self._take_prefill(plan.prefill)

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


class Message:
    """Numbers on their way to the device, in memory that is used again for the next ones."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._host = self._there = torch.zeros(0, dtype=torch.int32)
        self._sent = torch.cuda.Event() if self._is_cuda else None

    def send(self, *parts: NDArray[np.int32]) -> Tensor:
        """All parts in one, on the device; valid until the next message is sent."""
        size = sum(map(len, parts))
        if size > len(self._host):
            room = 2 * size
            self._host = torch.zeros(room, dtype=torch.int32, pin_memory=self._is_cuda)
            self._there = torch.zeros(room, dtype=torch.int32, device=self._device)
        elif self._sent is not None:
            self._sent.synchronize()  # long since: a step has run in between
        np.concatenate(parts, out=self._host.numpy()[:size])
        self._there[:size].copy_(self._host[:size], non_blocking=True)
        if self._sent is not None:
            self._sent.record()
        return self._there[:size]


def pack_starts(
    layout: SlotLayout, starts: Sequence[SlotStart], mask_token_id: int
) -> NDArray[np.int32]:
    """``[N, W]``: the words of sequences that begin to decode, a column at a time.

    The KV of a block in progress is not in the pages, whatever was decoded of it, so it begins
    like a new one.
    """
    words_NW = np.zeros((len(starts), layout.num_words), np.int32)
    if not starts:
        return words_NW
    floats_NW = words_NW.view(np.float32)
    blocks, params = [start.block for start in starts], [start.params for start in starts]
    seed_N2 = np.array([[start.seed] for start in starts], np.int64).view(np.int32)  # low, high
    integers: dict[str, Any] = {
        "active": 1,
        "block_start": [start.block_start for start in starts],
        "denoising_step": [block.denoising_step for block in blocks],
        "post_steps": [block.post_steps for block in blocks],
        "warm_up": 1,
        "progress": -1,
        "prompt_len": [start.prompt_len for start in starts],
        "limit": [start.prompt_len + (start.params.max_tokens or 0) for start in starts],
        "strategy": [STRATEGIES.index(_unmasking(each)) for each in params],
        "num_steps": [each.denoising_steps or layout.block_length for each in params],
        "max_post_steps": [each.max_post_steps for each in params],
        "top_k": [max(each.top_k or 0, 0) for each in params],
        "seed_low": seed_N2[:, 0],
        "seed_high": seed_N2[:, 1],
        "suppress_before": [start.prompt_len + start.params.min_tokens for start in starts],
    }
    floats: dict[str, Any] = {
        "threshold": [each.confidence_threshold for each in params],
        "editing_threshold": [each.editing_threshold for each in params],
        "temperature": [each.temperature for each in params],
        "top_p": [each.top_p for each in params],
        "min_p": [each.min_p for each in params],
    }
    for name, integer_N in integers.items():
        words_NW[:, layout.word(name)] = integer_N
    for name, float_N in floats.items():
        floats_NW[:, layout.word(name)] = float_N
    words_NW[:, layout.array("token_ids")] = [block.token_ids_B for block in blocks]
    words_NW[:, layout.array("decoded")] = [block.decoded_B for block in blocks]
    floats_NW[:, layout.array("logprobs")] = [block.logprobs_B for block in blocks]
    words_NW[:, layout.array("uncached")] = 1
    words_NW[:, layout.array("forced_ids")] = mask_token_id
    words_NW[:, layout.stop_ids] = mask_token_id
    for row, start in enumerate(starts):
        if start.forced_ids_B is not None:
            words_NW[row, layout.array("forced_ids")] = start.forced_ids_B
        first_stop = layout.stop_ids.start
        words_NW[row, first_stop : first_stop + len(start.stop_token_ids)] = start.stop_token_ids
    return words_NW


def _unmasking(params: SamplingParams) -> str:
    assert params.unmasking is not None, "parameters are resolved at admission"
    return params.unmasking
