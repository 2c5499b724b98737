"""Mirrors of what the device keeps per running sequence, as NumPy arrays over slots.

M slots, B block length, C counts of ``counting.COUNT_NAMES``. A slot's row means something while a
sequence sits in it.
"""

from __future__ import annotations

import numpy as np

from focus_ray.engine.counting import COUNT_NAMES, as_counts
from focus_ray.engine.plan import BlockSnapshot, SlotStart
from focus_ray.engine.request import Sequence, SequenceState

WANTS_TOP, WANTS_SAMPLED, WANTS_FILTERED, WANTS_SUPPRESSED = range(4)
"""Columns of ``wants_M4``; the first holds the alternatives asked for plus one, 0 for none."""


class Slots:
    """Who sits where, and the state of each one's block."""

    def __init__(self, max_num_seqs: int, block_length: int, mask_token_id: int) -> None:
        m, b = max_num_seqs, block_length
        self.mask_token_id = mask_token_id
        self._sequences: list[Sequence | None] = [None] * m
        self._free = list(range(m - 1, -1, -1))
        self._admissions = 0
        self.admitted_M = np.zeros(m, np.int64)
        self.decoding_M = np.zeros(m, np.bool_)
        self.prefilling_M = np.zeros(m, np.bool_)
        self.block_start_M = np.zeros(m, np.int64)
        self.capacity_M = np.zeros(m, np.int64)
        self.emitted_end_M = np.zeros(m, np.int64)
        self.limit_M = np.zeros(m, np.int64)
        self.step_M = np.zeros(m, np.int64)
        self.counts_MC = np.zeros((m, len(COUNT_NAMES)), np.int64)
        self.wants_M4 = np.zeros((m, 4), np.int64)
        self.token_ids_MB = np.zeros((m, b), np.int32)
        self.decoded_MB = np.zeros((m, b), np.bool_)
        self.logprobs_MB = np.zeros((m, b), np.float32)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_taken(self) -> int:
        return len(self._sequences) - len(self._free)

    def reserve(self) -> int:
        """A free slot, which ``occupy`` is to fill next."""
        return self._free.pop()

    def is_taken(self, slot: int) -> bool:
        return self._sequences[slot] is not None

    def sequence(self, slot: int) -> Sequence:
        """Who sits in a taken slot."""
        sequence = self._sequences[slot]
        assert sequence is not None, f"slot {slot} is empty"
        return sequence

    def youngest(self) -> int:
        """The slot of the sequence that was admitted last."""
        return int(np.where(self.decoding_M | self.prefilling_M, self.admitted_M, -1).argmax())

    def occupy(self, sequence: Sequence, capacity: int) -> SlotStart:
        """Fill the mirrors of a sequence's slot; the same facts for the device.

        Args:
            capacity: tokens that its pages hold.
        """
        slot, params = sequence.slot, sequence.params
        block = sequence.saved_block or sequence.new_block(self.mask_token_id)
        sequence.saved_block = None
        self._sequences[slot] = sequence
        self.admitted_M[slot] = self._admissions
        self._admissions += 1
        self.set_phase(sequence)
        self.block_start_M[slot] = sequence.num_committed
        self.capacity_M[slot] = capacity
        self.emitted_end_M[slot] = sequence.prompt_len + sequence.num_emitted
        self.limit_M[slot] = sequence.limit
        self.step_M[slot] = block.denoising_step
        self.counts_MC[slot] = 0
        self.token_ids_MB[slot] = block.token_ids_B
        self.decoded_MB[slot] = block.decoded_B
        self.logprobs_MB[slot] = block.logprobs_B
        filtered = (params.top_p or 1.0) < 1.0 or (params.top_k or 0) > 0 or params.min_p > 0.0
        self.wants_M4[slot, WANTS_TOP] = 0 if params.logprobs is None else params.logprobs + 1
        self.wants_M4[slot, WANTS_SAMPLED] = bool(params.temperature)
        self.wants_M4[slot, WANTS_FILTERED] = bool(params.temperature) and filtered
        self.wants_M4[slot, WANTS_SUPPRESSED] = params.min_tokens > 0
        return SlotStart(
            slot=slot,
            block=block,
            block_start=sequence.num_committed,
            prompt_len=sequence.prompt_len,
            params=params,
            seed=sequence.seed,
            stop_token_ids=tuple(sequence.stop_token_ids),
        )

    def vacate(self, slot: int) -> BlockSnapshot:
        """Move the counters into the sequence and free its slot; the block as it was left."""
        sequence = self.sequence(slot)
        sequence.add_counts(as_counts(self.counts_MC[slot]))
        block = BlockSnapshot(
            self.token_ids_MB[slot].copy(),
            self.decoded_MB[slot].copy(),
            self.logprobs_MB[slot].copy(),
            int(self.step_M[slot]),
        )
        self._sequences[slot] = None
        self.decoding_M[slot] = self.prefilling_M[slot] = False
        self._free.append(slot)
        return block

    def set_phase(self, sequence: Sequence) -> None:
        """Take over whether a sequence decodes or is prefilled."""
        self.decoding_M[sequence.slot] = sequence.state is SequenceState.DECODING
        self.prefilling_M[sequence.slot] = sequence.state is SequenceState.PREFILLING

    def next_block(self, slot: int) -> None:
        """The block was committed; the next one is all masks."""
        self.block_start_M[slot] = self.sequence(slot).num_committed
        self.step_M[slot] = 0
        self.token_ids_MB[slot] = self.mask_token_id
        self.decoded_MB[slot] = False
